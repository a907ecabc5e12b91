"""Where the replies of a comparison come from: a model in this process, or a running server.

Both take the body of `POST /v1/steering/compare` and give its events.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Generator, Iterable, Mapping
from typing import Any, Protocol

from pydantic import ValidationError

from server.access import LOCAL
from server.commands import remote
from server.compare import compare
from server.compare_protocol import CompareRequest
from server.engine.base import EngineError
from server.errors import ApiError, from_engine
from server.hosting import Host
from server.metrics import Metrics
from server.profiles import COMPOSED
from server.validation import describe, field_path

Event = dict[str, Any]


class Source(Protocol):
    """What answers."""

    def profiles(self) -> list[tuple[str, bool]]:
        """Names, and whether each is red-team."""
        ...

    def compare(self, body: Mapping[str, Any]) -> Generator[Event, None, None]:
        """The events of a comparison; closing it cancels what is under way.

        Raises ValueError with what is wrong, in one line.
        """
        ...

    def close(self) -> None: ...


class Local:
    """A host in this process, started here."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._metrics = Metrics([*host.profiles.names, COMPOSED])
        host.start()
        self._runner = asyncio.Runner()

    def profiles(self) -> list[tuple[str, bool]]:
        return [(profile.name, profile.red_team) for profile in self._host.profiles]

    def compare(self, body: Mapping[str, Any]) -> Generator[Event, None, None]:
        try:
            request = CompareRequest.model_validate(body)
            since = time.perf_counter()
            comparing = self._runner.run(compare(self._host, self._metrics, request, LOCAL, since))
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(describe(first, field_path(first["loc"]))) from None
        except ApiError as error:
            raise ValueError(error.message) from None
        except EngineError as error:
            raise ValueError(from_engine(error).message) from None
        # The event loop runs while the next event is waited for, and only then.
        events = comparing.events()
        try:
            while (event := self._runner.run(_next(events))) is not None:
                yield event
        finally:
            self._runner.run(_end(events, comparing.close()))

    def close(self) -> None:
        self._runner.close()
        self._host.close()


async def _next(events: AsyncGenerator[Event, None]) -> Event | None:
    return await anext(events, None)


async def _end(events: AsyncGenerator[Event, None], closing: Any) -> None:
    await events.aclose()
    await closing


class Remote:
    """A running server.

    Raises ValueError where there is none.
    """

    def __init__(self, url: str, key: str | None) -> None:
        self._base, self._key = remote.base_of(url), key
        with remote.request(self._base, "/v1/steering/profiles", key=key) as response:
            self._cards = json.load(response)["data"]

    def profiles(self) -> list[tuple[str, bool]]:
        return [(card["name"], card["red_team"]) for card in self._cards]

    def compare(self, body: Mapping[str, Any]) -> Generator[Event, None, None]:
        # A long queue is no failure.
        with remote.request(
            self._base, "/v1/steering/compare", key=self._key, body=body, timeout=None
        ) as response:
            try:
                yield from _events(response)
            except OSError as error:
                raise ValueError(f"{self._base} went away: {error}") from None

    def close(self) -> None:
        pass


def _events(lines: Iterable[bytes]) -> Generator[Event, None, None]:
    """Raises ValueError for an error, or a stream that breaks off."""
    for line in lines:
        if not line.startswith(b"data: "):
            continue
        data = line.removeprefix(b"data: ").strip()
        if data == b"[DONE]":
            return
        event: Event = json.loads(data)
        if "error" in event:
            raise ValueError(event["error"]["message"])
        yield event
    raise ValueError("the server broke off in the middle of the replies")
