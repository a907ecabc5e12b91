"""The model and its monitor, as the settings ask for them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from server.profiles import ProfileStore
from server.settings import Settings
from steering.demo import DEMO
from steering.edit import Site
from steering.models import LanguageModel, load_model
from steering.monitor import MONITOR_FILE, Monitor
from steering.profile import Profile
from steering.template import TemplateForm, check_kwargs, form_of
from steering.weightless import load_without_weights

logger = logging.getLogger(__name__)


def load(settings: Settings) -> LanguageModel:
    """The model to serve, for chat; without its weights where the engine loads them elsewhere.

    Raises ValueError for one that cannot be loaded or could never answer a chat request.
    """
    name, dtype = model_name(settings), settings.dtype
    if settings.model is None:
        dtype = "float32" if dtype == "auto" else dtype
    wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
    if settings.engine == "local":
        lm = _load_whole(settings, name, wanted)
    else:
        logger.info("reading %s", name)
        lm = load_without_weights(name, dtype=wanted, revision=settings.revision)
    check_kwargs(lm, settings.chat_template_kwargs)
    lm = replace(
        lm,
        template_kwargs={**lm.template_kwargs, **settings.chat_template_kwargs},
        template_date=None,  # clients want today's
    )
    _check_answers(lm)
    return lm


def model_name(settings: Settings) -> str:
    """Directory or hub id. Raises ValueError where it would be the demo's, which is not there."""
    if settings.model is not None:
        return settings.model
    if not (DEMO / "model" / "config.json").is_file():
        raise ValueError(
            "the demo model has not been built; run `pilothouse demo build`, or name a model with "
            "--model"
        )
    return str(DEMO / "model")


def _load_whole(settings: Settings, name: str, dtype: torch.dtype | str) -> LanguageModel:
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used here: {error}") from None
    logger.info("loading %s on %s", name, device)
    return load_model(name, device=device, dtype=dtype, revision=settings.revision)


def _check_answers(lm: LanguageModel) -> None:
    """Raise ValueError for a model that could never answer a chat request."""
    prompt = torch.tensor([lm.encode_prompt("Hello")], device=lm.device)
    if lm.device.type == "meta":
        return  # whether its values are finite, the engine finds out
    with torch.inference_mode():
        logits = lm.model(prompt, use_cache=False, logits_to_keep=1).logits
    if not torch.isfinite(logits).all():
        raise ValueError(
            f"{lm.name} gives values that are not finite for a plain prompt: its weights are "
            "broken, or too large for the dtype (--dtype)"
        )


def steer_sites(asked: Sequence[str], lm: LanguageModel) -> tuple[Site, ...]:
    """The sites that `--steer-site` names, each once, in the order asked: `12.resid_post`, or
    `*.resid_post` for every layer. Raises ValueError."""
    sites: dict[Site, None] = {}
    for text in asked:
        layer, dot, point = text.partition(".")
        layers = range(len(lm.sites.blocks)) if layer == "*" and dot else [layer]
        for found in layers:
            try:
                site = Site.parse(f"{found}.{point}")
                lm.sites.module_at(site)
            except ValueError as error:
                raise ValueError(f"--steer-site {text}: {error}") from None
            sites[site] = None
    return tuple(sites)


def load_monitor(settings: Settings, lm: LanguageModel, paths: list[Path]) -> Monitor | None:
    """The monitor asked for, else the one that lies beside the profiles, else none; none, with a
    warning, if it was fitted on other weights."""
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


def warn_of_other_forms(lm: LanguageModel, store: ProfileStore, monitor: Monitor | None) -> None:
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


def monitor_under_fold(monitor: Monitor, folded: Profile) -> Monitor:
    """The monitor with the one benign probe that reads what the folded edits leave alone, if any:
    there is no unedited model to read any more."""
    probe = monitor.benign_probe_for(folded.applied())
    return replace(monitor, benign=() if probe is None else (probe,))
