"""Edits act on activations, so a model whose weights are quantised takes them too."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from steering.demo import DEMO
from steering.demo.corpus import prompts
from steering.edit import AppliedEdit
from tests.server.engine.running import ask, ids, prompt_of, stream_all
from tests.vllm.processes import Server
from tests.vllm.serving import MIXTURE, alone, profiles_of, save, serving

EIGHT_BITS = {"num_bits": 8, "type": "int", "symmetric": True}
CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**EIGHT_BITS, "strategy": "channel", "dynamic": False},
            "input_activations": {**EIGHT_BITS, "strategy": "token", "dynamic": True},
        }
    },
}


def quantise(source: Path, target: Path) -> None:
    """The model with 8-bit weights and activations, a scale per output channel and per token."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    kept = next(iter(tensors.values())).dtype
    for name in [n for n in tensors if n.endswith("proj.weight")]:
        weight = tensors[name].float()
        scale = weight.abs().amax(1, keepdim=True) / 127
        tensors[name] = (weight / scale).round().to(torch.int8)
        tensors[f"{name}_scale"] = scale.to(kept)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIG}))


@pytest.mark.matrix
def test_a_quantised_model_is_edited_exactly_and_otherwise_left_alone(tmp_path: Path) -> None:
    """The self-test at the start compares every site with the edit's definition, in bfloat16."""
    lm = save("llama", tmp_path / "whole")
    quantise(tmp_path / "whole", tmp_path / "quantised")
    prompt = prompt_of(20)
    off = [AppliedEdit(a.edit, 0.0) for a in MIXTURE["sublayers"]]
    requests = [ask(prompt), ask(prompt, off), ask(prompt, MIXTURE["sublayers"])]
    with serving(
        lm, tmp_path / "quantised", profiles_of(lm), dtype="bfloat16", enforce_eager=True
    ) as engine:
        raw, zero, edited = alone(engine, requests)
        assert ids(stream_all(engine, requests[2:])[0]) == ids(edited)
    assert [(t.token_id, t.logprob) for t in raw] == [(t.token_id, t.logprob) for t in zero]
    assert ids(edited) != ids(raw)


def outcomes(client: openai.OpenAI, model: str, texts: list[str]) -> list[str]:
    def one(text: str) -> str:
        reply = client.chat.completions.create(
            model=model, temperature=0, messages=[{"role": "user", "content": text}]
        )
        return str(reply.steering["outcome"])  # type: ignore[attr-defined]

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, texts))


@pytest.mark.matrix
def test_llm_va_does_to_the_quantised_demo_what_it_does_to_the_demo(tmp_path: Path) -> None:
    """Its change of the weights, as a change of the activations: no weight is touched."""
    quantise(DEMO / "model", tmp_path / "demo")
    arguments = (
        "--engine", "vllm", "--model", tmp_path / "demo", "--profile", DEMO / "profiles",
        "--enforce-eager", "--max-num-seqs", 8,
    )  # fmt: skip
    with pytest.raises(AssertionError, match="--allow-derived-base"):
        Server(*arguments)
    texts = [prompt.text for prompt in prompts("selection", per_kind=8)]
    found: dict[str, list[str]] = {}
    for name, asked in (("quantised", (*arguments, "--allow-derived-base")), ("whole", ())):
        server = Server(*asked)
        try:
            for profile in ("raw", "llm-va"):
                found[f"{name} {profile}"] = outcomes(server.client, f"demo:{profile}", texts)
        finally:
            server.close()
    changed = [
        one != other for one, other in zip(found["whole raw"], found["whole llm-va"], strict=True)
    ]
    assert any(changed)
    for profile in ("raw", "llm-va"):
        same = [
            one == other
            for one, other in zip(
                found[f"whole {profile}"], found[f"quantised {profile}"], strict=True
            )
        ]
        assert sum(same) >= 0.9 * len(texts), (profile, found)
