"""What readings mean: a request's scores and traces."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from server.engine.base import EngineRequest, PromptScores, StepFailedError, TokenTrace
from server.engine.vllm.layout import probes_of
from server.engine.vllm.wire import RequestEdits
from steering.monitor import Monitor, Probe


class ScoreReader:
    """Turns what the workers have read into a request's scores and its tokens' traces."""

    def __init__(self, monitor: Monitor | None) -> None:
        self._monitor = monitor
        self._names: dict[int, str] = {}
        """What a probe's reading is called, by the probe's identity."""
        numbers: Counter[str] = Counter()
        for probe in probes_of(monitor).values():
            site = str(probe.site)
            self._names[id(probe)] = f"probe.{site}.{numbers[site]}"
            numbers[site] += 1

    def needs_raw_pass(self, request: EngineRequest) -> bool:
        """Whether the benign probe must be read in a pass of its own."""
        monitor = self._monitor
        return (
            monitor is not None
            and bool(monitor.benign)
            and request.benign_read == "always"
            and monitor.benign_probe_for(request.edits) is None
        )

    def scores(
        self,
        request: EngineRequest,
        edits: RequestEdits,
        read: Mapping[str, float],
        raw: Mapping[str, float],
    ) -> PromptScores:
        """Scores from what was read at the last prompt token, in the request's own pass and, if
        there was one, in the unedited one."""
        monitor = self._monitor
        gates = tuple(
            read[f"gate.{p.gate.gate.site}.{p.gate.index}"]
            for p in edits.placed
            if p.gate is not None and p.gate.gate.latches
        )
        if monitor is None:
            return PromptScores(gate_values=gates)
        refusal = read.get("refusal")
        if refusal is not None and not math.isfinite(refusal):
            raise StepFailedError("the model's logits are not finite")
        benign = None
        if raw:
            benign = self._probability(monitor.benign_probe, raw)
        elif request.benign_read != "off" and monitor.benign:
            benign = self._probability(monitor.benign_probe_for(request.edits), read)
        return PromptScores(
            refusal_score=refusal if request.refusal_score else None,
            answer_probability=self._answer(request, read),
            benign_probability=benign,
            edit_norm=read["norm"],
            gate_values=gates,
        )

    def trace(self, request: EngineRequest, read: Mapping[str, float]) -> TokenTrace:
        monitor = self._monitor
        benign = None if monitor is None or not monitor.benign else monitor.benign_probe
        return TokenTrace(
            answer_probability=self._answer(request, read),
            benign_probability=self._probability(benign, read),
            edit_norm=read["norm"],
        )

    def _answer(self, request: EngineRequest, read: Mapping[str, float]) -> float | None:
        if self._monitor is None or request.answer_probe is None:
            return None
        return self._probability(self._monitor.answer.get(request.answer_probe), read)

    def _probability(self, probe: Probe | None, read: Mapping[str, float]) -> float | None:
        if probe is None:
            return None
        odds = read[self._names[id(probe)]] + probe.bias
        return 1 / (1 + math.exp(-odds)) if odds >= 0 else math.exp(odds) / (1 + math.exp(odds))
