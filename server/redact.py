"""A metrics page for somebody who must not read every profile's name."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.samples import Sample

RESTRICTED = "restricted"


class RedactedRegistry(CollectorRegistry):
    """What another registry holds, with the series of some profiles, and of the experiments that
    have them for arms, summed under one name.

    Totals over all profiles stay right. Of metrics whose other labels tell a profile
    (`profile_info`: its fingerprint and method), their series are left out.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        hidden: Collection[str],
        experiments: Collection[str] = (),
    ) -> None:
        super().__init__()
        self._experiments = experiments
        self._whole = registry
        self._hidden = hidden

    def collect(self) -> Iterable[Metric]:
        for family in self._whole.collect():
            redacted = Metric(family.name, family.documentation, family.type, family.unit)
            redacted.samples = self._redact(family.samples)
            yield redacted

    def _redact(self, samples: Iterable[Sample]) -> list[Sample]:
        merged: dict[tuple[str, tuple[tuple[str, str], ...]], Sample] = {}
        for sample in samples:
            if sample.labels.get("profile") in self._hidden:
                if "fingerprint" in sample.labels:
                    continue
                # Neither an exemplar nor a time: they are of one series.
                labels = {**sample.labels, "profile": RESTRICTED}
                sample = Sample(sample.name, labels, sample.value)
            if sample.labels.get("experiment") in self._experiments:
                if sample.name.endswith("_share_ratio"):
                    continue  # shares of several experiments have no sum
                secret: dict[str, str] = {
                    name: RESTRICTED for name in ("experiment", "arm") if name in sample.labels
                }
                sample = Sample(sample.name, {**sample.labels, **secret}, sample.value)
            key = sample.name, tuple(sample.labels.items())
            if key in merged:
                sample = merged[key]._replace(value=merged[key].value + sample.value)
            merged[key] = sample
        return list(merged.values())
