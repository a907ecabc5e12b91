"""Fit the demo's profiles, its baselines and its monitor, every choice made on the selection split.

The test split is read once, at the end, for the profiles' cards.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from steering.demo import DEMO_NAME
from steering.demo.corpus import Split, prompts
from steering.demo.table import REPLY_TOKENS, measure
from steering.fit import fit_profile
from steering.generate import Generator, generate
from steering.methods import FitData, Method
from steering.methods.activation_addition import ActivationAddition
from steering.methods.affine_concept_editing import AffineConceptEditing
from steering.methods.alphasteer import AlphaSteer
from steering.methods.alphasteer_plus import AlphaSteerPlus
from steering.methods.cast import Cast
from steering.methods.directional_ablation import DirectionalAblation
from steering.methods.leace import Leace
from steering.methods.llm_va import LlmVa
from steering.methods.optimal_transport import OptimalTransport
from steering.methods.raw import Raw
from steering.models import LanguageModel, load_model
from steering.monitor import MONITOR_FILE
from steering.monitor_fit import fit_monitor
from steering.profile import Profile
from steering.prompts import Prompt, PromptSet
from steering.resume import CACHE, keep_in

# PCA-OT maps plain harmful requests to plain benign ones, as the paper does.
METHODS: tuple[Method, ...] = (
    LlmVa(),
    AlphaSteer(),
    OptimalTransport(kinds=("harmful", "benign")),
)
# What the profiles are compared with; not served by default. All with their own defaults, but for
# what a name says.
BASELINES: dict[str, Method] = {
    "activation-addition": ActivationAddition(),
    "directional-ablation": DirectionalAblation(),
    "affine-concept-editing": AffineConceptEditing(),
    "leace": Leace(),
    "cast": Cast(),
    "alphasteer-plus": AlphaSteerPlus(),
    "alphasteer-token": AlphaSteer(gate="token"),
    "llm-va-paper": LlmVa.preset("paper"),
}


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

    Takes some minutes. `report` is called with lines of progress, `progress` adds bars. Raw is
    among the profiles for its card, which those of the others are compared with.
    """
    data = _data(_load(model), report=report, progress=progress)
    profiles = []
    for method in METHODS:
        report(f"{method.name}: fitting")
        profiles.append(fit_profile(method, data))
    report("monitor: fitting")
    fit_monitor(data, profiles).save(out / MONITOR_FILE)
    profiles.insert(0, fit_profile(Raw(), data))
    for i, profile in enumerate(profiles):
        report(f"{profile.name}: measuring on the test split")
        held_out = measure(data.lm, profile, progress=progress).to_json()
        profiles[i] = replace(profile, card={**profile.card, "held_out": held_out})
        profiles[i].save(out / f"{profile.name}.safetensors")
    return profiles


def fit_baselines(
    model: Path,
    out: Path,
    names: Collection[str] = tuple(BASELINES),
    *,
    generator: Generator = generate,
    report: Callable[[str], None] = lambda line: None,
    progress: bool = False,
) -> None:
    """Fit these `BASELINES` on the demo model in `model` and save them to `out`; resumes."""
    data = _data(_load(model), generator=generator, report=report, progress=progress)
    data = keep_in(out / CACHE, data)
    for name in names:
        report(f"{name}: fitting")
        profile = fit_profile(BASELINES[name], data, name=name)
        profile.save(out / f"{name}.safetensors")


def _load(model: Path) -> LanguageModel:
    # Its path is this machine's business.
    return replace(load_model(str(model), dtype=torch.float32), name=DEMO_NAME)


def _data(lm: LanguageModel, **more: Any) -> FitData:
    return FitData(
        lm, prompt_set("fit"), prompt_set("selection"), reply_tokens=REPLY_TOKENS, **more
    )
