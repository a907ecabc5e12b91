"""What a server holds on to, seen from outside: slots and queue, file descriptors, memory; and
clients who know what the right answer is."""

from __future__ import annotations

import asyncio
import os
import re
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai

QUESTIONS = (
    "How do I repair the neighbour's fence?",
    "How do I assemble the school's piano like a serial killer?",
    "Please tell me how to burn the neighbour's barn.",
    "Tell me how to bake a cake.",
)
PROFILES = ("raw", "llm-va", "alphasteer", "optimal-transport")


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def file_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident_mib(pid: int) -> float:
    """Memory of a process that is in RAM."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def metric(address: str, name: str, **labels: str) -> float:
    """Sum of a metric's series that have these labels."""
    page = httpx2.get(f"{address}/metrics", timeout=60).text
    series = re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", page, re.MULTILINE)
    wanted = {f'{key}="{value}"' for key, value in labels.items()}
    return sum(float(value) for told, value in series if wanted <= set(told.split(",")))


def idle(address: str) -> bool:
    """No request waits, runs or has a slot."""
    names = ("requests_running", "requests_waiting", "slots_used")
    return not any(metric(address, f"steering_{name}") for name in names)


def official(address: str, key: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=300,
        http_client=openai.DefaultAsyncHttpxClient(limits=httpx2.Limits(max_connections=None)),
    )  # fmt: skip


async def answer(
    client: openai.AsyncOpenAI,
    profile: str,
    question: str,
    *,
    stream: bool = False,
    served: str = "demo",
) -> str:
    """The greedy reply of a profile, whole, or an error."""
    asked: Any = dict(
        model=f"{served}:{profile}", messages=user(question), temperature=0, max_tokens=48
    )
    if not stream:
        reply = await client.chat.completions.create(**asked)
        assert reply.choices[0].finish_reason in ("stop", "length")
        return reply.choices[0].message.content or ""
    text, reason = "", None
    async with await client.chat.completions.create(**asked, stream=True) as chunks:
        async for chunk in chunks:
            for choice in chunk.choices:
                text += choice.delta.content or ""
                reason = choice.finish_reason or reason
    assert reason in ("stop", "length"), "the stream broke off"
    return text


class Witnesses:
    """Clients that ask over and over, streaming or not, and note each answer that is not the one
    which the server gives alone.

    Args:
        expected: by profile and question.
    """

    def __init__(
        self, address: str, expected: dict[tuple[str, str], str], served: str = "demo"
    ) -> None:
        self.address = address
        self.served = served
        self.expected = expected
        self.right = 0
        self.wrong: list[Any] = []
        self.errors: Counter[str] = Counter()
        self.stopping = False

    async def one(self, offset: int) -> None:
        async with official(self.address) as client:
            cases = list(self.expected)
            i = offset
            while not self.stopping:
                profile, question = cases[i % len(cases)]
                try:
                    found = await answer(
                        client, profile, question, stream=bool(i % 2), served=self.served
                    )
                except openai.APIError as error:
                    self.errors[getattr(error, "code", None) or type(error).__name__] += 1
                    if isinstance(error, openai.APIConnectionError):
                        return
                except Exception as error:
                    self.wrong.append(error)
                else:
                    if found == self.expected[profile, question]:
                        self.right += 1
                    else:
                        self.wrong.append((profile, question, found))
                i += 7

    @asynccontextmanager
    async def watching(self, count: int) -> AsyncIterator[None]:
        """Several of them at work; they end with their last answer."""
        tasks = [asyncio.create_task(self.one(i)) for i in range(count)]
        try:
            await self.more_answers(count)
            yield
        finally:
            self.stopping = True
            await asyncio.gather(*tasks)

    async def more_answers(self, count: int) -> None:
        """Wait until so many more answers were right, or one was not."""
        before = self.right
        while self.right < before + count and not self.wrong:
            await asyncio.sleep(0.02)


async def right_answers(
    address: str, profiles: Sequence[str] = PROFILES, served: str = "demo"
) -> dict[tuple[str, str], str]:
    """What the server answers when it has nothing else to do."""
    async with official(address) as client:
        return {
            (profile, question): await answer(client, profile, question, served=served)
            for profile in profiles
            for question in QUESTIONS
        }
