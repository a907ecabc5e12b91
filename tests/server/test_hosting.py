"""From settings to a host: the monitor that is found, and what it may still read."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.engine.local import LocalEngine
from server.hosting import open_host
from server.loading import steer_sites
from server.settings import load_settings
from steering.edit import Edit, Site
from steering.models import LanguageModel
from steering.monitor import Monitor, Probe
from steering.profile import Profile
from tests.server.fakes import post


def make_monitor(lm: LanguageModel, early_auroc: float = 0.8) -> Monitor:
    d = lm.sites.hidden_size

    def probe(layer: int, auroc: float) -> Probe:
        return Probe(Site(layer, "resid_post"), torch.ones(d) / d, 0.1, auroc, 0.01)

    return Monitor(
        base=lm.fingerprint,
        benign=(probe(0, early_auroc), probe(2, 0.9)),
        answer={"": probe(3, 0.9)},
        refusal_token_ids=(1, 2, 3),
    )


def rank_one(lm: LanguageModel) -> Profile:
    d = lm.sites.hidden_size
    edit = Edit(Site(1, "mlp_out"), torch.ones(d, 1) / d, torch.ones(d, 1) / d, torch.zeros(d))
    return Profile("bold", "llm_va", edits=(edit,), base=lm.fingerprint)


def test_the_monitor_beside_the_profiles_gives_replies_their_scores(
    model_path: Path, saved: LanguageModel, tmp_path: Path
) -> None:
    rank_one(saved).save(tmp_path / "bold.safetensors")
    make_monitor(saved).save(tmp_path / "monitor.safetensors")
    host = open_host(load_settings({"model": str(model_path), "profile": [str(tmp_path)]}))
    assert host.profiles.names == ["raw", "bold"]
    receipt = post(host=host, model="tiny", max_tokens=3).json()["steering"]
    for score in ("refusal_score", "answer_probability", "benign_probability"):
        assert isinstance(receipt[score], float), score
    assert host.prompt_class(0.1) == "harmful" and host.prompt_class(None) == "unknown"


def test_a_profile_without_a_probe_of_its_own_gets_no_answer_probability(
    model_path: Path, saved: LanguageModel, tmp_path: Path
) -> None:
    rank_one(saved).save(tmp_path / "bold.safetensors")
    make_monitor(saved).save(tmp_path / "monitor.safetensors")
    host = open_host(load_settings({"model": str(model_path), "profile": [str(tmp_path)]}))
    receipt = post(host=host, model="tiny:bold", max_tokens=3).json()["steering"]
    assert receipt["answer_probability"] is None
    assert isinstance(receipt["benign_probability"], float)


def test_a_monitor_of_other_weights_is_refused_or_with_permission_silent(
    model_path: Path, saved: LanguageModel, tmp_path: Path
) -> None:
    base = replace(saved.fingerprint, weights="0" * 64)
    file = replace(make_monitor(saved), base=base).save(tmp_path / "m.safetensors")
    flags = {"model": str(model_path), "monitor": str(file)}
    with pytest.raises(ValueError, match="--allow-derived-base"):
        open_host(load_settings(flags))
    assert open_host(load_settings({**flags, "allow_derived_base": True})).monitor is None


@pytest.mark.parametrize(("early_auroc", "layers"), [(0.8, []), (0.89, [0])])
def test_under_a_fold_a_probe_is_read_only_before_the_folded_edits_and_if_it_is_good(
    early_auroc: float, layers: list[int], model_path: Path, saved: LanguageModel, tmp_path: Path
) -> None:
    rank_one(saved).save(tmp_path / "bold.safetensors")
    make_monitor(saved, early_auroc).save(tmp_path / "monitor.safetensors")
    host = open_host(
        load_settings({"model": str(model_path), "profile": [str(tmp_path)], "fold": "bold"})
    )
    assert host.monitor is not None and isinstance(host.engine, LocalEngine)
    assert [probe.site.layer for probe in host.monitor.benign] == layers
    receipt = post(host=host, max_tokens=3).json()["steering"]
    assert receipt["profile"] == "bold" and (receipt["benign_probability"] is not None) == bool(
        layers
    )


def test_a_model_that_can_never_answer_does_not_start(
    model_path: Path, tiny_llama: LanguageModel, tmp_path: Path
) -> None:
    broken = tmp_path / "nan"
    shutil.copytree(model_path, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], torch.nan)
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="not finite for a plain prompt"):
        open_host(load_settings({"model": str(broken)}))
    silent = tmp_path / "silent"
    shutil.copytree(model_path, silent)
    (silent / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        open_host(load_settings({"model": str(silent)}))


def test_steer_sites_are_named_one_by_one_or_for_every_layer(tiny_llama: LanguageModel) -> None:
    one, every = Site(1, "attn_out"), [Site(layer, "resid_post") for layer in range(4)]
    assert steer_sites(["1.attn_out", "*.resid_post", "2.resid_post"], tiny_llama) == (one, *every)
    for text, says in (("9.attn_out", "4 blocks"), ("*", "LAYER.POINT"), ("*.nose", "LAYER.POINT")):
        with pytest.raises(ValueError, match=says) as error:
            steer_sites([text], tiny_llama)
        assert f"--steer-site {text}" in str(error.value)
