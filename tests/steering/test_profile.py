from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from steering.edit import Edit
from steering.models import LanguageModel
from steering.profile import IMPORTED, RAW, Profile, ProfileError
from tests.conftest import make_model
from tests.steering.edits import random_edit, random_gate


def make_profile(lm: LanguageModel, *edits: Edit) -> Profile:
    return Profile(
        name="tilted",
        method="raw",
        edits=edits or (random_edit("1.resid_post", 2), random_edit("2.mlp_out", 1, seed=1)),
        base=lm.fingerprint,
        strength=0.5,
        red_team=True,
        provenance={"seed": 3},
        card={"summary": "A test."},
    )


def test_a_saved_profile_comes_back_whole(tmp_path: Path, tiny_llama: LanguageModel) -> None:
    gate = random_gate("0.attn_out", reduce="last_prompt_token", comparator=">", threshold=0.5)
    profile = make_profile(tiny_llama, random_edit("1.resid_post", 2, gate=gate, phase="prompt"))
    loaded = Profile.load(profile.save(tmp_path / "deep" / "tilted.safetensors"))
    assert loaded.fingerprint == profile.fingerprint
    for name in ("name", "method", "base", "strength", "red_team", "provenance", "card"):
        assert getattr(loaded, name) == getattr(profile, name)


def test_an_imported_profile_comes_back_though_no_method_here_fitted_it(
    tmp_path: Path, tiny_llama: LanguageModel
) -> None:
    profile = replace(make_profile(tiny_llama), method=IMPORTED)
    loaded = Profile.load(profile.save(tmp_path / "tilted.safetensors"))
    assert loaded.method == IMPORTED and loaded.fingerprint == profile.fingerprint


def test_the_file_is_the_same_bytes_for_the_same_profile(
    tmp_path: Path, tiny_llama: LanguageModel
) -> None:
    files = [make_profile(tiny_llama).save(tmp_path / f"{i}.safetensors") for i in range(2)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_file_may_be_read_by_whom_the_umask_lets(
    tmp_path: Path, tiny_llama: LanguageModel
) -> None:
    path = make_profile(tiny_llama).save(tmp_path / "p.safetensors")
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_profile_for_another_model_is_refused_with_the_reason(tiny_llama: LanguageModel) -> None:
    profile = make_profile(tiny_llama)
    profile.check_base(tiny_llama)
    with pytest.raises(ProfileError, match="architecture llama, this one has qwen2"):
        profile.check_base(make_model("qwen2"))
    with pytest.raises(ProfileError, match="allow-derived-base"):
        profile.check_base(make_model("llama", seed=1))
    profile.check_base(make_model("llama", seed=1), allow_derived=True)


def test_another_tokenizer_or_template_is_refused_even_for_derived_models(
    tiny_llama: LanguageModel,
) -> None:
    other = replace(tiny_llama, fingerprint=replace(tiny_llama.fingerprint, template="other"))
    with pytest.raises(ProfileError, match="template"):
        make_profile(tiny_llama).check_base(other, allow_derived=True)


def test_a_site_the_model_lacks_is_refused(tiny_llama: LanguageModel) -> None:
    with pytest.raises(ProfileError, match="4 blocks"):
        make_profile(tiny_llama, random_edit("4.resid_post")).check_base(tiny_llama)


def test_a_truncated_file_is_refused(tmp_path: Path, tiny_llama: LanguageModel) -> None:
    path = make_profile(tiny_llama).save(tmp_path / "p.safetensors")
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ProfileError, match="safetensors"):
            Profile.load(path)


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    for write in (
        lambda path: path.write_bytes(pickle.dumps(Bomb())),
        lambda path: torch.save({"x": Bomb()}, path),
    ):
        path = tmp_path / "p.safetensors"
        write(path)
        with pytest.raises(ProfileError, match="never read"):
            Profile.load(path)
    assert not (tmp_path / "exploded").exists()


def _tamper(path: Path, **header: object) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["pilothouse"])
    save_file(load_file(path), path, {"pilothouse": json.dumps({**metadata, **header})})


def test_wrong_shapes_and_values_that_are_not_finite_are_refused(
    tmp_path: Path, tiny_llama: LanguageModel
) -> None:
    path = make_profile(tiny_llama).save(tmp_path / "p.safetensors")
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    good = load_file(path)
    for name, tensor, message in (
        ("edit.0.read", torch.zeros(3, 2), "read and write"),
        ("edit.0.shift", torch.full((64,), float("nan")), "not finite"),
    ):
        save_file({**good, name: tensor}, path, metadata)
        with pytest.raises(ProfileError, match=message):
            Profile.load(path)
    save_file({k: v for k, v in good.items() if k != "edit.1.write"}, path, metadata)
    with pytest.raises(ProfileError, match="write"):
        Profile.load(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"format": 99}, "format 99"),
        ({"method": "telepathy"}, "telepathy"),
        ({"name": "Bad Name"}, "not a profile name"),
        ({"edits": [{}, {}]}, "missing"),
        ({"edits": 3}, "edits must be a list"),
        ({"edits": {}}, "edits must be a list"),
        ({"edits": []}, "tensors of edits 0, 1"),
        ({"base": None}, "base model"),
        ({"strength": float("nan")}, "finite"),
        ({"strength": "strong"}, "not a sound profile"),
    ],
)
def test_an_unsound_header_is_refused(
    tmp_path: Path, tiny_llama: LanguageModel, header: dict[str, object], message: str
) -> None:
    path = make_profile(tiny_llama).save(tmp_path / "p.safetensors")
    _tamper(path, **header)
    with pytest.raises(ProfileError, match=message):
        Profile.load(path)


def test_a_safetensors_file_that_is_no_profile_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "m.safetensors")
    with pytest.raises(ProfileError, match="not a profile"):
        Profile.load(tmp_path / "m.safetensors")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="no profile file"):
        Profile.load(tmp_path / "none.safetensors")


def test_raw_has_no_edits_and_an_empty_fingerprint(tiny_llama: LanguageModel) -> None:
    RAW.check_base(tiny_llama)
    assert RAW.fingerprint == "" and RAW.applied() == ()
    assert make_profile(tiny_llama).applied(0.0) == ()
