"""A language model without its weights, for those whose weights are in other processes.

It takes next to no memory and computes nothing; a profile or a monitor is bound to it as to the
whole model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from steering.models import (
    LOADING_ERRORS,
    LanguageModel,
    assemble,
    check_directory,
    not_loaded,
    snapshot_directory,
    weight_files,
)


def load_without_weights(
    name: str, *, dtype: torch.dtype | str = "auto", revision: str | None = None
) -> LanguageModel:
    """What `steering.models.load_model` gives, its model on the meta device: structure, dtype,
    fingerprint, tokenizer and end tokens are those of the files.

    A model of the hub is downloaded whole. Raises as `load_model` does, also where there is no
    safetensors file to take a digest of.
    """
    check_directory(name)
    try:
        path = name if Path(name).is_dir() else snapshot_directory(name, revision, download=True)
        config = AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        if not (files := weight_files(Path(path))):
            raise OSError("there are no *.safetensors")
        if dtype == "auto":
            dtype = config.get_text_config().dtype or _stored_dtype(files[0])
        from_config: Any = AutoModelForCausalLM.from_config  # the stubs know no types
        with torch.device("meta"):
            model = from_config(config, dtype=dtype).eval()
        if (Path(path) / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(path)
    except LOADING_ERRORS as error:
        raise not_loaded(name, error) from error
    return assemble(name, model, tokenizer, path, None if path == name else Path(path).name)


def _stored_dtype(file: Path) -> torch.dtype:
    """Of the first floating tensor, as transformers does for a config that does not say."""
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118, it is no dictionary
            if (dtype := tensors.get_tensor(name).dtype).is_floating_point:
                return cast(torch.dtype, dtype)
    raise OSError(f"{file.name} holds no weights")
