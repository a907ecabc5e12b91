"""`pilothouse profiles`: look at profile files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

SUMMARY = "list, show or verify profile files"

_VERBS = {
    "list": "one line per profile",
    "show": "everything but the numbers, as JSON; a monitor too",
    "verify": "read every byte, and with --model test the profile on it",
}


def register(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, summary in _VERBS.items():
        command = verbs.add_parser(verb, help=summary, description=summary)
        command.add_argument("path", type=Path, help="profile file, or directory of them")
        if verb == "verify":
            command.add_argument("--model", help="directory or hub id of the model to test on")
            command.add_argument(
                "--allow-derived-base",
                action="store_true",
                help="accept a model with other weights than the profile was fitted on",
            )


def run(arguments: argparse.Namespace) -> int:
    from server.profiles import describe_edit, finite, profile_files
    from steering.monitor import MONITOR_FILE, Monitor
    from steering.monitor_card import card
    from steering.profile import Profile

    files = profile_files(arguments.path)
    if arguments.verb == "show" and arguments.path.name == MONITOR_FILE:
        print(json.dumps(finite(card(Monitor.load(arguments.path))), indent=2, ensure_ascii=False))
        return 0
    if arguments.verb == "verify":
        return _verify(files, arguments)
    for file in files:
        profile = Profile.load(file)
        if arguments.verb == "list":
            sites = ", ".join(str(edit.site) for edit in profile.edits) or "no edits"
            mark = "  red_team" if profile.red_team else ""
            print(f"{profile.name:24} {profile.method:20} {profile.fingerprint[:12]:12}  ", end="")
            print(f"{sites}{mark}")
            continue
        shown = {
            "name": profile.name,
            "method": profile.method,
            "fingerprint": profile.fingerprint,
            "strength": profile.strength,
            "red_team": profile.red_team,
            "base": profile.base and profile.base.to_json(),
            "edits": [describe_edit(edit) for edit in profile.edits],
            "card": finite(profile.card),
            "provenance": finite(profile.provenance),
        }
        print(json.dumps(shown, indent=2, ensure_ascii=False))
    return 0


def _verify(files: list[Path], arguments: argparse.Namespace) -> int:
    """Check every file, and report all that are unsound before failing."""
    from steering.models import load_model
    from steering.profile import Profile, ProfileError
    from steering.selftest import self_test

    lm = load_model(arguments.model) if arguments.model else None
    unsound = 0
    for file in files:
        try:
            profile = Profile.load(file)
            if lm is not None:
                profile.check_base(lm, allow_derived=arguments.allow_derived_base)
                self_test(lm, profile)
        except ProfileError as error:
            unsound += 1
            print(f"{file}: {' '.join(str(error).split())}")
        else:
            print(f"{file}: {profile.name} is sound{'' if lm is None else f' and fits {lm.name}'}")
    return 1 if unsound else 0
