"""The demo's baselines and the study that measures them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import steering
from steering.demo.fit import BASELINES
from steering.demo.study import alphasteer_rows, iteration_rows, transport_rows
from steering.models import LanguageModel, load_model
from steering.profile import Profile
from steering.selftest import self_test

DEMO = Path(steering.__path__[0]) / "demo"


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load_model(str(DEMO / "model"), dtype=torch.float32)


@pytest.fixture(scope="module")
def profiles() -> dict[str, Profile]:
    files = [*(DEMO / "profiles").glob("*"), *(DEMO / "baselines").glob("*.safetensors")]
    loaded = [Profile.load(file) for file in files if file.stem != "monitor"]
    return {profile.name: profile for profile in loaded}


def cells(lines: Iterator[str]) -> list[list[str]]:
    """The rows of a Markdown table, without its header."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines][2:]


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_what_its_recipe_says(
    lm: LanguageModel, profiles: dict[str, Profile], name: str
) -> None:
    profile = profiles[name]
    assert profile.method == BASELINES[name].name
    profile.check_base(lm)
    self_test(lm, profile)


def test_the_gate_tells_harmful_prompts_from_benign_ones(
    lm: LanguageModel, profiles: dict[str, Profile]
) -> None:
    rows = cells(alphasteer_rows(lm, profiles, per_kind=16))
    assert {row[0] for row in rows} == {"alphasteer", "alphasteer-plus", "alphasteer-token"}
    assert len(rows) == sum(len(profiles[name].edits) for name in {row[0] for row in rows})
    for row in rows:
        auc, harmful, benign = (float(cell) for cell in row[2:5])
        assert auc > 0.95
        assert harmful > benign


def test_transport_is_measured_at_every_depth(
    lm: LanguageModel, profiles: dict[str, Profile]
) -> None:
    rows = cells(transport_rows(lm, profiles["optimal-transport"], per_kind=2, progress=False))
    depth = len(lm.sites.blocks)
    assert [row[0] for row in rows[:depth]] == [str(block) for block in range(depth)]
    assert [row[0] for row in rows[depth : 2 * depth - 1]] == [
        f"{block} and {block + 1}" for block in range(depth - 1)
    ]
    assert [row[:2] for row in rows[2 * depth - 1 :]] == [["all", "1"], ["7 and 8", "0.5"]]


def test_iterations_start_at_the_unedited_model(profiles: dict[str, Profile]) -> None:
    for name, kept, values in cells(
        iteration_rows({name: profiles[name] for name in ("llm-va", "llm-va-paper")})
    ):
        f1 = [float(value) for value in values.split()]
        assert f1[0] == round(profiles[name].provenance["diagnostics"]["unedited"]["f1"], 3)
        assert f1[int(kept)] == max(f1)
