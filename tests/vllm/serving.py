"""Engines on tiny models, vLLM's and the local one beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from server.engine.base import Engine, EngineRequest, EngineToken
from server.engine.vllm.engine import VllmEngine
from server.engine.vllm.options import VllmOptions
from steering.edit import AppliedEdit
from steering.models import LanguageModel, load_model
from steering.monitor import Monitor
from steering.profile import IMPORTED, Profile
from tests.conftest import make_model
from tests.server.engine.running import running, stream_all
from tests.steering.edits import mixture

MIXTURE = mixture()
"""Kept: an engine knows edits by the identity of their tensors."""


def save(family: str, folder: Path) -> LanguageModel:
    """A tiny model as files, and loaded from them; its name is their folder."""
    lm = make_model(family)
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return load_model(str(folder))


def never_ends(lm: LanguageModel) -> dict[int, float]:
    """A bias that keeps a reply going to its length."""
    return dict.fromkeys(lm.eos_token_ids, -100.0)


def profiles_of(
    lm: LanguageModel, mixture: Mapping[str, Sequence[AppliedEdit]] = MIXTURE
) -> list[Profile]:
    return [
        Profile(f"p{i}", IMPORTED, tuple(a.edit for a in edits), lm.fingerprint)
        for i, edits in enumerate(mixture.values())
        if edits
    ]


@contextmanager
def serving(
    lm: LanguageModel,
    folder: Path,
    profiles: Sequence[Profile],
    monitor: Monitor | None = None,
    *,
    cores: str = "auto",
    **options: Any,
) -> Iterator[VllmEngine]:
    """A running vLLM engine.

    Args:
        cores: for each worker of vLLM's CPU build, divided by `|`.
    """
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = cores
    settings = {"dtype": "float32", "max_site_rank": 32, "max_num_seqs": 16, **options}
    engine = VllmEngine(
        lm, VllmOptions(str(folder), **settings), profiles=profiles, monitor=monitor
    )
    try:
        engine.start()
        yield engine
    finally:
        engine.close()


def locally(
    lm: LanguageModel, requests: Sequence[EngineRequest], monitor: Monitor | None = None
) -> list[list[EngineToken]]:
    """What the local engine answers."""
    with running(lm, max_num_seqs=16, max_model_len=256, monitor=monitor) as engine:
        return stream_all(engine, requests)


def alone(engine: Engine, requests: Sequence[EngineRequest]) -> list[list[EngineToken]]:
    """Answers to requests that have the engine to themselves, one after the other."""
    return [stream_all(engine, [request])[0] for request in requests]
