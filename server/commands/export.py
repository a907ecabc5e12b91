"""`pilothouse export`: a profile as files for other servers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

SUMMARY = "write a profile as a checkpoint, a LoRA adapter or a control vector"


def register(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("profile", type=Path, help="profile file")
    parser.add_argument("--model", required=True, help="directory or hub id of its model")
    parser.add_argument("--revision", help="revision of a model from the hub")
    parser.add_argument(
        "--format",
        required=True,
        help="hf (a checkpoint for transformers), peft (a LoRA adapter) or gguf (a control "
        "vector for llama.cpp)",
    )
    parser.add_argument("--out", required=True, type=Path, help="new directory for the files")
    parser.add_argument("--strength", type=float, help="default: the profile's own")
    parser.add_argument("--max-rank", type=int, help="of a peft adapter; default: exact")
    parser.add_argument(
        "--allow-derived-base",
        action="store_true",
        help="accept a model with other weights than the profile was fitted on",
    )
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")


def run(arguments: argparse.Namespace) -> int:
    import torch

    from steering.export import export_profile, formats
    from steering.models import load_model
    from steering.profile import Profile

    # Everything that can be wrong with the arguments shows before the model is loaded.
    if arguments.format not in formats():
        raise ValueError(f"unknown --format {arguments.format}; there are {', '.join(formats())}")
    if arguments.max_rank is not None:
        if arguments.format != "peft":
            raise ValueError(f"--max-rank belongs to --format peft, not {arguments.format}")
        if arguments.max_rank < 1:
            raise ValueError("--max-rank is at least 1")
    if arguments.threads is not None and arguments.threads < 1:
        raise ValueError("--threads is at least 1")
    profile = Profile.load(arguments.profile)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    lm = load_model(arguments.model, device=arguments.device, revision=arguments.revision)
    exported = export_profile(
        lm,
        profile,
        arguments.format,
        arguments.out,
        strength=arguments.strength,
        max_rank=arguments.max_rank,
        allow_derived=arguments.allow_derived_base,
    )
    print(exported)
    if profile.red_team:
        print(
            f"{profile.name} is a red-team profile, it removes refusals: who holds these files "
            "decides who may use them",
            file=sys.stderr,
        )
    return 0
