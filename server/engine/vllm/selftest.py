"""Does vLLM, compiled and on every worker, do what a profile says? Asked before it is served.

A short prompt and one generated token go through each replica, with every gate counting as 1, and
each worker compares what its programs did at every site with the edits' definition. The same
prompt without edits, beside it, must not be changed anywhere, bit for bit. With its real gates the
profile must give finite logits.

What a stale graph without hooks would leave in the buffers is not a number, so that it cannot pass.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from server.engine.base import EngineRequest, Sampling
from server.engine.vllm.client import Client
from server.engine.vllm.sampling import tokens_of
from server.engine.vllm.wire import RequestEdits
from steering.edit import AppliedEdit
from steering.models import LanguageModel
from steering.profile import Profile
from steering.selftest import prompt_ids

_TOKENS = 2
_SECONDS = 60


async def check_profile(
    client: Client,
    lm: LanguageModel,
    profile: Profile,
    find: Callable[[tuple[AppliedEdit, ...]], RequestEdits],
) -> None:
    """Raise ValueError, saying where and by how much, if the profile is not applied; and
    StepFailedError if its logits are not finite.

    Args:
        find: where edits are.
    """
    if not profile.applied():
        return
    edited, unedited = find(profile.applied()), RequestEdits()
    sampling = Sampling(temperature=0.0, max_tokens=_TOKENS)
    request = EngineRequest("self-test", tuple(prompt_ids(lm)), sampling)
    for replica in range(client.options.data_parallel_size):
        problems = await asyncio.gather(
            _check(client, request, edited, replica),
            _check(client, request, unedited, replica),
            _run(client, request, edited, replica),
        )
        for found in problems:
            if found:
                raise ValueError(found[0])


async def _check(
    client: Client, request: EngineRequest, edits: RequestEdits, replica: int
) -> list[str]:
    async with client.run(request, edits, replica=replica, endless=True, check=True) as (
        outputs,
        readings,
    ):
        async for output in outputs:
            list(tokens_of(output.outputs[0], 0))
        try:
            async with asyncio.timeout(_SECONDS):
                return await readings.checked(client.workers * _TOKENS)
        except TimeoutError:
            return [f"only {len(readings.checks)} of the workers' checks came back"]


async def _run(
    client: Client, request: EngineRequest, edits: RequestEdits, replica: int
) -> list[str]:
    async with client.run(request, edits, replica=replica) as (outputs, _):
        async for output in outputs:
            list(tokens_of(output.outputs[0], 0))
    return []
