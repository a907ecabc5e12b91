"""A model without weights is bound and described as the model with them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from server.grammar import GrammarCompiler
from steering.demo import DEMO
from steering.edit import Site
from steering.models import LanguageModel, load_model
from steering.weightless import load_without_weights


def save(lm: LanguageModel, path: Path) -> str:
    lm.model.save_pretrained(path)
    lm.tokenizer.save_pretrained(path)
    return str(path)


def test_all_that_serving_asks_of_a_model_is_the_same_without_weights(
    any_model: LanguageModel, tmp_path: Path
) -> None:
    path = save(any_model, tmp_path / "tiny")
    whole, bare = load_model(path), load_without_weights(path)
    assert bare.fingerprint == whole.fingerprint
    assert (bare.dtype, bare.context_length) == (whole.dtype, whole.context_length)
    assert bare.eos_token_ids == whole.eos_token_ids == {257}
    assert bare.template_kwargs == whole.template_kwargs
    assert bare.encode_prompt("Hi") == whole.encode_prompt("Hi")
    assert bare.sites.hidden_size == whole.sites.hidden_size
    assert len(bare.sites.blocks) == len(whole.sites.blocks)
    with pytest.raises(ValueError, match="blocks"):
        bare.sites.module_at(Site(99, "resid_post"))
    assert all(parameter.is_meta for parameter in bare.model.parameters())


def test_the_dtype_is_the_one_asked_for_or_the_stored_one(
    tiny_llama: LanguageModel, tmp_path: Path
) -> None:
    assert load_without_weights(str(DEMO / "model")).dtype == torch.bfloat16
    assert load_without_weights(str(DEMO / "model"), dtype=torch.float32).dtype == torch.float32
    path = Path(save(tiny_llama, tmp_path / "tiny"))
    config = json.loads((path / "config.json").read_text())
    config.pop("dtype", None)
    (path / "config.json").write_text(json.dumps(config))
    assert load_without_weights(str(path)).dtype == load_model(str(path)).dtype == torch.float32


def test_grammars_need_no_weights() -> None:
    lm = load_without_weights(str(DEMO / "model"))
    grammar = GrammarCompiler(lm)._compile('start: "yes" | "no"')
    allowed = grammar.allowed()
    assert allowed.shape == (lm.model.get_output_embeddings().weight.shape[0],)
    assert 0 < int(allowed.sum()) < len(allowed)


def test_what_cannot_be_loaded_says_why(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no directory"):
        load_without_weights(str(tmp_path / "none"))
    path = Path(save(tiny_llama, tmp_path / "tiny"))
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"there are no \*.safetensors"):
        load_without_weights(str(path))


def test_a_model_of_eight_billion_parameters_takes_no_memory_for_them(
    tiny_llama: LanguageModel, tmp_path: Path
) -> None:
    path = Path(save(tiny_llama, tmp_path / "large"))
    shape = dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    LlamaConfig(**shape).save_pretrained(path)
    program = (
        "import resource, sys; from steering.weightless import load_without_weights;"
        "lm = load_without_weights(sys.argv[1]);"
        "print(sum(p.numel() for p in lm.model.parameters()),"
        " resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
    )
    parameters, kilobytes = map(int, result.stdout.split())
    assert parameters > 8e9
    assert kilobytes < 2**21, "a process with torch and transformers, and nothing of the weights"
