"""Adapters: the real peft loads them, and they come back as the profile that they were."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from steering.edit import Site
from steering.fold import folded_copy
from steering.imports import import_profile
from steering.models import LanguageModel, find_sites, fingerprint_model
from steering.profile import ProfileError
from tests.conftest import FAMILIES, make_model
from tests.steering.export.forms import (
    PROMPTS,
    SITES,
    ablation,
    delta,
    deltas,
    export,
    logits,
    profile_of,
    shift,
)

peft = pytest.importorskip("peft")
# peft reads an attribute that this transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@torch.inference_mode()
def adapted(lm: LanguageModel, folder: Path) -> Tensor:
    """Logits under the adapter, loaded by the real peft; `[T, V]`."""
    model = peft.PeftModel.from_pretrained(copy.deepcopy(lm.model), folder)
    ids = [torch.tensor([lm.encode_prompt(text)]) for text in PROMPTS]
    return torch.cat([model(i).logits[0].float() for i in ids])


def with_bias(lm: LanguageModel) -> LanguageModel:
    model: Any = copy.deepcopy(lm.model)
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.bias = nn.Parameter(torch.randn(64, generator=torch.Generator().manual_seed(1)))
    return replace(
        lm, model=model, sites=find_sites(model), fingerprint=fingerprint_model(model, lm.tokenizer)
    )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_hook_fold_and_adapter_of_one_profile_agree(family: str, tmp_path: Path) -> None:
    lm = make_model(family)
    profile = profile_of(lm, deltas(), strength=-0.6)
    hook = logits(lm, profile.applied())
    exported = export(lm, profile, "peft", tmp_path / "adapter")
    torch.testing.assert_close(adapted(lm, tmp_path / "adapter"), hook, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(folded_copy(lm, profile)), hook, rtol=1e-4, atol=1e-4)
    assert exported.equivalence.max_logit_difference < 1e-4 * exported.equivalence.largest_logit
    assert exported.equivalence.same_replies == exported.equivalence.replies
    assert "the rank is exact" in exported.notes


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_an_adapter_comes_back_as_the_same_change(family: str, tmp_path: Path) -> None:
    lm = make_model(family)
    profile = profile_of(lm, deltas(), strength=0.7, red_team=True)
    export(lm, profile, "peft", tmp_path / "adapter")
    back = import_profile(lm, tmp_path / "adapter", "back")
    assert [edit.site for edit in back.edits] == SITES
    assert back.red_team and not any(edit.has_shift for edit in back.edits)
    for site in SITES:
        found, expected = (
            sum(
                a.strength * a.edit.write @ a.edit.read.mT
                for a in p.applied()
                if a.edit.site == site
            )
            for p in (back, profile)
        )
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    hook = logits(lm, profile.applied())
    torch.testing.assert_close(logits(lm, back.applied()), hook, rtol=1e-3, atol=1e-3)


def test_every_module_has_one_rank_and_a_scale_of_one(tmp_path: Path) -> None:
    lm = make_model("llama")
    export(lm, profile_of(lm, deltas()), "peft", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert config["r"] == config["lora_alpha"] == 5  # ranks 2 and 3 at one site
    assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {5}
    assert {t.shape[1] for n, t in tensors.items() if "lora_B" in n} == {5}
    assert config["rank_pattern"] == {} and len(config["target_modules"]) == 4
    everywhere = [delta(Site(i, "attn_out")) for i in range(4)]
    export(lm, profile_of(lm, everywhere), "peft", tmp_path / "all")
    config = json.loads((tmp_path / "all" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["o_proj"]


def test_a_rank_limit_truncates_and_states_the_error(tmp_path: Path) -> None:
    lm = make_model("llama")
    edit = delta(SITES[0], 4)
    exported = export(lm, profile_of(lm, [edit]), "peft", tmp_path / "out", max_rank=2)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    a, b = (next(t for n, t in tensors.items() if part in n) for part in ("lora_A", "lora_B"))
    exact = edit.write @ (edit.read.mT @ lm.sites.last_linear(SITES[0]).weight.detach())
    values = torch.linalg.svdvals(exact)
    error = float((exact - b @ a).norm() / exact.norm())
    assert error == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-3)
    assert any(f"up to {error:.1%}" in note for note in exported.notes)


def test_a_bias_is_mapped_by_a_bias_of_the_adapter(tmp_path: Path) -> None:
    lm = with_bias(make_model("qwen2"))
    profile = profile_of(lm, deltas())
    exported = export(lm, profile, "peft", tmp_path / "out")
    assert any("lora_bias" in note for note in exported.notes)
    hook = logits(lm, profile.applied())
    torch.testing.assert_close(adapted(lm, tmp_path / "out"), hook, rtol=1e-4, atol=1e-4)
    back = import_profile(lm, tmp_path / "out", "back")
    assert not any(edit.has_shift for edit in back.edits)
    torch.testing.assert_close(logits(lm, back.applied()), hook, rtol=1e-3, atol=1e-3)


def test_an_adapter_that_leaves_the_bias_alone_keeps_it_so(tmp_path: Path) -> None:
    plain, lm = make_model("qwen2"), with_bias(make_model("qwen2"))
    export(plain, profile_of(plain, deltas()), "peft", tmp_path / "out")
    back = import_profile(lm, tmp_path / "out", "back", allow_derived=True)
    assert all(edit.has_shift for edit in back.edits)
    found = logits(lm, back.applied())
    torch.testing.assert_close(found, adapted(lm, tmp_path / "out"), rtol=1e-3, atol=1e-3)


def peft_adapter(lm: LanguageModel, folder: Path, **config: Any) -> None:
    """An adapter as training leaves it, written by the real peft."""
    torch.manual_seed(0)
    lora = peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **config)
    peft.get_peft_model(copy.deepcopy(lm.model), lora).save_pretrained(folder)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_that_peft_wrote_is_imported(rslora: bool, tmp_path: Path) -> None:
    lm = make_model("llama")
    peft_adapter(
        lm,
        tmp_path,
        target_modules=["o_proj"],
        r=2,
        lora_alpha=6,
        use_rslora=rslora,
        rank_pattern={"layers.1.self_attn.o_proj": 3},
        alpha_pattern={"layers.2.self_attn.o_proj": 1},
    )
    profile = import_profile(lm, tmp_path, "trained")
    assert profile.provenance["largest_share_lost"] < 1e-3
    expected = adapted(lm, tmp_path)
    torch.testing.assert_close(logits(lm, profile.applied()), expected, rtol=1e-3, atol=1e-3)


REFUSED: list[tuple[str, dict[str, Any]]] = [
    (r"changes model\.layers\.0\.self_attn\.q_proj; only the last", {"target_modules": ["q_proj"]}),
    # More inputs than outputs: what the adapter reads is not in the output.
    (r"mlp\.down_proj: \d+% of the adapter's change", {"target_modules": ["down_proj"]}),
    ("use_dora", {"target_modules": ["o_proj"], "use_dora": True}),
    ("modules_to_save", {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]}),
]


@pytest.mark.parametrize(("reason", "config"), REFUSED)
def test_adapters_that_no_edit_equals_are_refused(
    reason: str, config: dict[str, Any], tmp_path: Path
) -> None:
    lm = make_model("llama")
    peft_adapter(lm, tmp_path, **config)
    with pytest.raises(ValueError, match=reason):
        import_profile(lm, tmp_path, "trained")


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    lm = make_model("llama")
    export(lm, profile_of(lm, deltas()), "peft", tmp_path / "out")
    path = tmp_path / "out" / "adapter_model.safetensors"
    tensors = {name: t[:, :-1] if "lora_A" in name else t for name, t in load_file(path).items()}
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    with pytest.raises(ValueError, match="do not fit its weight"):
        import_profile(lm, tmp_path / "out", "back")


BROKEN: list[tuple[str, str, bytes]] = [
    ("does not hold a JSON object", "adapter_config.json", b"[]"),
    ("cannot be read as JSON", "adapter_config.json", b"\xff\xfe\xff"),
    ("r is None", "adapter_config.json", b'{"peft_type": "LORA", "lora_alpha": 2}'),
    (
        "lora_alpha is inf",
        "adapter_config.json",
        b'{"peft_type": "LORA", "r": 2, "lora_alpha": Infinity}',
    ),
    (
        r"alpha_pattern.*'\(': missing \)",
        "adapter_config.json",
        b'{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "alpha_pattern": {"(": 1}}',
    ),
    ("IA3 adapter", "adapter_config.json", b'{"peft_type": "IA3"}'),
    (r"pilothouse\.json does not hold", "pilothouse.json", b"[1]"),
    ("what it says of its base model is damaged", "pilothouse.json", b'{"base": {"a": 1}}'),
    ("not a whole safetensors file", "adapter_model.safetensors", b"\x80\x04junk"),
]


@pytest.mark.parametrize(("reason", "name", "content"), BROKEN)
def test_broken_adapters_are_refused_by_name(
    reason: str, name: str, content: bytes, tmp_path: Path
) -> None:
    lm = make_model("llama")
    export(lm, profile_of(lm, deltas()), "peft", tmp_path / "out")
    (tmp_path / "out" / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        import_profile(lm, tmp_path / "out", "back")


def test_pickled_weights_are_refused_with_what_to_do(tmp_path: Path) -> None:
    lm = make_model("llama")
    export(lm, profile_of(lm, deltas()), "peft", tmp_path / "out")
    weights = tmp_path / "out" / "adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match="a pickle, which is never read: if you trust it"):
        import_profile(lm, tmp_path / "out", "back")


@pytest.mark.parametrize(
    ("reason", "spoil"),
    [
        ("lora_A.weight holds values that are not finite", lambda t: t * float("nan")),
        ("lora_A.weight holds torch.int32", lambda t: t.int()),
    ],
)
def test_tensors_that_are_no_numbers_are_refused_by_name(
    reason: str, spoil: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    lm = make_model("llama")
    export(lm, profile_of(lm, deltas()), "peft", tmp_path / "out")
    path = tmp_path / "out" / "adapter_model.safetensors"
    tensors = {name: spoil(t) if "A.w" in name else t for name, t in load_file(path).items()}
    save_file(tensors, path)
    with pytest.raises(ValueError, match=reason):
        import_profile(lm, tmp_path / "out", "back")


def test_an_adapter_of_ours_belongs_to_its_base_model(tmp_path: Path) -> None:
    lm, other = make_model("llama"), make_model("llama", seed=1)
    export(lm, profile_of(lm, [delta(Site(1, "attn_out"))]), "peft", tmp_path / "out")
    with pytest.raises(ValueError, match="fitted on other weights"):
        import_profile(other, tmp_path / "out", "back")
    assert import_profile(other, tmp_path / "out", "back", allow_derived=True).edits
    with pytest.raises(ValueError, match="fitted for a model with architecture"):
        import_profile(make_model("mistral"), tmp_path / "out", "back", allow_derived=True)
    # Others say no more than a name.
    (tmp_path / "out" / "pilothouse.json").unlink()
    assert import_profile(lm, tmp_path / "out", "back").provenance["notes"] == []
    config = tmp_path / "out" / "adapter_config.json"
    config.write_text(config.read_text().replace("tiny-llama", "someone/else"))
    (note,) = import_profile(lm, tmp_path / "out", "back").provenance["notes"]
    assert "trained on someone/else, this is tiny-llama" in note


def test_what_an_adapter_cannot_hold_names_the_format_that_can(tmp_path: Path) -> None:
    lm = make_model("llama")
    with pytest.raises(ProfileError, match=r"token embedding.*--format hf can express it"):
        export(lm, profile_of(lm, ablation()), "peft", tmp_path / "out")
    with pytest.raises(ProfileError, match=r"shift.*--format gguf can express it"):
        export(lm, profile_of(lm, [shift(Site(2, "resid_post"))]), "peft", tmp_path / "out")
