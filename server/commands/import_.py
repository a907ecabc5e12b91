"""`pilothouse import`: a LoRA adapter or control vector of other tools as a profile."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

SUMMARY = "turn a PEFT LoRA adapter or a llama.cpp or repeng control vector into a profile"


def register(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", type=Path, metavar="FILE", help="adapter's folder, .gguf or .safetensors"
    )
    parser.add_argument("--model", required=True, help="directory or hub id of its model")
    parser.add_argument("--revision", help="revision of a model from the hub")
    parser.add_argument("--name", required=True, help="of the profile")
    parser.add_argument("--out", required=True, type=Path, help="directory for the profile")
    parser.add_argument(
        "--strength",
        type=float,
        default=1.0,
        help="of the profile; control vectors are often unit vectors, to be scaled (default: 1)",
    )
    parser.add_argument(
        "--red-team",
        required=True,
        action=argparse.BooleanOptionalAction,
        help="does it remove refusals? No file can be trusted to say, so you must",
    )
    parser.add_argument(
        "--allow-derived-base",
        action="store_true",
        help="accept a file that Pilothouse exported for other weights of the same model",
    )


def run(arguments: argparse.Namespace) -> int:
    from steering.imports import import_profile
    from steering.models import load_model
    from steering.selftest import self_test

    if not arguments.path.exists():
        raise ValueError(f"there is nothing at {arguments.path}")
    lm = load_model(arguments.model, revision=arguments.revision)
    profile = import_profile(
        lm,
        arguments.path,
        arguments.name,
        strength=arguments.strength,
        red_team=arguments.red_team,
        allow_derived=arguments.allow_derived_base,
    )
    for note in profile.provenance["notes"]:
        print(f"warning: {note}", file=sys.stderr)
    self_test(lm, profile)
    path = profile.save(arguments.out / f"{profile.name}.safetensors")
    if profile.red_team and not arguments.red_team:
        print(
            f"{arguments.path} says that it removes refusals: it stays a red-team profile",
            file=sys.stderr,
        )
    sites = ", ".join(str(edit.site) for edit in profile.edits)
    print(f"{path}: {len(profile.edits)} edits ({sites})")
    return 0
