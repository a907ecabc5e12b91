"""Everything one server process holds, and how it is put together from settings."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from server.access import Access
from server.audit import AuditLog
from server.engine.base import Engine, MonitorRead
from server.engine.local import DEFAULT_MAX_MODEL_LEN, LocalEngine
from server.engine_choice import LOCAL_SEQS, VLLM_SEQS
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
from server.loading import (
    load,
    load_monitor,
    model_name,
    monitor_under_fold,
    steer_sites,
    warn_of_other_forms,
)
from server.profiles import ProfileStore, profile_files
from server.settings import MAX_BODY_BYTES, MAX_MESSAGES, MAX_PROFILE_BYTES, Settings
from server.token_text import TokenTexts
from server.tool_parsers import ToolParserSetting
from server.tools import ToolSupport, find_tool_support
from steering.demo import DEMO, DEMO_NAME
from steering.fold import fold_into
from steering.judge import Judge, Outcome, PhraseJudge, judge, make_judge
from steering.models import LanguageModel
from steering.monitor import Monitor, PromptClass
from steering.selftest import self_test
from steering.template import prompt_ending, with_form

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
    lm = load(settings)
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
    monitor = load_monitor(settings, lm, paths)
    warn_of_other_forms(lm, store, monitor)
    open_engine = _open_local if settings.engine == "local" else _open_vllm
    engine, monitor = open_engine(settings, lm, store, monitor)
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


def _open_local(
    settings: Settings, lm: LanguageModel, store: ProfileStore, monitor: Monitor | None
) -> tuple[Engine, Monitor | None]:
    """The engine, with every profile tested, and what the monitor may still read."""
    if settings.fold is not None:
        folded = store.resolve(settings.fold)
        self_test(lm, folded)
        fold_into(lm, folded, allow_derived=settings.allow_derived_base)
        monitor = monitor and monitor_under_fold(monitor, folded)
    engine = LocalEngine(
        lm,
        max_num_seqs=settings.max_num_seqs or LOCAL_SEQS,
        max_model_len=settings.max_model_len,
        max_waiting=settings.max_waiting,
        prefill_chunk=settings.prefill_chunk,
        max_unsplit_prompt=settings.max_unsplit_prompt,
        prefix_cache_mib=settings.prefix_cache_mib,
        monitor=monitor,
    )
    if settings.fold is None:
        for profile in store:
            engine.register(profile)
            logger.info("profile %s passed its self-test", profile.name)
    return engine, monitor


def _open_vllm(
    settings: Settings, lm: LanguageModel, store: ProfileStore, monitor: Monitor | None
) -> tuple[Engine, Monitor | None]:
    """The engine, which tests the profiles when it starts."""
    from server.engine.vllm.options import VllmOptions
    from server.engine.vllm.release import import_engine

    options = VllmOptions(
        model=model_name(settings),
        revision=settings.revision,
        dtype=str(lm.dtype).removeprefix("torch."),
        tensor_parallel_size=settings.tensor_parallel_size,
        pipeline_parallel_size=settings.pipeline_parallel_size,
        data_parallel_size=settings.data_parallel_size,
        max_site_rank=settings.max_site_rank,
        sites=steer_sites(settings.steer_site, lm),
        max_num_seqs=settings.max_num_seqs or VLLM_SEQS,
        max_model_len=settings.max_model_len or min(lm.context_length, DEFAULT_MAX_MODEL_LEN),
        max_waiting=settings.max_waiting,
        max_unsplit_prompt=settings.max_unsplit_prompt,
        prefix_caching=settings.prefix_cache_mib > 0,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        enforce_eager=settings.enforce_eager,
        engine_args=settings.vllm_args,
    )
    return import_engine()(lm, options, profiles=list(store), monitor=monitor), monitor


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


def _served_name(model: str | None) -> str:
    if model is None:
        return DEMO_NAME
    # A hub id is a name already; of a directory's path only the end is anybody's business.
    return Path(model).resolve().name if Path(model).is_dir() else model
