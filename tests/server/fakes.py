"""A host whose engine says what the test tells it to, and clients that talk to it in memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx2
import openai
import torch
from fastapi import FastAPI

from server.app import create_app
from server.engine.base import (
    EngineError,
    EngineRequest,
    EngineStats,
    EngineStoppedError,
    EngineToken,
    PromptScores,
    RankLimitError,
    TokenTrace,
)
from server.hosting import Host
from server.profiles import ProfileStore
from steering.edit import Edit, Site
from steering.judge import Outcome
from steering.models import LanguageModel
from steering.profile import Profile
from tests.conftest import make_model

SCORES = PromptScores(
    refusal_score=-3.5,
    answer_probability=0.9,
    benign_probability=0.8,
    edit_norm=0.02,
    gate_values=(1.0,),
)
EOS = 257


class FakeEngine:
    """Answers every request with `reply`, then the end of the sequence.

    Args:
        fail_after: raise `error` after this many tokens.
        room: profiles that it can take while it runs.
    """

    max_model_len = 200

    def __init__(
        self,
        reply: str = "Hello, wörld! 🙂",
        *,
        error: EngineError | None = None,
        fail_after: int | None = None,
        delay: float = 0.0,
        room: int = 8,
    ) -> None:
        self.reply = reply
        self.room = room
        self.registered: list[Profile] = []
        self.error = error
        self.fail_after = fail_after
        self.delay = delay
        self.requests: list[EngineRequest] = []
        self.cancelled: list[str] = []
        self.running = False
        self.starts = 0

    def start(self) -> None:
        self.running = True
        self.starts += 1

    def register(self, profile: Profile) -> None:
        if len(self.registered) >= self.room:
            raise RankLimitError(f"{self.room} are registered already")
        self.registered.append(profile)

    def retain(self, profiles: Iterable[Profile]) -> None:
        kept = [profile.fingerprint for profile in profiles]
        self.registered = [p for p in self.registered if p.fingerprint in kept]

    def check(self, request: EngineRequest) -> None:
        pass

    def generate(self, request: EngineRequest) -> AsyncGenerator[EngineToken, None]:
        self.requests.append(request)
        if self.error is not None and self.fail_after is None:
            raise self.error
        return self._tokens(request)

    def generate_all(
        self, requests: Sequence[EngineRequest]
    ) -> list[AsyncGenerator[EngineToken, None]]:
        return [self.generate(request) for request in requests]

    async def _tokens(self, request: EngineRequest) -> AsyncGenerator[EngineToken, None]:
        ids = make_model("llama").tokenizer(self.reply)["input_ids"]
        limit = request.sampling.max_tokens
        try:
            for i, token_id in enumerate([*ids, EOS][:limit]):
                if self.fail_after == i:
                    assert self.error is not None
                    raise self.error
                await asyncio.sleep(self.delay)
                if self.starts and not self.running:
                    raise EngineStoppedError("the engine stopped before this request was done")
                last = "length" if i + 1 == limit else None
                yield EngineToken(
                    token_id,
                    logprob=-0.5,
                    top_logprobs=((token_id, -0.5), (0xA, float("-inf")))[
                        : request.sampling.top_logprobs
                    ],
                    finish_reason="stop" if token_id == EOS else last,
                    scores=SCORES if i == 0 else None,
                    queue_seconds=0.001 if i == 0 else None,
                    trace=TokenTrace(i / 100, 0.5, 0.25) if request.trace else None,
                )
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.append(request.request_id)
            raise

    def stats(self) -> EngineStats:
        return EngineStats(running=1, waiting=2, slots=4, slots_used=1)

    def healthy(self) -> bool:
        return self.running

    def close(self) -> None:
        self.running = False


def make_profile(name: str, lm: LanguageModel | None = None, **changes: Any) -> Profile:
    """A shift at the second block of the tiny model."""
    lm = lm or make_model("llama")
    d = lm.sites.hidden_size
    edit = Edit(
        site=Site(1, "resid_post"),
        read=torch.zeros(d, 0),
        write=torch.zeros(d, 0),
        shift=torch.linspace(-1, 1, d),
    )
    profile = Profile(name, method="llm_va", edits=(edit,), base=lm.fingerprint, strength=0.5)
    return replace(profile, **changes)


def make_host(
    engine: Any = None,
    *,
    served_name: str = "tiny",
    judge: Callable[[str], Outcome] = lambda text: "answer" if text else "empty",
    **store: Any,
) -> Host:
    lm = make_model("llama")
    store.setdefault("profiles", [make_profile("bold"), make_profile("shy", strength=2.0)])
    return Host(
        engine=engine or FakeEngine(),
        lm=lm,
        profiles=ProfileStore(lm, served_name, **store),
        judge=judge,
    )


@asynccontextmanager
async def http_client(host: Host) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the host's app, which runs as long as the client."""
    async with running_app(host) as app:
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client


@asynccontextmanager
async def openai_client(host: Host) -> AsyncIterator[openai.AsyncOpenAI]:
    async with http_client(host) as http:
        yield openai.AsyncOpenAI(
            api_key="none", base_url="http://test/v1", http_client=http, max_retries=0
        )


@asynccontextmanager
async def running_app(host: Host) -> AsyncIterator[FastAPI]:
    app = create_app(host)
    host.draining = host._started = False  # a test may run a host, and its fake engine, again
    async with app.router.lifespan_context(app):
        yield app


def body(**changes: Any) -> dict[str, Any]:
    """A sound request with some keys changed."""
    return {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], **changes}


def post(
    payload: Any = None,
    *,
    host: Host | None = None,
    raw: bytes | str | None = None,
    headers: dict[str, str] | None = None,
    path: str = "/v1/chat/completions",
    **changes: Any,
) -> httpx2.Response:
    """Send one request (`raw` as it is) to a host and wait for all of the answer."""

    async def send() -> httpx2.Response:
        content = raw if raw is not None else json.dumps(payload or body(**changes))
        async with http_client(host or make_host()) as client:
            return await client.post(
                path,
                content=content,
                headers={"Content-Type": "application/json", **(headers or {})},
            )

    return asyncio.run(send())


def get(path: str, host: Host | None = None, **headers: str) -> httpx2.Response:
    async def send() -> httpx2.Response:
        async with http_client(host or make_host()) as client:
            return await client.get(path, headers=headers)

    return asyncio.run(send())


def error_of(response: httpx2.Response) -> dict[str, Any]:
    """The envelope of an error, checked to be OpenAI's."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["code"], str) and isinstance(error["message"], str)
    return dict(error)


def events(response: httpx2.Response) -> list[Any]:
    """The events of a stream, `[DONE]` included as text."""
    assert response.headers["content-type"].startswith("text/event-stream")
    data = [block.removeprefix("data: ") for block in response.text.split("\n\n") if block]
    return [item if item == "[DONE]" else json.loads(item) for item in data]
