"""What Prometheus scrapes.

One registry per app. Every series that can be known at start exists from the start, at 0, so that
rates are right from the first event. Labels are never text of clients.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from typing import get_args
from weakref import WeakSet

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder

from server.engine.base import EngineStats, PromptScores
from server.errors import REJECTION_REASONS
from server.experiments.records import AnswerRecord
from server.redact import RedactedRegistry
from steering.judge import Outcome
from steering.monitor import PromptClass

# OpenTelemetry's lists for generative models.
DURATION = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
# Small models are faster than the list starts.
INTER_TOKEN = (0.001, 0.0025, 0.005, *PER_TOKEN)
FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0
)  # fmt: skip
PROBABILITY = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
LOG_ODDS = (-15.0, -12.0, -9.0, -6.0, -4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 6.0, 9.0, 12.0, 15.0)
NORM_RATIO = (0.001, 0.003, 0.01, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0)
GATE = (-100.0, -30.0, -10.0, -3.0, -1.0, -0.3, 0.0, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
JUDGE = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

FINISH_REASONS = ("stop", "length", "cancelled", "error")
SHADOW_RESULTS = ("answered", "failed", "dropped")
PROMPT_CLASSES = get_args(PromptClass)
JUDGED: tuple[Outcome, ...] = tuple(o for o in get_args(Outcome) if o != "error")


class Metrics:
    """Every metric of one app.

    Args:
        profiles: names of the profiles served.
    """

    def __init__(self, profiles: Iterable[str]) -> None:
        # A `_created` series beside each of ours doubles the page and is used by nobody here. The
        # library has this switch for the process only.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.requests = self._counter(
            "requests", "Requests that reached the engine and ended.", "profile", "finish_reason"
        )
        self.rejections = self._counter(
            "rejections", "Requests turned down without an answer.", "reason"
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens.", "profile")
        self.completion_tokens = self._counter("completion_tokens", "Tokens generated.", "profile")
        self.cache_hits = self._counter(
            "cache_hits", "Prompts whose beginning came from the prefix cache.", "profile"
        )
        self.queue_time = self._histogram(
            "queue_time_seconds", "Time from submission to admission.", FIRST_TOKEN
        )
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds",
            "Time from a request's arrival to its first token.",
            FIRST_TOKEN,
            "profile",
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds",
            "Time between two tokens of a request.",
            INTER_TOKEN,
            "profile",
        )
        self.request_duration = self._histogram(
            "request_duration_seconds",
            "Time from a request's arrival to its last token.",
            DURATION,
            "profile",
        )
        self.responses_judged = self._counter(
            "responses_judged", "Replies judged.", "profile", "prompt_class", "outcome"
        )
        self.refusals = self._counter(
            "refusals", "Replies judged to be refusals.", "profile", "prompt_class"
        )
        self.judge_seconds = self._histogram("judge_seconds", "Time to judge a reply.", JUDGE)
        self.refusal_score = self._histogram(
            "refusal_score", "Log-odds of a refusal's opening.", LOG_ODDS, "profile"
        )
        self.answer_probe = self._histogram(
            "answer_probe_score",
            "Probability that the profile answers, by its probe.",
            PROBABILITY,
            "profile",
        )
        self.benign_probe = self._histogram(
            "benign_probe_score",
            "Probability that the prompt is benign, by the unedited model's probe.",
            PROBABILITY,
            "profile",
        )
        self.edit_norm = self._histogram(
            "edit_norm_ratio",
            "Norm of the edits' change over the hidden state's, at the last prompt token.",
            NORM_RATIO,
            "profile",
        )
        self.gate_value = self._histogram(
            "gate_value", "Values of gates that are read once per prompt.", GATE, "profile"
        )
        self.running = self._gauge("requests_running", "Requests being computed.")
        self.waiting = self._gauge("requests_waiting", "Requests that wait for a slot.")
        self.slots_used = self._gauge("slots_used", "Slots of the cache in use.")
        self.profile_info = self._gauge(
            "profile_info", "Always 1; a profile served.", "profile", "fingerprint", "method"
        )
        self.model_info = self._gauge(
            "model_info",
            "Always 1; the model served.",
            "model", "architecture", "weights", "revision", "dtype", "device",
        )  # fmt: skip
        self.build_info = self._gauge("build_info", "Always 1; what runs.", "version", "torch")
        self.audit_lost = self._counter(
            "audit_records_lost", "Lines that the audit log could not keep."
        )
        self.exposures = self._counter(
            "experiment_exposures", "Answers of an experiment's arm.", "experiment", "arm"
        )
        self.guardrail_stops = self._counter(
            "guardrail_stops", "Arms that a guard-rail stopped.", "experiment", "arm"
        )
        self.shadows = self._counter(
            "experiment_shadows",
            "Unseen answers of the other arms: answered, failed, or dropped for want of room.",
            "experiment", "result",
        )  # fmt: skip
        self.experiment_judged = self._counter(
            "experiment_responses_judged",
            "Replies judged, by the arm that answered.",
            "experiment", "arm", "prompt_class", "outcome",
        )  # fmt: skip
        self.arm_share = self._gauge(
            "experiment_arm_share_ratio",
            "Share of an experiment's units that an arm should have.",
            "experiment",
            "arm",
        )
        self.judgements_lost = self._counter(
            "judgements_lost", "Replies that the classifier did not judge."
        )
        self.records_pending = self._gauge(
            "records_pending", "Records of experiments that wait for the database."
        )
        self.records_lost = self._counter(
            "records_lost", "Records of experiments that could not be kept."
        )
        self.http_requests = self._counter(
            "http_requests", "HTTP requests, by route and class of status.",
            "route", "method", "status",
        )  # fmt: skip
        self.http_duration = self._histogram(
            "http_request_duration_seconds",
            "Time from an HTTP request's arrival to the end of its response.",
            DURATION,
            "route",
            "method",
        )
        self._retired: set[str] = set()
        self._meters: WeakSet[ReplyMeter] = WeakSet()
        for reason in REJECTION_REASONS:
            self.rejections.labels(reason)
        for profile in profiles:
            self._create_series(profile)

    def add_profile(self, profile: str, fingerprint: str, method: str) -> None:
        """A profile is served from now on."""
        self._retired.discard(profile)
        self._create_series(profile)
        self.profile_info.labels(profile, fingerprint[:12], method).set(1)

    def retire_profile(self, profile: str, fingerprint: str, method: str) -> None:
        """A profile is served no more. Its series go when its last request has ended, so that
        profiles that come and go leave nothing behind."""
        self.profile_info.remove(profile, fingerprint[:12], method)
        self._retired.add(profile)
        self._sweep()

    def add_experiment(self, experiment: str, shares: Mapping[str, float]) -> None:
        """An experiment is served from now on, or its arms' shares are others.

        Args:
            shares: of the units, by arm; they add up to 1.
        """
        self.arm_share.remove_by_labels({"experiment": experiment})  # of an earlier version's arms
        for arm, share in shares.items():
            self.arm_share.labels(experiment, arm).set(share)
            self.exposures.labels(experiment, arm)
            self.guardrail_stops.labels(experiment, arm)
            for prompt_class in PROMPT_CLASSES:
                for outcome in JUDGED:
                    self.experiment_judged.labels(experiment, arm, prompt_class, outcome)
        for result in SHADOW_RESULTS:
            self.shadows.labels(experiment, result)

    def exposed(self, record: AnswerRecord) -> None:
        """A client got the answer of an experiment's arm."""
        self.exposures.labels(record.experiment, record.arm).inc()

    def exposure_judged(self, record: AnswerRecord) -> None:
        """It was judged, by the judge that counts."""
        experiment, arm, outcome = record.experiment, record.arm, record.outcome
        if outcome in JUDGED:
            self.experiment_judged.labels(experiment, arm, record.prompt_class, outcome).inc()

    def retire_experiment(self, experiment: str) -> None:
        """An experiment is served no more."""
        for metric in (
            self.arm_share, self.exposures, self.guardrail_stops, self.shadows,
            self.experiment_judged,
        ):  # fmt: skip
            metric.remove_by_labels({"experiment": experiment})

    def _sweep(self) -> None:
        gone = self._retired - {meter.profile for meter in self._meters}
        self._retired -= gone
        for metric in (*self._by_profile(), self.requests, self.refusals, self.responses_judged):
            for profile in gone:
                metric.remove_by_labels({"profile": profile})

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"steering_{name}", help, labels, registry=self.registry)

    def _gauge(self, name: str, help: str, *labels: str) -> Gauge:
        return Gauge(f"steering_{name}", help, labels, registry=self.registry)

    def _histogram(
        self, name: str, help: str, buckets: tuple[float, ...], *labels: str
    ) -> Histogram:
        return Histogram(f"steering_{name}", help, labels, buckets=buckets, registry=self.registry)

    def _by_profile(self) -> tuple[Counter | Histogram, ...]:
        """Metrics whose only label is the profile."""
        return (
            self.prompt_tokens, self.completion_tokens, self.time_to_first_token,
            self.inter_token_latency, self.request_duration, self.refusal_score,
            self.answer_probe, self.benign_probe, self.edit_norm, self.gate_value,
            self.cache_hits,
        )  # fmt: skip

    def _create_series(self, profile: str) -> None:
        for reason in FINISH_REASONS:
            self.requests.labels(profile, reason)
        for prompt_class in PROMPT_CLASSES:
            self.refusals.labels(profile, prompt_class)
            for outcome in JUDGED:
                self.responses_judged.labels(profile, prompt_class, outcome)
        for metric in self._by_profile():
            metric.labels(profile)

    def watch(self, stats: EngineStats, *, records_pending: int = 0) -> None:
        """Take over what others say of themselves; called before each scrape."""
        self.records_pending.set(records_pending)
        self._sweep()
        self.running.set(stats.running)
        self.waiting.set(stats.waiting)
        self.slots_used.set(stats.slots_used)

    def page(
        self, accept: str, hidden: Collection[str] = (), hidden_experiments: Collection[str] = ()
    ) -> tuple[bytes, str]:
        """The metrics page in the format that the scraper prefers, and its content type.

        Args:
            hidden: profiles whose series are summed under `restricted`.
            hidden_experiments: likewise, of all arms.
        """
        encode, content_type = choose_encoder(accept)
        registry = self.registry
        if hidden or hidden_experiments:
            registry = RedactedRegistry(registry, hidden, hidden_experiments)
        return encode(registry), content_type

    @property
    def names(self) -> list[str]:
        """Every metric as a page names it."""
        return sorted(
            family.name + ("_total" if family.type == "counter" else "")
            for family in self.registry.collect()
        )


class Meter:
    """Times one reply, and counts its tokens.

    Args:
        since: `time.perf_counter()` at the request's arrival.
    """

    def __init__(self, since: float) -> None:
        self._since = since
        self._last: float | None = None
        self._ended: float | None = None
        self.ttft: float | None = None
        """Seconds from arrival to the first token."""
        self.tokens = 0
        self.cached_tokens = 0

    @property
    def seconds(self) -> float:
        """From arrival to the end, or until now."""
        return (self._ended or time.perf_counter()) - self._since

    def token(
        self,
        scores: PromptScores | None,
        queue_seconds: float | None,
        cached_tokens: int | None = None,
    ) -> None:
        """A token came; the first one brings scores."""
        self._last = time.perf_counter()
        self.tokens += 1
        if self.ttft is None:
            self.ttft = self._last - self._since
        self.cached_tokens = cached_tokens or self.cached_tokens

    def judged(self, prompt_class: PromptClass, outcome: Outcome, seconds: float) -> None:
        """A judge has looked at the reply."""

    def end(self, finish_reason: str) -> bool:
        """The reply ended; only the first call counts, and says so."""
        if self._ended is not None:
            return False
        self._ended = time.perf_counter()
        return True


class ReplyMeter(Meter):
    """Puts one reply into the metrics, exactly once however it ends."""

    def __init__(self, metrics: Metrics, profile: str, prompt_tokens: int, since: float) -> None:
        super().__init__(since)
        self._metrics = metrics
        self.profile = profile
        metrics._meters.add(self)
        self._prompt_tokens = prompt_tokens
        self._gaps = metrics.inter_token_latency.labels(profile)

    def token(
        self,
        scores: PromptScores | None,
        queue_seconds: float | None,
        cached_tokens: int | None = None,
    ) -> None:
        before = self._last
        super().token(scores, queue_seconds, cached_tokens)
        assert self._last is not None
        if before is not None:
            self._gaps.observe(self._last - before)
        else:
            self._metrics.time_to_first_token.labels(self.profile).observe(self._last - self._since)
        if queue_seconds is not None:
            self._metrics.queue_time.observe(queue_seconds)
        if cached_tokens:
            self._metrics.cache_hits.labels(self.profile).inc()
        if scores is not None:
            self._observe(scores)

    def _observe(self, scores: PromptScores) -> None:
        for histogram, value in (
            (self._metrics.refusal_score, scores.refusal_score),
            (self._metrics.answer_probe, scores.answer_probability),
            (self._metrics.benign_probe, scores.benign_probability),
            (self._metrics.edit_norm, scores.edit_norm),
            *((self._metrics.gate_value, value) for value in scores.gate_values),
        ):
            if value is not None:
                histogram.labels(self.profile).observe(value)

    def judged(self, prompt_class: PromptClass, outcome: Outcome, seconds: float) -> None:
        self._metrics.judge_seconds.observe(seconds)
        self._metrics.responses_judged.labels(self.profile, prompt_class, outcome).inc()
        if outcome == "refusal":
            self._metrics.refusals.labels(self.profile, prompt_class).inc()

    def end(self, finish_reason: str) -> bool:
        if not super().end(finish_reason):
            return False
        m, profile = self._metrics, self.profile
        m.requests.labels(profile, finish_reason).inc()
        m.prompt_tokens.labels(profile).inc(self._prompt_tokens)
        m.completion_tokens.labels(profile).inc(self.tokens)
        m.request_duration.labels(profile).observe(self.seconds)
        return True
