"""Every family that vLLM and the local engine share answers the same on both."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.engine.running import ask, ids, prompt_of, stream_all
from tests.server.engine.test_scores import make_monitor
from tests.vllm.serving import MIXTURE, locally, profiles_of, save, serving

FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "mistral", "phi3"]


@pytest.mark.matrix
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_answers_as_on_the_local_engine(family: str, tmp_path: Path) -> None:
    lm = save(family, tmp_path / family)
    monitor = make_monitor(lm, "0.mlp_add", "3.resid_post")
    requests = [
        ask(prompt_of(12 + 5 * i, i), edits, max_tokens=8, answer_probe="edited")
        for i, edits in enumerate(MIXTURE.values())
    ]
    with serving(lm, tmp_path / family, profiles_of(lm), monitor, enforce_eager=True) as engine:
        here = stream_all(engine, requests)
    for name, mine, theirs in zip(MIXTURE, here, locally(lm, requests, monitor), strict=True):
        assert ids(mine) == ids(theirs), name
        a, b = mine[0].scores, theirs[0].scores
        assert a is not None and b is not None
        for field in ("refusal_score", "answer_probability", "benign_probability", "edit_norm"):
            assert getattr(a, field) == pytest.approx(getattr(b, field), abs=2e-3), (name, field)
