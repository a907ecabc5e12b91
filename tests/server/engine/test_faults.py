"""What fails takes nobody else down; who is late or loud holds nobody else up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from server.engine.base import (
    DeadlineExceededError,
    EngineRequest,
    EngineStoppedError,
    StepFailedError,
)
from server.engine.local import LocalEngine
from server.engine.rows import Row
from server.engine.runner import Runner
from steering.models import LanguageModel
from tests.server.engine.running import ask, collect, ids, prompt_of, running, stream_all
from tests.server.live import wait_until
from tests.steering.edits import mixture


async def gather(engine: LocalEngine, requests: Sequence[EngineRequest]) -> list[Any]:
    tasks = [collect(engine, request) for request in requests]
    return await asyncio.gather(*tasks, return_exceptions=True)


def before_each_call(
    monkeypatch: pytest.MonkeyPatch, check: Callable[[Sequence[Row], bool], None]
) -> None:
    """Let `check(rows, decoding)` raise in the place of the model's call."""
    run = Runner.run

    def checked(self: Runner, rows: Sequence[Row], *args: Any, **more: Any) -> Any:
        check(rows, more.get("decoding", False))
        return run(self, rows, *args, **more)

    monkeypatch.setattr(Runner, "run", checked)


def of_every_profile(**more: Any) -> list[EngineRequest]:
    return [
        ask(prompt_of(6 + i, i), edits, max_tokens=12, **more)
        for i, edits in enumerate(mixture().values())
    ]


@pytest.mark.parametrize("where", ["reading", "decoding"])
def test_an_edit_that_raises_fails_its_own_request_alone(
    tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    good = of_every_profile()
    bad = replace(good[2], request_id="bad")

    def check(rows: Sequence[Row], decoding: bool) -> None:
        if decoding == (where == "decoding") and any(r.request.request_id == "bad" for r in rows):
            raise RuntimeError("a broken edit")

    with running(tiny_llama, max_num_seqs=len(good) + 1) as engine:
        alone = [ids(stream_all(engine, [request])[0]) for request in good]
        before_each_call(monkeypatch, check)
        *others, failed = asyncio.run(gather(engine, [*good, bad]))
        assert isinstance(failed, StepFailedError) and "a broken edit" in str(failed)
        assert [ids(tokens) for tokens in others] == alone
        assert engine.healthy() and engine.stats().slots_used == 0


def test_where_memory_is_short_fewer_rows_are_computed_at_once(
    tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = of_every_profile(temperature=1.0, seed=5)

    def check(rows: Sequence[Row], _decoding: bool) -> None:
        if len(rows) > 2:
            raise torch.OutOfMemoryError("no memory for so many")

    with running(tiny_llama, max_num_seqs=len(requests)) as engine:
        before = [ids(tokens) for tokens in stream_all(engine, requests)]
        before_each_call(monkeypatch, check)
        assert [ids(tokens) for tokens in stream_all(engine, requests)] == before
        assert engine.healthy()


def test_an_engine_whose_model_cannot_be_run_any_more_says_so(
    tiny_llama: LanguageModel,
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the device is lost")

    with running(tiny_llama) as engine:
        handle = tiny_llama.sites.blocks[0].module.register_forward_hook(fail)
        try:
            results = []
            for _ in range(8):
                results += asyncio.run(gather(engine, [ask(prompt_of(4))]))
            assert all(isinstance(r, StepFailedError | EngineStoppedError) for r in results)
            wait_until(lambda: not engine.healthy())
        finally:
            handle.remove()


def test_a_request_whose_time_is_up_ends_and_frees_its_slot(endless_llama: LanguageModel) -> None:
    soon = time.monotonic() + 0.3
    late = replace(ask(prompt_of(4), max_tokens=100), deadline=soon)
    with running(endless_llama, max_num_seqs=1) as engine:

        async def run() -> list[Any]:
            slow = asyncio.create_task(read_slowly(engine, late))
            return await asyncio.gather(slow, collect(engine, late), return_exceptions=True)

        async def read_slowly(engine: LocalEngine, request: EngineRequest) -> None:
            async for _ in engine.generate(request):
                await asyncio.to_thread(engine.call, lambda: time.sleep(0.02))

        results = asyncio.run(run())
        assert all(isinstance(result, DeadlineExceededError) for result in results)
        wait_until(lambda: engine.stats().slots_used == engine.stats().waiting == 0)
        assert ids(stream_all(engine, [ask(prompt_of(4), max_tokens=3)])[0])


def test_a_loud_client_does_not_hold_a_quiet_one_up(tiny_llama: LanguageModel) -> None:
    order: list[str] = []
    with running(tiny_llama, max_num_seqs=2) as engine:

        async def one(client: str) -> None:
            await collect(engine, replace(ask(prompt_of(5), max_tokens=6), client=client))
            order.append(client)

        async def run() -> None:
            loud = [asyncio.create_task(one("loud")) for _ in range(24)]
            await asyncio.sleep(0)
            quiet = [asyncio.create_task(one("quiet")) for _ in range(6)]
            await asyncio.gather(*loud, *quiet)

        asyncio.run(run())
    # The quiet client's six are done by the time the loud one has had about as many.
    assert order[:15].count("quiet") == 6
