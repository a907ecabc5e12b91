"""Several async generators read at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def merged(
    sources: Sequence[AsyncGenerator[T, None]],
) -> AsyncGenerator[tuple[int, T | Exception | None], None]:
    """Items of all sources as they come, each with its source's index.

    A source ends with None, or with the exception that it raised; the others go on.
    """
    arrived: asyncio.Queue[tuple[int, T | Exception | None]] = asyncio.Queue()

    async def read(index: int, source: AsyncGenerator[T, None]) -> None:
        end: Exception | None = None
        try:
            async with aclosing(source):
                async for item in source:
                    arrived.put_nowait((index, item))
        except Exception as error:
            end = error
        arrived.put_nowait((index, end))

    readers = [asyncio.create_task(read(i, source)) for i, source in enumerate(sources)]
    try:
        under_way = len(readers)
        while under_way:
            index, item = await arrived.get()
            under_way -= item is None or isinstance(item, Exception)
            yield index, item
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
