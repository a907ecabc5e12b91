"""Everything one server process holds, and how it is put together from settings."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

import steering
from server.engine.base import Engine
from server.engine.local import LocalEngine
from server.grammar import GrammarCompiler
from server.profiles import MONITOR_FILE, ProfileStore, profile_files
from server.settings import MAX_BODY_BYTES, Settings
from server.token_text import TokenTexts
from server.tool_parsers import ToolParserSetting
from server.tools import ToolSupport, find_tool_support
from steering.fold import fold_into
from steering.judge import Outcome, judge
from steering.models import LanguageModel, load_model
from steering.monitor import Monitor, PromptClass
from steering.plan import sites_of
from steering.profile import Profile
from steering.selftest import self_test

logger = logging.getLogger(__name__)

DEMO_NAME = "demo"
DEMO = Path(steering.__path__[0]) / "demo"


@dataclass
class Host:
    """What the endpoints work with.

    Args:
        judge: outcome of a reply's text; called off the event loop.
        monitor: says what class a prompt's benign probability means.
        max_body_bytes: longer request bodies are refused unread.
        tool_parser: how the model writes tool calls.
    """

    engine: Engine
    lm: LanguageModel
    profiles: ProfileStore
    judge: Callable[[str], Outcome] = judge
    monitor: Monitor | None = None
    max_body_bytes: int = MAX_BODY_BYTES
    tool_parser: ToolParserSetting = "auto"
    created: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False
    _started: bool = False

    def start(self) -> None:
        """Start the engine, unless that was done. Raises ValueError if it cannot start."""
        if not self._started:
            self.engine.start()
            self._started = True

    def close(self) -> None:
        self.draining = True
        self.engine.close()

    @cached_property
    def token_texts(self) -> TokenTexts:
        return TokenTexts(self.lm.tokenizer)

    @property
    def ready(self) -> bool:
        """True while new requests are welcome."""
        return not self.draining and self.engine.healthy()

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
        monitor=monitor,
    )
    if settings.fold is None:
        engine.attach(sites_of(edit for profile in store for edit in profile.edits))
    return Host(
        engine,
        lm,
        store,
        monitor=monitor,
        max_body_bytes=settings.max_body_bytes,
        tool_parser=settings.tool_parser,
    )


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
    return load_model(
        name,
        device=device,
        dtype="auto" if dtype == "auto" else getattr(torch, dtype),
        revision=settings.revision,
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


def _before_folded_edits(monitor: Monitor, folded: Profile) -> Monitor:
    """The monitor with the one benign probe that reads what the folded edits leave alone, if any:
    there is no unedited model to read any more."""
    probe = monitor.benign_probe_for(folded.applied())
    return replace(monitor, benign=() if probe is None else (probe,))
