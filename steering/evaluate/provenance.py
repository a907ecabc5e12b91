"""Where results come from, and what a reader must know before believing them."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch

from steering.evaluate.arms import Arm
from steering.evaluate.job import Evaluation
from steering.fit import library_versions
from steering.judge_error import why_not_corrected
from steering.judge_set import Card, set_digest
from steering.profile import Profile
from steering.prompts import find_duplicates
from steering.template import form_of

FORMAT = 1
"""Of `results.json`."""


def provenance(job: Evaluation, arms: Sequence[Arm], card: Card) -> dict[str, Any]:
    """Everything but the figures that a reader of `results.json` may ask for."""
    lm, utility = job.lm, job.utility
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
        "utility": {
            "passages": {
                "source": utility.source,
                "count": len(utility.passages),
                "digest": _digest([[p.context, p.continuation] for p in utility.passages]),
            },
            "questions": {
                name: {"count": len(found), "digest": _digest([asdict(q) for q in found])}
                for name, found in utility.questions.items()
            },
        },
        "judge": {
            **card.to_json(),
            "labelled_set": set_digest(card.part),
            "correction": "Rogan and Gladen 1978; interval by Lang and Reiczigel 2014",
            "not_corrected": why_not_corrected(card),
        },
        "settings": {
            **asdict(job.decoding),
            "strengths": list(job.strengths),
            "kl_tokens": utility.kl_tokens,
            "kl_prompts": utility.kl_prompts,
            "perplexity_source": utility.source,
        },
        "machine": {
            "platform": platform.platform(),
            "processor": torch.cuda.get_device_name(lm.device)
            if lm.device.type == "cuda"
            else platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        },
    }


def _digest(values: object) -> str:
    return hashlib.sha256(json.dumps(values, ensure_ascii=False).encode()).hexdigest()


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
