"""Beside stock vLLM: unedited requests are the same, bit for bit, and caches are not mixed up.

Vanilla engines are started here with the same arguments, all but what steers.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from server.engine.base import EngineRequest
from server.engine.vllm.client import Client
from server.engine.vllm.engine import VllmEngine
from server.engine.vllm.options import VllmOptions
from server.engine.vllm.sampling import sampling_params
from server.engine.vllm.wire import RowSteering
from steering.models import LanguageModel
from steering.selftest import prompt_ids
from tests.server.engine.running import ask, ids, prompt_of, stream_all
from tests.vllm.serving import MIXTURE, alone, locally, profiles_of, save, serving

REQUESTS = [ask(prompt_of(n), max_tokens=8, logit_bias={257: -100.0}) for n in (4, 17, 60)]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return save("llama", tmp_path_factory.mktemp("models") / "llama")


def stock(client: Client, requests: list[EngineRequest]) -> list[list[tuple[int, float]]]:
    """Tokens and logprobs of vLLM with its own worker, one request after the other."""
    args = client._engine_args()
    for name in ("worker_cls", "additional_config"):
        del args[name]

    async def run() -> list[list[tuple[int, float]]]:
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**args))
        try:
            return [await answer(llm, i, request) for i, request in enumerate(requests)]
        finally:
            llm.shutdown()

    async def answer(llm: AsyncLLM, i: int, request: EngineRequest) -> list[tuple[int, float]]:
        params = sampling_params(request, RowSteering("x"), (257,))
        prompt: Any = {"prompt_token_ids": list(request.prompt_ids)}
        found = []
        async for output in llm.generate(prompt, params, str(i)):
            part = output.outputs[0]
            assert part.logprobs is not None
            for token, logprobs in zip(part.token_ids, part.logprobs, strict=True):
                found.append((token, logprobs[token].logprob))
        return found

    return asyncio.run(run())


def test_unedited_requests_are_stock_vllms_bit_for_bit(lm: LanguageModel) -> None:
    with serving(lm, Path(lm.name), profiles_of(lm), enforce_eager=True) as engine:
        steered = alone(engine, REQUESTS)
        client = engine._client
    found = [[(token.token_id, token.logprob) for token in reply] for reply in steered]
    assert found == stock(client, REQUESTS)


def test_what_the_self_test_has_computed_is_in_no_reply(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gates count as 1. Real prompts begin like its own: with the template's first tokens."""
    monkeypatch.setattr("steering.selftest._PROMPT", "Hello, who are you? " * 9)
    edits = MIXTURE["per-token gate"]
    requests = [ask([*prompt_ids(lm), *more], edits, max_tokens=4) for more in ((), (7, 8, 9))]
    [profile] = profiles_of(lm, {"gated": edits})
    with serving(lm, Path(lm.name), [profile], enforce_eager=True) as engine:
        replies = stream_all(engine, requests)
    for reply, expected in zip(replies, locally(lm, requests), strict=True):
        assert ids(reply) == ids(expected)
        for token, other in zip(reply, expected, strict=True):
            assert token.logprob == pytest.approx(other.logprob, abs=1e-3)


@pytest.mark.matrix
def test_a_graph_that_stock_vllm_has_cached_is_not_taken_for_a_steered_one(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's compile cache does not look at hooks; it looks at `additional_config`."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    requests = [ask(prompt_of(12), edits) for edits in MIXTURE.values()]
    expected = [ids(reply) for reply in locally(lm, requests)]
    options = VllmOptions(lm.name, dtype="float32", max_num_seqs=16, compilation="vllm")
    stock(VllmEngine(lm, options)._client, REQUESTS)
    for _ in range(2):  # the second time from the cache
        with serving(lm, Path(lm.name), profiles_of(lm), compilation="vllm") as engine:
            assert [ids(reply) for reply in stream_all(engine, requests)] == expected


def test_vllms_compile_cache_knows_the_hooks(lm: LanguageModel) -> None:
    def key(**options: Any) -> str:
        profiles = options.pop("profiles", profiles_of(lm))
        how = VllmOptions(lm.name, dtype="float32", **options)
        engine = VllmEngine(lm, how, profiles=profiles)
        config = engine._client._engine_args()["additional_config"]
        return VllmConfig(additional_config=config).compute_hash()

    assert key() == key()
    assert len({key(), key(max_site_rank=64), key(profiles=profiles_of(lm)[:2])}) == 3


def test_an_argument_that_is_given_as_off_does_not_replace_the_servers(lm: LanguageModel) -> None:
    off = {"max_logprobs": 0, "worker_cls": None, "disable_log_stats": False}
    plain, given = (
        VllmEngine(lm, VllmOptions(lm.name, engine_args=args))._client._engine_args()
        for args in ({}, {**off, "generation_config": "auto"})
    )
    assert given == {**plain, "generation_config": "auto"}  # that one is the user's


def test_unknown_arguments_of_vllm_are_named(lm: LanguageModel) -> None:
    options = VllmOptions(lm.name, engine_args={"no_such_thing": 3})
    with pytest.raises(ValueError, match="no_such_thing"):
        VllmEngine(lm, options).start()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"runner": None}, r"'runner' should be 'auto', .* \(got null\)$"),
        ({"block_size": "wide"}, r"'block_size' should be a valid integer"),
        ({"compilation_config": {"nope": 1}}, "'nope' is not a key"),
    ],
)
def test_what_vllm_refuses_is_told_in_a_line(
    lm: LanguageModel, given: dict[str, Any], told: str
) -> None:
    options = VllmOptions(lm.name, engine_args=given)
    with pytest.raises(ValueError, match=f"^vLLM refuses its arguments: {told}"):
        VllmEngine(lm, options).start()
