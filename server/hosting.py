"""Everything one server process holds, and how it is put together from settings."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from server.access import Access
from server.audit import AuditLog
from server.engine.base import Engine, MonitorRead
from server.engine.local import LocalEngine
from server.experiments.guard import Guard
from server.experiments.interfaces import (
    GuardMaker,
    MemoryRecords,
    Records,
    ReportMaker,
)
from server.experiments.judging import JudgeCard
from server.experiments.registry import Registry
from server.experiments.report_making import make_report
from server.experiments.store import open_records
from server.grammar import GrammarCompiler
from server.profiles import ProfileStore, profile_files
from server.settings import MAX_BODY_BYTES, MAX_MESSAGES, MAX_PROFILE_BYTES, Settings
from server.token_text import TokenTexts
from server.tool_parsers import ToolParserSetting
from server.tools import ToolSupport, find_tool_support
from steering.demo import DEMO, DEMO_NAME
from steering.fold import fold_into
from steering.judge import Judge, Outcome, PhraseJudge, judge, make_judge
from steering.models import LanguageModel, load_model
from steering.monitor import MONITOR_FILE, Monitor, PromptClass
from steering.plan import sites_of
from steering.profile import Profile
from steering.selftest import self_test
from steering.template import TemplateForm, check_kwargs, form_of, prompt_ending, with_form

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RegistrationLimits:
    """What may be registered at run time.

    Args:
        folder: profiles may be named by a path in it; None forbids paths.
        max_profiles: served at once, `raw` included.
        max_bytes: of one file.
    """

    folder: Path | None = None
    max_profiles: int = 64
    max_bytes: int = MAX_PROFILE_BYTES


@dataclass(frozen=True)
class Limits:
    """The most that a request may bring."""

    messages: int = MAX_MESSAGES
    prompt_characters: int | None = None


@dataclass
class Host:
    """What the endpoints work with.

    Args:
        judge: outcome of a reply's text; called off the event loop.
        monitor: says what class a prompt's benign probability means.
        monitor_read: when its probes are read.
        max_body_bytes: longer request bodies are refused unread.
        request_timeout: seconds that a request may take, waiting and computing.
        registration: limits on profiles that come while the server runs.
        limits: what else is refused before any work.
        access: who may do what; without keys, everybody who can connect may do everything.
        tool_parser: how the model writes tool calls.
        experiments: what `model` may name after `@`; none by default.
        records: where answers in experiments are kept.
        keep_text: keep prompts and replies with them.
        classifier: a slow judge, whose outcomes go into records and metrics after the answer.
    """

    engine: Engine
    lm: LanguageModel
    profiles: ProfileStore
    judge: Callable[[str], Outcome] = judge
    monitor: Monitor | None = None
    monitor_read: MonitorRead = "always"
    max_body_bytes: int = MAX_BODY_BYTES
    request_timeout: float = math.inf
    registration: RegistrationLimits = RegistrationLimits()
    limits: Limits = field(default_factory=Limits)
    access: Access = field(default_factory=Access)
    cors_origins: tuple[str, ...] = ()
    tool_parser: ToolParserSetting = "auto"
    experiments: Registry = field(default=None)  # type: ignore[assignment]  # set below
    records: Records = field(default_factory=MemoryRecords)
    make_guard: GuardMaker = Guard
    make_report: ReportMaker = make_report
    keep_text: bool = False
    classifier: Judge | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False
    _started: bool = False

    def __post_init__(self) -> None:
        if self.experiments is None:
            self.experiments = Registry(self.profiles)

    def start(self) -> None:
        """Start the engine, unless that was done. Raises ValueError if it cannot start."""
        if not self._started:
            self.engine.start()
            self.records.start()
            self._started = True

    def close(self) -> None:
        self.draining = True
        self.engine.close()
        self.access.audit.close()
        self.records.close()

    @cached_property
    def judge_card(self) -> JudgeCard:
        """How often the judge of records errs."""
        return JudgeCard(self.classifier or PhraseJudge())

    @cached_property
    def token_texts(self) -> TokenTexts:
        return TokenTexts(self.lm.tokenizer)

    @property
    def ready(self) -> bool:
        """True while new requests are welcome."""
        return not self.draining and self.engine.healthy()

    @cached_property
    def prompt_ending(self) -> tuple[int, ...]:
        """Token ids that all prompts end with which the monitor was fitted on."""
        return (
            () if self.monitor is None else prompt_ending(with_form(self.lm, self.monitor.template))
        )

    @cached_property
    def tools(self) -> ToolSupport:
        """What the model's template can do with tools; takes some milliseconds to find out."""
        return find_tool_support(self.lm, self.tool_parser)

    @cached_property
    def grammars(self) -> GrammarCompiler:
        return GrammarCompiler(self.lm)

    def prompt_class(self, benign_probability: float | None) -> PromptClass:
        if self.monitor is None or benign_probability is None:
            return "unknown"
        return self.monitor.prompt_class(benign_probability)


def open_host(settings: Settings) -> Host:
    """Load model and profiles, test them, and make the engine, not yet started.

    Raises ValueError, in one line that says what to do, for whatever cannot be served.
    """
    access = open_access(settings)
    records = open_records(settings)
    if records is None and settings.experiments:
        logger.warning(
            "records of experiments are kept in memory and end with the server; "
            "--experiments-journal DIR keeps them"
        )
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    lm = _load(settings)
    _check_answers(lm)
    paths = list(settings.profile)
    if settings.model is None and (DEMO / "profiles").is_dir():
        paths.insert(0, DEMO / "profiles")
    store = ProfileStore(
        lm,
        settings.served_name or _served_name(settings.model),
        files=[file for path in paths for file in profile_files(path)],
        default=settings.default_profile,
        folded=settings.fold,
        allow_derived=settings.allow_derived_base,
    )
    monitor = _load_monitor(settings, lm, paths)
    _warn_of_other_forms(lm, store, monitor)
    for profile in store:
        self_test(lm, profile)
        logger.info("profile %s passed its self-test", profile.name)
    if settings.fold is not None:
        folded = store.resolve(settings.fold)
        fold_into(lm, folded, allow_derived=settings.allow_derived_base)
        monitor = monitor and _before_folded_edits(monitor, folded)
    engine = LocalEngine(
        lm,
        max_num_seqs=settings.max_num_seqs,
        max_model_len=settings.max_model_len,
        max_waiting=settings.max_waiting,
        prefill_chunk=settings.prefill_chunk,
        max_unsplit_prompt=settings.max_unsplit_prompt,
        prefix_cache_mib=settings.prefix_cache_mib,
        monitor=monitor,
    )
    if settings.fold is None:
        engine.attach(sites_of(edit for profile in store for edit in profile.edits))
    return Host(
        engine,
        lm,
        store,
        monitor=monitor,
        monitor_read=settings.monitor_read,
        max_body_bytes=settings.max_body_bytes,
        request_timeout=settings.request_timeout,
        registration=RegistrationLimits(
            settings.profile_dir, settings.max_profiles, settings.max_profile_bytes
        ),
        limits=Limits(settings.max_messages, settings.max_prompt_chars),
        access=access,
        cors_origins=tuple(settings.cors_origin),
        tool_parser=settings.tool_parser,
        records=records or MemoryRecords(),
        experiments=Registry(
            store,
            settings.experiments,
            default=settings.default_experiment,
            folder=settings.experiments_state,
            allow_red_team=settings.allow_red_team_arms,
        ),
        keep_text=settings.experiments_text,
        classifier=_load_classifier(settings),
    )


def _load_classifier(settings: Settings) -> Judge | None:
    if settings.judge == "phrases":
        return None
    logger.info("loading the judge %s", settings.judge)
    return make_judge(settings.judge, device=settings.judge_device)


def open_access(settings: Settings) -> Access:
    """Keys and audit log as the settings ask. Raises ValueError."""
    try:
        audit = AuditLog(settings.audit_log, with_text=settings.audit_prompts)
    except OSError as error:
        raise ValueError(
            f"cannot write --audit-log {settings.audit_log}: {error.strerror}"
        ) from None
    return Access(settings.keys, protect_metrics=settings.protect_metrics, audit=audit)


def _check_answers(lm: LanguageModel) -> None:
    """Raise ValueError for a model that could never answer a chat request."""
    prompt = torch.tensor([lm.encode_prompt("Hello")], device=lm.device)
    with torch.inference_mode():
        logits = lm.model(prompt, use_cache=False, logits_to_keep=1).logits
    if not torch.isfinite(logits).all():
        raise ValueError(
            f"{lm.name} gives values that are not finite for a plain prompt: its weights are "
            "broken, or too large for the dtype (--dtype)"
        )


def _served_name(model: str | None) -> str:
    if model is None:
        return DEMO_NAME
    # A hub id is a name already; of a directory's path only the end is anybody's business.
    return Path(model).resolve().name if Path(model).is_dir() else model


def _load(settings: Settings) -> LanguageModel:
    device, dtype = settings.device, settings.dtype
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used here: {error}") from None
    name = settings.model
    if name is None:
        name = str(DEMO / "model")
        dtype = "float32" if dtype == "auto" else dtype
        if not (DEMO / "model" / "config.json").is_file():
            raise ValueError(
                "the demo model has not been built; run `pilothouse demo build`, or name a model "
                "with --model"
            )
    logger.info("loading %s on %s", name, device)
    lm = load_model(
        name,
        device=device,
        dtype="auto" if dtype == "auto" else getattr(torch, dtype),
        revision=settings.revision,
    )
    check_kwargs(lm, settings.chat_template_kwargs)
    return replace(
        lm,
        template_kwargs={**lm.template_kwargs, **settings.chat_template_kwargs},
        template_date=None,  # clients want today's
    )


def _load_monitor(settings: Settings, lm: LanguageModel, paths: list[Path]) -> Monitor | None:
    """The monitor asked for, else the one that lies beside the profiles, else none."""
    beside = [p / MONITOR_FILE if p.is_dir() else p.parent / MONITOR_FILE for p in paths]
    path = settings.monitor or next((file for file in beside if file.is_file()), None)
    if path is None:
        logger.warning("no monitor: replies carry no scores, and prompts have no class")
        return None
    monitor = Monitor.load(path)
    monitor.check_base(lm, allow_derived=settings.allow_derived_base)
    if monitor.base.weights != lm.fingerprint.weights:
        # Its calibration is of other weights, and a wrong score is worse than none.
        logger.warning("the monitor %s was fitted on other weights: scores are off", path)
        return None
    return monitor


def _warn_of_other_forms(lm: LanguageModel, store: ProfileStore, monitor: Monitor | None) -> None:
    """Say what was fitted on prompts of another form than a plain request's."""
    plain = [{"role": "user", "content": ""}]
    forms = {
        f"profile {profile.name}": TemplateForm.from_json(profile.provenance)
        for profile in store
        if profile.edits
    }
    if monitor is not None:
        forms["the monitor, which reads no probes of other prompts,"] = monitor.template
    for what, form in forms.items():
        if not form.admits(plain, lm.template_kwargs):
            logger.warning(
                "%s was fitted with %s; a plain request is rendered with %s",
                what, form.to_json(), form_of(lm).to_json(),
            )  # fmt: skip


def _before_folded_edits(monitor: Monitor, folded: Profile) -> Monitor:
    """The monitor with the one benign probe that reads what the folded edits leave alone, if any:
    there is no unedited model to read any more."""
    probe = monitor.benign_probe_for(folded.applied())
    return replace(monitor, benign=() if probe is None else (probe,))
