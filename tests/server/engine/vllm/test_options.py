"""What may be asked of vLLM, and what would break steering."""

from __future__ import annotations

from typing import Any

import pytest

from server.engine.vllm.options import VllmOptions


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("speculative_config", {"method": "ngram"}),
        ("worker_cls", "mine.Worker"),
        ("additional_config", {"x": 1}),
        ("enable_lora", True),
        ("enable_dbo", True),
        ("enable_dbo", 1),
        ("kv_sharing_fast_prefill", 1),
        ("enable_expert_parallel", True),
        ("logprobs_mode", "processed_logprobs"),
        ("decode_context_parallel_size", 2),
    ],
)
def test_arguments_that_break_steering_are_refused_with_the_reason(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name} cannot be used here: \w+"):
        VllmOptions("m", engine_args={name: value})


def test_arguments_that_change_nothing_pass() -> None:
    args = {"speculative_config": None, "enable_lora": False, "seed": 3, "ubatch_size": 1}
    assert VllmOptions("m", engine_args=args).engine_args == args


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("compilation_config", 3),
        ("compilation_config", '{"mode": 3}'),
        ("compilation_config", {"pass_config": True}),
        ("max_num_batched_tokens", "4096"),
        ("max_num_batched_tokens", 0),
    ],
)
def test_arguments_of_another_type_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"vLLM's .*{name} must be an? "):
        VllmOptions("m", max_unsplit_prompt=64, engine_args={name: value})


def test_arguments_with_a_flag_of_their_own_name_it() -> None:
    with pytest.raises(ValueError, match="give --max-num-seqs instead"):
        VllmOptions("m", engine_args={"max_num_seqs": 3})


@pytest.mark.parametrize("passes", [{"enable_sp": True}, {"fuse_gemm_comms": True}])
def test_splitting_the_tokens_of_a_step_is_refused(passes: dict[str, bool]) -> None:
    config = {"pass_config": passes}
    with pytest.raises(ValueError, match="every worker needs all tokens"):
        VllmOptions("m", engine_args={"compilation_config": config})


@pytest.mark.parametrize(
    "settings",
    [
        {"tensor_parallel_size": 0},
        {"max_site_rank": 0},
        {"max_waiting": -1},
        {"gpu_memory_utilization": 1.5},
        {"enforce_eager": True, "compilation": "vllm"},
        {"max_unsplit_prompt": 4000, "engine_args": {"max_num_batched_tokens": 4000}},
    ],
)
def test_numbers_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        VllmOptions("m", **settings)


def test_a_step_has_room_for_a_prompt_that_must_not_be_split() -> None:
    assert VllmOptions("m", max_unsplit_prompt=9000, max_num_seqs=64).max_num_batched_tokens >= 9064
    given = VllmOptions("m", engine_args={"max_num_batched_tokens": 512})
    assert given.max_num_batched_tokens == 512


def test_the_compilation_mode_joins_what_else_was_configured() -> None:
    options = VllmOptions(
        "m", compilation="vllm", engine_args={"compilation_config": {"custom_ops": ["none"]}}
    )
    assert options.compilation_config == {"custom_ops": ["none"], "mode": 3}
    assert VllmOptions("m").compilation_config == {}
