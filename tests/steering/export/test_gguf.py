"""Control vectors: llama.cpp's layout, and back again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from steering.edit import Edit, Gate, Site
from steering.imports import import_profile
from steering.models import LanguageModel
from steering.profile import ProfileError
from tests.conftest import make_model
from tests.steering.export.forms import delta, export, logits, profile_of, shift

gguf = pytest.importorskip("gguf")

SHIFTS = [
    shift(Site(1, "resid_post"), 1),
    shift(Site(2, "resid_pre"), 2),  # the same place
    shift(Site(3, "resid_post"), 3),
]


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    reader = gguf.GGUFReader(path)
    return {n: f.contents() for n, f in reader.fields.items()}, {t.name: t for t in reader.tensors}


def write(path: Path, directions: dict[str, Any], hint: str = "llama") -> Path:
    """As repeng's export_gguf writes it."""
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(directions))
    for name, value in directions.items():
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_vector_has_llama_cpps_layout(tmp_path: Path) -> None:
    lm = make_model("mistral")
    export(lm, profile_of(lm, SHIFTS, strength=0.5), "gguf", tmp_path / "out")
    fields, tensors = contents(tmp_path / "out" / "some.gguf")
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama"
    assert fields["controlvector.layer_count"] == 3
    assert sorted(tensors) == ["direction.1", "direction.2", "direction.3"]
    for layer, expected in {
        1: 0.5 * (SHIFTS[0].shift + SHIFTS[1].shift),
        2: torch.zeros(64),
        3: 0.5 * SHIFTS[2].shift,
    }.items():
        tensor = tensors[f"direction.{layer}"]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        torch.testing.assert_close(torch.tensor(tensor.data), expected)


def test_a_vector_comes_back_as_the_same_change(any_model: LanguageModel, tmp_path: Path) -> None:
    profile = profile_of(any_model, SHIFTS, strength=0.5, red_team=True)
    exported = export(any_model, profile, "gguf", tmp_path / "out")
    assert exported.equivalence.max_logit_difference < 1e-4 * exported.equivalence.largest_logit
    back = import_profile(any_model, tmp_path / "out", "back")
    assert [str(edit.site) for edit in back.edits] == ["1.resid_post", "3.resid_post"]
    assert back.red_team and back.provenance["said"]["profile"] == "some"
    hook = logits(any_model, profile.applied())
    torch.testing.assert_close(logits(any_model, back.applied()), hook, rtol=1e-4, atol=1e-4)


GATE = Gate(Site(0, "resid_pre"), torch.ones(64))
AT = Site(2, "resid_post")
REFUSED: list[tuple[str, Edit]] = [
    ("a shift at block 0 is not a GGUF vector.*no format can", shift(Site(0, "resid_post"))),
    ("a shift at block 0 is not a GGUF vector", shift(Site(1, "resid_pre"))),
    ("no gate", shift(AT, gate=GATE)),
    ("phase prompt", shift(AT, phase="prompt")),
    ("first token", shift(AT, skip_first_token=True)),
    ("linear part", delta(AT)),
    ("residual stream only", shift(Site(2, "mlp_out"))),
    ("linear part.*--format hf or peft can express it", delta(Site(2, "mlp_out"))),
]


@pytest.mark.parametrize(("reason", "edit"), REFUSED)
def test_what_is_no_constant_vector_is_refused_with_the_reason(
    tiny_llama: LanguageModel, tmp_path: Path, reason: str, edit: Edit
) -> None:
    profile = profile_of(tiny_llama, [edit])
    with pytest.raises(ProfileError, match=rf"profile some cannot be exported as gguf.*{reason}"):
        export(tiny_llama, profile, "gguf", tmp_path / "out")


def test_repengs_vectors_are_imported(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    values = {layer: torch.randn(64) for layer in (0, 2)}
    named = {f"direction.{layer}": value for layer, value in values.items()}
    plain = {str(layer): value for layer, value in values.items()}
    write(tmp_path / "v.gguf", named)
    save_file(plain, tmp_path / "v.safetensors", {"model_type": "llama"})
    for path in (tmp_path / "v.gguf", tmp_path / "v.safetensors"):
        profile = import_profile(tiny_llama, path, "repeng", strength=2.0)
        assert profile.strength == 2.0 and profile.method == "imported"
        for edit, (layer, value) in zip(profile.edits, values.items(), strict=True):
            assert edit.site == Site(layer, "resid_post") and torch.equal(edit.shift, value)


UNFIT: list[tuple[str, dict[str, Any], str]] = [
    ("made for a qwen2 model", {"direction.1": torch.ones(64)}, "qwen2"),
    ("has 4 blocks", {"direction.4": torch.ones(64)}, "llama"),
    ("hidden size 64", {"direction.1": torch.ones(32)}, "llama"),
    ("named direction.N", {"direction.-1": torch.ones(64)}, "llama"),
    ("all of it is zero", {"direction.1": torch.zeros(64)}, "llama"),
    ("direction.2 .* not finite", {"direction.2": torch.full((64,), torch.nan)}, "llama"),
    ("two directions of block 1", {"direction.1": torch.ones(64), "1": torch.ones(64)}, "llama"),
]


@pytest.mark.parametrize(("reason", "directions", "hint"), UNFIT)
def test_vectors_that_do_not_fit_the_model_are_refused(
    tiny_llama: LanguageModel, tmp_path: Path, reason: str, directions: dict[str, Any], hint: str
) -> None:
    path = write(tmp_path / "v.gguf", directions, hint)
    with pytest.raises(ValueError, match=reason):
        import_profile(tiny_llama, path, "repeng")


def test_other_files_are_refused(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "v.pt").write_bytes(b"pickle")
    (tmp_path / "v.gguf").write_bytes(b"not gguf at all")
    (tmp_path / "empty").mkdir()
    for name, reason in {
        "v.pt": "pickle files are never read",
        "v.gguf": "not a GGUF file",
        "empty": "neither adapter_config.json",
        "missing.gguf": "not something to import",
    }.items():
        with pytest.raises(ValueError, match=reason):
            import_profile(tiny_llama, tmp_path / name, "other")
