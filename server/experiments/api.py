"""The endpoints of experiments: define, end, stop an arm, show, report."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Literal

from fastapi import FastAPI, Query, Request
from pydantic import BaseModel, ConfigDict
from starlette.responses import JSONResponse, PlainTextResponse, Response

from server.access import Caller, caller_of
from server.errors import ConflictError, ForbiddenError, InvalidRequestError, UnavailableError
from server.experiments.choosing import as_seen
from server.experiments.definitions import Experiment
from server.experiments.interfaces import with_judgements
from server.experiments.recording import Recorder
from server.experiments.registry import Entry, Stop, unknown_experiment
from server.hosting import Host
from server.openapi import errors
from server.profiles import finite
from server.responses import ArmCard, ExperimentCard, ExperimentEnded, ExperimentList
from server.sse import ClientGoneError, unless_gone
from steering.judge_set import Card

logger = logging.getLogger(__name__)

CARD_SECONDS = 15.0
"""How long a report waits for the judge's figures, and then does without."""

REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
)


class StopRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    arm: str


def add_experiments(app: FastAPI, host: Host, recorder: Recorder) -> None:
    """Add the endpoints below `/v1/experiments`."""
    registry = host.experiments

    def seen(request: Request, name: str) -> Entry:
        """An experiment as the caller sees it; others do not exist."""
        entry = as_seen(registry.find(name), caller_of(request), host.profiles)
        if entry is None:
            raise unknown_experiment(name, "name")
        return entry

    async def change(entry: Entry) -> None:
        """Let this be the entry, on disk first."""
        try:
            await asyncio.to_thread(registry.save, entry)
        except OSError as error:
            raise UnavailableError(
                f"The folder of --experiments-state cannot be written ({error.strerror}); nothing "
                "has changed.",
                code="state_not_written",
            ) from error
        registry.put(entry)

    @app.get("/v1/experiments", responses=errors(), tags=["experiments"], summary="List them")
    async def list_experiments(request: Request) -> ExperimentList:
        caller = caller_of(request)
        seen = (as_seen(entry, caller, host.profiles) for entry in registry)
        return ExperimentList(data=[_card(host, caller, e) for e in seen if e is not None])

    @app.get(
        "/v1/experiments/{name}",
        responses=errors(404),
        tags=["experiments"],
        summary="Show an experiment",
    )
    async def show_experiment(name: str, request: Request) -> ExperimentCard:
        return _card(host, caller_of(request), seen(request, name))

    @app.post(
        "/v1/experiments",
        status_code=201,
        response_model=ExperimentCard,
        responses={
            200: {"description": "It is so already.", "model": ExperimentCard},
            **errors(400, 403, 404, 409, 413, 429, 503),
        },
        tags=["admin"],
        summary="Define an experiment, or its next version",
    )
    async def define_experiment(body: Experiment, request: Request) -> Response:
        """A version never changes: another definition is the next version, whose records are its
        own. The same definition again changes nothing and is a 200."""
        caller = caller_of(request)
        if "creator" in body.model_fields_set:
            raise InvalidRequestError(
                "'creator' is the key that sends this; leave it out.", param="creator"
            )
        given = "version" in body.model_fields_set
        async with recorder.changing:
            before = {entry.experiment.name for entry in registry}
            _check_arms(host, caller, body)
            if body.name in before and not as_seen(registry.find(body.name), caller, host.profiles):
                raise ConflictError(f"The name {body.name!r} is taken.", param="name")
            first = 1 if registry.knows(body.name) else await recorder.first_version(body)
            entry = registry.next_version(
                body.model_copy(update={"creator": caller.id}), version_given=given, first=first
            )
            if entry is None:
                return JSONResponse(_card(host, caller, seen(request, body.name)).model_dump())
            await change(entry)
            for gone in before - {each.experiment.name for each in registry}:
                recorder.metrics.retire_experiment(gone)
            recorder.defined(entry)
        card = _card(host, caller, seen(request, body.name))
        return JSONResponse(card.model_dump(), status_code=201)

    @app.delete(
        "/v1/experiments/{name}",
        responses=errors(404, 409, 429, 503),
        tags=["admin"],
        summary="End an experiment",
    )
    async def end_experiment(name: str, request: Request) -> ExperimentEnded:
        """Its requests are answered by the default profile from now on; what it recorded stays."""
        seen(request, name)
        async with recorder.changing:
            entry = registry.ended(name)
            await change(entry)
            recorder.removed(entry, caller_of(request).id)
        return ExperimentEnded(name=name)

    @app.post(
        "/v1/experiments/{name}/stop",
        responses=errors(400, 404, 429),
        tags=["admin"],
        summary="Stop an arm",
    )
    async def stop_arm(name: str, body: StopRequest, request: Request) -> ExperimentCard:
        """Its units are answered by the control from now on, without being exposed to it."""
        seen(request, name)
        entry = registry.check_stop(name, body.arm)
        by = {"by": caller_of(request).id}
        recorder.stop(entry.experiment, body.arm, Stop(registry.clock(), "stopped", by))
        return _card(host, caller_of(request), seen(request, name))

    @app.get(
        "/v1/experiments/{name}/report",
        response_model=None,
        responses={
            200: {
                "description": "The report.",
                "content": {"application/json": {}, "text/html": {}, "text/plain": {}},
            },
            **errors(400, 404, 503),
        },
        tags=["experiments"],
        summary="What an experiment has shown",
    )
    async def report_experiment(
        name: str,
        request: Request,
        format: Annotated[
            Literal["json", "html", "text", "plots"],
            Query(description="Of the report; `plots` are its PNG files by name, in base64."),
        ] = "json",
        version: Annotated[int | None, Query(description="Default: the latest.")] = None,
    ) -> Response:
        experiment = seen(request, name).version(version)
        await request.body()  # so that what comes next is that the client has gone
        made = recorder.reading.run(_report(host, experiment, format))
        try:
            return await unless_gone(made, request.receive)
        except ClientGoneError:
            return Response(status_code=499)  # nobody reads this


def _report(host: Host, experiment: Experiment, format: str) -> Callable[[], Response]:
    def make() -> Response:
        records = host.records
        answers = with_judgements(records.answers(experiment.name, experiment.version))
        events = list(records.events(experiment.name, experiment.version))
        card, notes = _judge_card(host)
        report = host.make_report(experiment, answers, events, judge_card=card, notes=notes)
        if format == "html":
            page = Response(report.to_html(), media_type="text/html; charset=utf-8")
            page.headers["Content-Security-Policy"] = REPORT_POLICY
            return page
        if format == "text":
            return PlainTextResponse(report.to_text())
        if format == "plots":
            files = {plot.file: base64.b64encode(plot.png).decode() for plot in report.plots()}
            return JSONResponse(files)
        return JSONResponse(finite(dict(report.to_json())))

    return make


def _judge_card(host: Host) -> tuple[Card | None, list[str]]:
    """How often the judge errs; else none, and why."""
    try:
        return host.judge_card.wait(CARD_SECONDS), []
    except TimeoutError:
        why = "how often the judge errs is still being found out; ask again later"
    except Exception:
        logger.exception("the judge could not be measured")
        why = "the judge failed when it was measured, as the server's log says"
    return None, [f"Rates are not corrected for the judge's errors: {why}."]


def _check_arms(host: Host, caller: Caller, experiment: Experiment) -> None:
    """Raise ApiError unless the caller may use every arm's profile, and may let others use it."""
    profiles = caller.sees(host.profiles)
    for i, arm in enumerate(experiment.arms):
        profile = profiles.resolve(arm.profile, param=f"arms[{i}].profile")
        if profile.red_team and caller.local and not host.experiments.allow_red_team:
            raise ForbiddenError(
                f"{arm.profile!r} removes refusals (red_team) and this server has no keys to say "
                "who may try that on others; start it with --allow-red-team-arms if it is meant.",
                param=f"arms[{i}].profile",
                code="forbidden",
            )


def _card(host: Host, caller: Caller, entry: Entry) -> ExperimentCard:
    """What is told of an experiment; of the salt and of keys, only to administrators."""
    experiment, registry = entry.experiment, host.experiments
    told = experiment.model_dump(mode="json", exclude={"arms", "name", "version"})
    if not caller.has("admin"):
        del told["salt"], told["creator"]
    arms = []
    for arm in experiment.arms:
        stop = entry.stopped.get(arm.name)
        stopped = None if stop is None else finite(asdict(stop))
        if stopped is not None and not caller.has("admin"):
            stopped["detail"].pop("by", None)
        arms.append(ArmCard(**arm.model_dump(), stopped=stopped))
    return ExperimentCard(
        name=experiment.name,
        model=f"{host.profiles.served_name}@{experiment.name}",
        version=experiment.version,
        versions=[each.version for each in entry.versions],
        status=registry.status(entry),
        default=registry.default == experiment.name,
        source="settings" if entry.from_settings else "api",
        arms=arms,
        ended=entry.ended,
        **told,
    )
