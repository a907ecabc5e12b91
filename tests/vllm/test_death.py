"""vLLM's processes die or run out of memory: requests fail at once, and the server knows."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from server.engine.base import EngineStoppedError, EngineToken
from steering.models import LanguageModel
from tests.server.engine.running import ask, prompt_of
from tests.vllm.serving import MIXTURE, never_ends, profiles_of, save, serving


def processes(name: str) -> list[int]:
    """Descendants of this process that vLLM calls so."""
    found = []
    for child in psutil.Process().children(recursive=True):
        # Of engines before this one, processes may just be ending, or have ended unread.
        with contextlib.suppress(psutil.NoSuchProcess):
            if name in "".join(child.cmdline()):
                found.append(child.pid)
    return found


def killed(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def out_of_memory(pid: int) -> None:
    """No new memory from now on: a step that needs some raises, or segfaults. One that needs none
    goes on."""
    resource.prlimit(pid, resource.RLIMIT_AS, (2**20, 2**20))


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return save("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.mark.parametrize(
    ("victim", "meets", "workers"),
    [
        ("EngineCore", killed, 1),
        # vLLM waits for the other worker, ten seconds long, before it says that one has died.
        ("Worker", killed, 2),
        ("Worker", out_of_memory, 1),
    ],
)
def test_requests_fail_at_once_and_health_is_gone(
    lm: LanguageModel, victim: str, meets: Callable[[int], None], workers: int
) -> None:
    # The last two wait, and need memory: kernels for prompts of their lengths are not there yet.
    requests = [
        ask(prompt_of(n), MIXTURE["sublayers"], max_tokens=240 - n, logit_bias=never_ends(lm))
        for n in (8, 8, 77, 131)
    ]
    with serving(
        lm, Path(lm.name), profiles_of(lm), enforce_eager=True, max_num_seqs=2,
        tensor_parallel_size=workers, cores="0|1" if workers == 2 else "auto",
    ) as engine:  # fmt: skip

        async def interrupted() -> list[object]:
            streams = engine.generate_all(requests)
            await anext(streams[0])
            victims = processes(victim)
            assert len(victims) >= workers
            meets(max(victims))  # the latest: others may be of engines before this one
            begun = time.monotonic()

            async def drain(stream: AsyncIterator[EngineToken]) -> int:
                return len([token async for token in stream])

            ends = await asyncio.gather(*map(drain, streams), return_exceptions=True)
            assert time.monotonic() - begun < 5
            return list(ends)

        ends = asyncio.run(interrupted())
        whole = {239 - 8, 240 - 8} if meets is out_of_memory else set()
        assert all(isinstance(end, EngineStoppedError) or end in whole for end in ends[:2]), ends
        assert all(isinstance(end, EngineStoppedError) for end in ends[2:]), ends
        assert not engine.healthy()

        async def refused() -> None:
            with pytest.raises(EngineStoppedError):
                engine.generate(requests[0])

        asyncio.run(refused())
        begun = time.monotonic()
    assert time.monotonic() - begun < 20  # closing a dead engine waits for nobody


def test_a_request_that_is_stopped_before_its_first_step_is_told_so(lm: LanguageModel) -> None:
    with serving(lm, Path(lm.name), profiles_of(lm), enforce_eager=True, max_num_seqs=2) as engine:

        async def admitted_and_stopped() -> None:
            stream = engine.generate(ask(prompt_of(8), MIXTURE["sublayers"]))
            engine._admit()
            await engine._stop_serving()
            with pytest.raises(EngineStoppedError):
                await asyncio.wait_for(anext(stream), 5)

        engine._call(admitted_and_stopped)
