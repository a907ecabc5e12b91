"""Other people's control vectors and LoRA adapters as profiles.

A control vector (llama.cpp, repeng) becomes shifts of the residual stream; a LoRA adapter of the
sublayers' last Linears becomes edits at their outputs, where that is possible.

Not covered: adapters of other modules. An edit acts on hidden states, and those change what is
computed from them before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steering.export.peft import CONFIG
from steering.imports.lora import read_adapter
from steering.imports.vector import read_vector
from steering.models import LanguageModel, ModelFingerprint
from steering.profile import IMPORTED, Profile


def import_profile(
    lm: LanguageModel,
    path: Path | str,
    name: str,
    *,
    strength: float = 1.0,
    red_team: bool = False,
    allow_derived: bool = False,
) -> Profile:
    """Read an adapter or a control vector as a profile of this model.

    Args:
        path: a folder with `adapter_config.json` or one `.gguf`; a `.gguf`; or a `.safetensors`
            with tensors `direction.N` (or `N`), the output of block N.
        strength: the profile's. Control vectors are often unit vectors, meant to be scaled.
        red_team: it removes refusals. A file that Pilothouse exported says so itself.
        allow_derived: of such a file, accept one made for other weights of the same model.

    Raises:
        ValueError: if there is nothing of the kind, it was made for another model, or it is not
            something that edits can do; the message names the tensor or module.
    """
    path = Path(path)
    if path.is_dir() and not (path / CONFIG).is_file():
        vectors = sorted(path.glob("*.gguf"))
        if len(vectors) != 1:
            raise ValueError(f"{path} holds neither {CONFIG} nor exactly one .gguf file")
        path = vectors[0]
    if path.is_dir():
        kind, found = "peft", read_adapter(lm, path)
    elif path.is_file() and path.suffix in (".gguf", ".safetensors"):
        kind, found = "control vector", read_vector(lm, path)
    else:
        raise ValueError(
            f"{path} is not something to import: give an adapter's folder or a control vector as "
            ".gguf or .safetensors (pickle files are never read)"
        )
    if not found.edits:
        raise ValueError(f"{path} changes nothing: all of it is zero")
    _check_base(lm, path, found.said, allow_derived)
    return Profile(
        name=name,
        method=IMPORTED,
        edits=found.edits,
        base=lm.fingerprint,
        strength=strength,
        red_team=red_team or found.said.get("red_team") is True,
        provenance={
            "imported_from": path.name,
            "kind": kind,
            "base_model": lm.name,
            "said": found.said,
            "notes": list(found.notes),
            **found.figures,
        },
        card={"summary": f"Imported from the {kind} {path.name}."},
    )


def _check_base(lm: LanguageModel, path: Path, said: dict[str, Any], allow_derived: bool) -> None:
    """Raise ValueError if a file that Pilothouse exported was made for another model."""
    if "base" not in said:
        return
    try:
        base = ModelFingerprint(**said["base"])
    except TypeError as error:
        raise ValueError(f"{path}: what it says of its base model is damaged: {error}") from None
    reason = base.mismatch(lm.fingerprint, allow_derived=allow_derived)
    if reason is not None:
        raise ValueError(f"{path} does not fit {lm.name}: {reason}")
