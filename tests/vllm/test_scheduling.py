"""What vLLM's scheduler does to requests: their prompts in pieces, their places taken and given
back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from server.engine.base import PromptTooLongError
from server.engine.vllm.engine import VllmEngine
from steering.models import LanguageModel
from tests.server.engine.running import ask, ids, prompt_of, stream_all
from tests.server.engine.test_scores import make_monitor
from tests.vllm.serving import MIXTURE, locally, never_ends, profiles_of, save, serving

BUDGET = 48
BLOCK, BLOCKS = 32, 12


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return save("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def engine(lm: LanguageModel) -> Iterator[VllmEngine]:
    """Few tokens in a step, and room for fewer requests than it may run."""
    settings = {
        "max_num_batched_tokens": BUDGET,
        "block_size": BLOCK,
        "num_gpu_blocks_override": BLOCKS,
    }
    with serving(
        lm, Path(lm.name), profiles_of(lm), make_monitor(lm, "0.resid_post"),
        enforce_eager=True, max_num_seqs=16, max_unsplit_prompt=32, max_model_len=200,
        engine_args=settings,
    ) as engine:  # fmt: skip
        yield engine


def test_prompts_in_pieces_answer_as_whole_ones(engine: VllmEngine, lm: LanguageModel) -> None:
    names = [n for n in MIXTURE if not any(a.edit.needs_whole_prompt for a in MIXTURE[n])]
    requests = [
        ask(prompt_of(70 + 9 * i, i), MIXTURE[name], max_tokens=6) for i, name in enumerate(names)
    ]
    here, there = stream_all(engine, requests), locally(lm, requests, engine.monitor)
    for name, mine, theirs in zip(names, here, there, strict=True):
        assert ids(mine) == ids(theirs), name
        assert mine[0].scores is not None and theirs[0].scores is not None
        assert mine[0].scores.edit_norm == pytest.approx(theirs[0].scores.edit_norm, abs=1e-3)


def test_gates_over_the_prompt_are_read_whole_however_full_the_steps_are(
    engine: VllmEngine, lm: LanguageModel
) -> None:
    """vLLM splits what does not fit; such a prompt is tried again, and never answered wrongly."""
    whole = [n for n in MIXTURE if any(a.edit.needs_whole_prompt for a in MIXTURE[n])]
    requests = [
        ask(prompt_of(30 if i % 2 else 100, i), MIXTURE[whole[i % 4 // 2]] if i % 2 else ())
        for i in range(12)
    ]
    here, there = stream_all(engine, requests), locally(lm, requests, engine.monitor)
    for mine, theirs in zip(here, there, strict=True):
        assert ids(mine) == ids(theirs)
        assert mine[0].scores is not None and theirs[0].scores is not None
        assert mine[0].scores.gate_values == pytest.approx(theirs[0].scores.gate_values, abs=1e-3)


def test_a_prompt_too_long_to_be_read_whole_is_refused(engine: VllmEngine) -> None:
    with pytest.raises(PromptTooLongError, match="--max-unsplit-prompt"):
        engine.check(ask(prompt_of(33), MIXTURE["last-prompt-token gate"]))


def test_preempted_requests_go_on_as_they_began(engine: VllmEngine, lm: LanguageModel) -> None:
    """They all fit when they begin, and need twice the memory before they end."""
    requests = [
        ask(prompt_of(20 + i, i), edits, max_tokens=50, logit_bias=never_ends(lm))
        for i, edits in enumerate(MIXTURE.values())
    ]
    assert max(len(request.prompt_ids) for request in requests) < BLOCK
    assert len(requests) < BLOCKS < len(requests) * ((20 + 50) // BLOCK + 1) / 2
    here = stream_all(engine, requests)
    for mine, theirs in zip(here, locally(lm, requests, engine.monitor), strict=True):
        assert ids(mine) == ids(theirs)
