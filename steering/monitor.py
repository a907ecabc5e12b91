"""What one base model shows about a prompt before it answers.

A monitor belongs to the unedited base model, not to a profile, so that `raw` and bare models have
one too. It holds linear probes on the last prompt token and the set of tokens that open a refusal.

* `benign_probability` is always read from the unedited model, so that every profile is measured
  with the same denominator.
* `answer_probability` is "this profile will answer": calibrated per profile on its own
  activations.
* `refusal_score` is the log-odds of a refusal-opening first token, from the edited logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from steering.edit import AppliedEdit, Site, effective_edits
from steering.models import LanguageModel, ModelFingerprint
from steering.storage import read_safetensors, write_safetensors
from steering.template import TemplateForm

PromptClass = Literal["harmful", "benign", "unknown"]

MONITOR_FILE = "monitor.safetensors"
"""Lies beside a model's profiles and is none."""

_EPSILON = 1e-8
# How much worse in AUROC a probe may be that is read for free.
_AS_GOOD = 0.02
_METADATA_KEY = "pilothouse.monitor"


class MonitorError(ValueError):
    """A monitor that cannot be read or used as asked; the message says why and what to do."""


@dataclass(frozen=True, eq=False)
class Probe:
    """A calibrated linear probe: `sigmoid(direction . h + bias)` at a site's last prompt token.

    Args:
        direction: `[d]`, with the calibration's slope included.
        auroc, expected_calibration_error: on held-out prompts.
    """

    site: Site
    direction: Tensor
    bias: float
    auroc: float
    expected_calibration_error: float

    def __post_init__(self) -> None:
        direction = torch.as_tensor(self.direction).detach().to("cpu", torch.float32)
        if direction.ndim != 1:
            raise ValueError(f"a probe's direction is [d]; got shape {tuple(direction.shape)}")
        numbers = (self.bias, self.auroc, self.expected_calibration_error)
        if not torch.isfinite(direction).all() or not all(map(math.isfinite, numbers)):
            raise ValueError(f"the probe at {self.site} holds values that are not finite; refit it")
        object.__setattr__(self, "direction", direction.contiguous())

    def probability(self, hidden: Tensor) -> Tensor:
        """Probabilities `[...]` of hidden states `[..., d]`."""
        return torch.sigmoid(hidden.float() @ self.direction.to(hidden.device) + self.bias)


@dataclass(frozen=True, eq=False)
class Monitor:
    """Probes and refusal tokens of one base model.

    Args:
        benign: probes for "this prompt is benign" at several sites, in the order of the forward
            pass; any of them may be read where the model is still unedited.
        answer: probes for "this profile will answer", by profile fingerprint (`""` for raw).
        refusal_token_ids: first tokens of this model's refusals.
        harmful_below, benign_above: thresholds on the benign probability; between them a prompt's
            class is unknown.
        template: the form of the prompts that everything here was fitted on; its probabilities
            hold for no other.
    """

    base: ModelFingerprint
    benign: tuple[Probe, ...]
    answer: Mapping[str, Probe]
    refusal_token_ids: tuple[int, ...]
    harmful_below: float = 0.5
    benign_above: float = 0.5
    provenance: dict[str, Any] = field(default_factory=dict)
    template: TemplateForm = field(default_factory=TemplateForm)

    @property
    def sites(self) -> set[Site]:
        """Every site a probe may read."""
        return {probe.site for probe in (*self.benign, *self.answer.values())}

    def benign_probe_for(self, edits: Sequence[AppliedEdit]) -> Probe | None:
        """The best benign probe that these edits leave untouched, None if there is no good one.

        Without one the caller reads `benign_probe` from an extra unedited forward pass. A free
        probe clearly worse than the best one counts as none: every profile's prompts are to be
        classified alike.
        """
        edited = [a.edit.site for a in effective_edits(edits) if a.edit.phase != "generation"]
        first = min((site.order for site in edited), default=None)
        free = [p for p in self.benign if first is None or p.site.order < first]
        best = max(free, key=lambda p: p.auroc, default=None)
        good = best is not None and best.auroc >= self.benign_probe.auroc - _AS_GOOD
        return best if good else None

    @property
    def benign_probe(self) -> Probe:
        """The best benign probe."""
        return max(self.benign, key=lambda p: p.auroc)

    def prompt_class(self, benign_probability: float) -> PromptClass:
        if benign_probability < self.harmful_below:
            return "harmful"
        return "benign" if benign_probability > self.benign_above else "unknown"

    def refusal_score(self, logits: Tensor) -> Tensor:
        """Log-odds `[...]` of the probability mass on refusal-opening tokens, `logits` `[..., V]`.

        From the raw distribution of the first generated position, before temperature.
        """
        return refusal_log_odds(logits, self.refusal_token_ids)

    def check_base(self, lm: LanguageModel, *, allow_derived: bool = False) -> None:
        """Raise MonitorError if the monitor does not belong to this model."""
        reason = self.base.mismatch(lm.fingerprint, allow_derived=allow_derived)
        if reason is not None:
            raise MonitorError(f"the monitor does not fit {lm.name}: {reason}")
        for probe in (*self.benign, *self.answer.values()):
            if len(probe.direction) != lm.sites.hidden_size:
                raise MonitorError(
                    f"the monitor's probe at {probe.site} has hidden size {len(probe.direction)}, "
                    f"{lm.name} has {lm.sites.hidden_size}"
                )
            try:
                lm.sites.module_at(probe.site)
            except ValueError as error:
                raise MonitorError(f"the monitor: {error}") from None
        if max(self.refusal_token_ids, default=0) >= lm.fingerprint.dimensions["vocab_size"]:
            raise MonitorError(f"the monitor's refusal tokens are not of {lm.name}'s vocabulary")

    def save(self, path: Path | str) -> Path:
        """Write the monitor; the file's bytes depend on its content only."""
        answer = sorted(self.answer.items())
        header = {
            "base": self.base.to_json(),
            "benign": [_probe_header(probe) for probe in self.benign],
            "answer": {key: _probe_header(probe) for key, probe in answer},
            "refusal_token_ids": list(self.refusal_token_ids),
            "harmful_below": self.harmful_below,
            "benign_above": self.benign_above,
            "provenance": self.provenance,
            "template": self.template.to_json(),
        }
        tensors = {f"benign.{i}": probe.direction for i, probe in enumerate(self.benign)}
        tensors |= {f"answer.{key}": probe.direction for key, probe in answer}
        return write_safetensors(path, _METADATA_KEY, header, tensors)

    @classmethod
    def load(cls, path: Path | str) -> Monitor:
        """Read a monitor. Raises MonitorError for anything that is not a whole, sound one."""
        header, tensors = read_safetensors(path, _METADATA_KEY, "monitor", MonitorError)
        try:
            tokens = tuple(int(token) for token in header["refusal_token_ids"])
            low, high = float(header["harmful_below"]), float(header["benign_above"])
            if not tokens or min(tokens) < 0:
                raise ValueError("it needs refusal tokens, and ids are not negative")
            if not 0 <= low <= high <= 1:
                raise ValueError(f"thresholds {low:g} and {high:g} are not in order within 0 to 1")
            return cls(
                base=ModelFingerprint(**header["base"]),
                benign=tuple(
                    _probe_from(part, tensors[f"benign.{i}"])
                    for i, part in enumerate(header["benign"])
                ),
                answer={
                    str(key): _probe_from(part, tensors[f"answer.{key}"])
                    for key, part in header["answer"].items()
                },
                refusal_token_ids=tokens,
                harmful_below=low,
                benign_above=high,
                provenance=dict(header["provenance"]),
                # Files from before there were forms have the kwargs in their provenance alone.
                template=TemplateForm.from_json(header.get("template", header["provenance"])),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"missing {error}" if isinstance(error, KeyError) else str(error)
            raise MonitorError(f"{path} is not a sound monitor: {what}") from error


def refusal_log_odds(logits: Tensor, refusal_token_ids: Sequence[int]) -> Tensor:
    """Log-odds `[...]` of the probability mass on these tokens, `logits` `[..., V]`."""
    ids = torch.tensor(list(refusal_token_ids), device=logits.device)
    p = logits.float().softmax(-1)[..., ids].sum(-1)
    return torch.log(p + _EPSILON) - torch.log(1 - p + _EPSILON)


def _probe_header(probe: Probe) -> dict[str, Any]:
    return {
        "site": str(probe.site),
        "bias": probe.bias,
        "auroc": probe.auroc,
        "expected_calibration_error": probe.expected_calibration_error,
    }


def _probe_from(header: dict[str, Any], direction: Tensor) -> Probe:
    return Probe(
        site=Site.parse(str(header["site"])),
        direction=direction,
        bias=float(header["bias"]),
        auroc=float(header["auroc"]),
        expected_calibration_error=float(header["expected_calibration_error"]),
    )
