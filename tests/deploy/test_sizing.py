"""The arithmetic of the README's "Beyond one machine", and that the README has it as printed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from deploy.sizing import GPUS, MODELS, Assumptions, edit_bytes, edit_operations, replica
from tests.deploy.conftest import DEPLOY, ROOT

BASE = Assumptions(
    prompt=512,
    reply=256,
    rate=1000.0,
    gpus=1,
    of_operations=0.5,
    of_bandwidth=0.6,
    of_memory=0.9,
    reserve=4e9,
    load=0.7,
    seqs=256,
    columns=256,
    sites=24,
)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_as_many_weights_as_transformers_counts(name: str) -> None:
    model = MODELS[name]
    config = LlamaConfig(
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head,
        vocab_size=model.vocabulary,
        tie_word_embeddings=model.tied,
    )
    with torch.device("meta"):
        counted = AutoModelForCausalLM.from_config(config).num_parameters()
    norms = (2 * model.layers + 1) * model.hidden
    assert model.weights == counted - norms


def test_what_edits_cost_is_linear_in_columns_and_sites() -> None:
    model = MODELS["8b"]
    for cost in (edit_bytes, edit_operations):
        one = cost(model, replace(BASE, columns=1, sites=1))
        assert cost(model, BASE) == 256 * 24 * one
    # Two sublayers of a block, as its share of the block's own operations.
    share = (
        2 * edit_operations(model, replace(BASE, columns=64, sites=1)) / (2 * model.block_weights)
    )
    assert share == pytest.approx(0.005, abs=5e-4)


def test_edits_and_shorter_memory_only_slow_a_replica() -> None:
    model, gpu = MODELS["8b"], GPUS["H100"]
    plain, edited = (replica(model, gpu, BASE, edited=e) for e in (False, True))
    assert edited.requests < plain.requests and edited.latency > plain.latency
    little = replica(model, replace(gpu, memory=32 * 10**9), BASE, edited=False)
    assert little.batch < plain.batch and little.requests < plain.requests
    # Little's law: what is under way is what comes in, times how long it stays.
    stays = plain.reply * plain.latency
    assert plain.requests * stays == pytest.approx(plain.batch)


def test_a_model_that_does_not_fit_says_which_flag_helps() -> None:
    with pytest.raises(SystemExit, match="--gpus"):
        replica(MODELS["70b"], GPUS["H100"], BASE, edited=False)


@pytest.mark.parametrize("arguments", [[], ["--columns", "64"]])
def test_the_readme_has_what_the_command_prints(arguments: list[str]) -> None:
    command = [sys.executable, DEPLOY / "sizing.py", *arguments]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    readme = (ROOT / "README.md").read_text("utf-8")
    wanted = printed if not arguments else printed.splitlines()[-3]
    assert wanted.strip() in readme


def test_it_needs_nothing_but_python() -> None:
    # Isolated: nothing of this environment can be imported.
    command = [sys.executable, "-I", "-S", DEPLOY / "sizing.py"]
    subprocess.run(command, capture_output=True, check=True)
