"""Where results come from, and what a reader must know before believing them."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from steering.evaluate.arms import Arm
from steering.evaluate.job import Evaluation
from steering.fit import library_versions
from steering.profile import Profile
from steering.prompts import find_duplicates
from steering.template import form_of

FORMAT = 1
"""Of `results.json`."""


def provenance(job: Evaluation, arms: Sequence[Arm]) -> dict[str, Any]:
    lm = job.lm
    profiles = list({arm.profile.name: arm.profile for arm in arms}.values())
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {**library_versions(), "python": platform.python_version()},
        "model": {
            "name": lm.name,
            "revision": lm.revision,
            "fingerprint": lm.fingerprint.to_json(),
            "digest": lm.fingerprint.digest,
            "dtype": str(lm.dtype).removeprefix("torch."),
            "device": str(lm.device),
            **form_of(lm).to_json(),
        },
        "profiles": [_profile(profile) for profile in profiles],
        "prompts": [
            {
                "name": found.name,
                "source": found.source,
                "digest": found.prompts.digest,
                "harmful": len(found.prompts.harmful),
                "benign": len(found.prompts.benign),
            }
            for found in job.sets
        ],
        "judge": {"version": job.judge.version},
        "settings": {
            **asdict(job.decoding),
            "strengths": list(job.strengths),
            "kl_tokens": job.utility.kl_tokens,
            "kl_prompts": job.utility.kl_prompts,
            "perplexity_source": job.utility.source,
        },
    }


def _profile(profile: Profile) -> dict[str, Any]:
    """A profile's identity; of its diagnostics, what plots show."""
    diagnostics = profile.provenance.get("diagnostics") or {}
    return {
        "name": profile.name,
        "method": profile.method,
        "fingerprint": profile.fingerprint,
        "strength": profile.strength,
        "red_team": profile.red_team,
        "sites": [str(edit.site) for edit in profile.edits],
        "summary": profile.card.get("summary", ""),
        "provenance": {k: v for k, v in profile.provenance.items() if k != "diagnostics"},
        "layers": [
            {"iteration": entry["iteration"], "sublayers": entry["sublayers"]}
            for entry in diagnostics.get("iterations", [])
            if "sublayers" in entry
        ],
    }


def warnings(job: Evaluation) -> list[str]:
    """What a reader must know before believing a figure."""
    found = []
    for prompts in job.sets:
        repeats = find_duplicates(prompts.prompts)
        if repeats.count:
            found.append(
                f"{prompts.name}: {repeats.count} of {repeats.checked} prompts repeat another"
                + (f", {repeats.conflicts} with the other label" if repeats.conflicts else "")
            )
        for profile in job.profiles:
            for use, digest in (profile.provenance.get("prompts") or {}).items():
                if digest == prompts.prompts.digest:
                    found.append(
                        f"{prompts.name} is the {use} set of {profile.name}: its figures there "
                        "are not held out"
                    )
    return found
