"""Fit the demo's profiles and monitor, with every choice made on the selection split.

The test split is read once, at the end, for the cards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from steering.demo import DEMO_NAME
from steering.demo.corpus import Split, prompts
from steering.demo.table import REPLY_TOKENS, measure
from steering.fit import fit_profile
from steering.methods import FitData, Method
from steering.methods.alphasteer import AlphaSteer
from steering.methods.llm_va import LlmVa
from steering.methods.optimal_transport import OptimalTransport
from steering.models import load_model
from steering.monitor import MONITOR_FILE
from steering.monitor_fit import fit_monitor
from steering.profile import Profile
from steering.prompts import Prompt, PromptSet

# PCA-OT maps plain harmful requests to plain benign ones, as the paper does.
METHODS: tuple[Method, ...] = (
    LlmVa(),
    AlphaSteer(),
    OptimalTransport(kinds=("harmful", "benign")),
)


def prompt_set(split: Split) -> PromptSet:
    """A split's prompts as methods want them, 400 of each class."""
    return PromptSet(tuple(Prompt(p.text, p.harmful, p.kind) for p in prompts(split)))


def fit_demo(
    model: Path,
    out: Path,
    *,
    report: Callable[[str], None] = lambda line: None,
    progress: bool = False,
) -> list[Profile]:
    """Fit all profiles and the monitor of the demo model in `model`, and save them to `out`.

    Takes some minutes. `report` is called with lines of progress, `progress` adds bars.
    """
    lm = load_model(str(model), dtype=torch.float32)
    lm = replace(lm, name=DEMO_NAME)
    data = FitData(
        lm,
        prompt_set("fit"),
        prompt_set("selection"),
        reply_tokens=REPLY_TOKENS,
        report=report,
        progress=progress,
    )
    profiles = []
    for method in METHODS:
        report(f"{method.name}: fitting")
        profiles.append(fit_profile(method, data))
    report("monitor: fitting")
    fit_monitor(data, profiles).save(out / MONITOR_FILE)
    for i, profile in enumerate(profiles):
        report(f"{profile.name}: measuring on the test split")
        held_out = measure(lm, profile, progress=progress).to_json()
        profiles[i] = replace(profile, card={**profile.card, "held_out": held_out})
        profiles[i].save(out / f"{profile.name}.safetensors")
    return profiles
