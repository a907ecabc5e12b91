"""Over several workers: the same answers and scores, whoever computes what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steering.models import LanguageModel
from steering.profile import IMPORTED, Profile, ProfileError
from tests.server.engine.running import ask, ids, prompt_of, stream_all
from tests.server.engine.test_scores import make_monitor
from tests.steering.edits import random_edit, random_gate
from tests.vllm.serving import MIXTURE, locally, profiles_of, save, serving

REQUESTS = [
    ask(prompt_of(9 + 4 * i, i), edits, max_tokens=8, answer_probe="edited")
    for i, edits in enumerate(MIXTURE.values())
]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return save("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.mark.parametrize(
    "size",
    [
        "tensor_parallel_size",
        pytest.param("data_parallel_size", marks=pytest.mark.matrix),
        pytest.param("pipeline_parallel_size", marks=pytest.mark.matrix),
    ],
)
def test_two_workers_answer_as_one(lm: LanguageModel, size: str) -> None:
    mixture, eager = dict(MIXTURE), True
    if size == "pipeline_parallel_size":
        for name in ("gate of an earlier block", "several at one site"):
            del mixture[name]  # a gate there is read on the other stage
        eager = False  # vLLM's CPU build has no buffers between stages without its warm-up
    requests = [request for name, request in zip(MIXTURE, REQUESTS, strict=True) if name in mixture]
    monitor = make_monitor(lm, "0.resid_post", "3.resid_post")
    options: dict[str, Any] = {size: 2, "cores": "0|1", "enforce_eager": eager}
    with serving(lm, Path(lm.name), profiles_of(lm, mixture), monitor, **options) as engine:
        here = stream_all(engine, requests * 2)
        new = random_edit("2.resid_post", 2, seed=50)
        engine.register(Profile("new", IMPORTED, (new,), lm.fingerprint))
        assert engine.healthy() and engine.stats().running == 0
        if size == "pipeline_parallel_size":
            across = random_edit("2.resid_post", gate=random_gate("1.resid_pre"))
            with pytest.raises(ProfileError, match="another pipeline stage"):
                engine.register(Profile("across", IMPORTED, (across,), lm.fingerprint))
    there = locally(lm, requests, monitor) * 2
    for mine, theirs in zip(here, there, strict=True):
        assert ids(mine) == ids(theirs)
        a, b = mine[0].scores, theirs[0].scores
        assert a is not None and b is not None
        for field in ("refusal_score", "answer_probability", "benign_probability", "edit_norm"):
            assert getattr(a, field) == pytest.approx(getattr(b, field), abs=1e-3), field
        assert a.gate_values == pytest.approx(b.gate_values, abs=1e-3)
