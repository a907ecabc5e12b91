"""The HTTP application: which endpoints there are and what they answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import torch
from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from server.access import DOCUMENTATION, AccessMiddleware, caller_of, declare_access
from server.admin import add_admin
from server.chat import complete, stream
from server.compare import add_compare
from server.compare_protocol import ComparisonChunk
from server.completions import complete_text, stream_text
from server.errors import UnavailableError, install_handlers
from server.experiments.api import add_experiments
from server.experiments.choosing import experiment_named, find_enterable, visible
from server.experiments.recording import Recorder
from server.experiments.registry import unknown_experiment
from server.headers import SecurityHeaders, cross_origin
from server.hosting import Host
from server.metrics import Metrics
from server.middleware import RequestMiddleware
from server.openapi import errors, events_of
from server.page import add_page
from server.prepare import (
    Prepared,
    prepare,
    prepare_completion,
    render_prompt,
    tokenize_text,
)
from server.profiles import COMPOSED, ProfileStore
from server.protocol import ChatRequest, CompletionRequest, TokenizeRequest
from server.reply import Answer, submit
from server.responses import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    Health,
    ModelCard,
    ModelList,
    ProfileCard,
    ProfileList,
    Status,
    Tokens,
    Version,
)
from server.score import add_score
from server.sse import ClientGoneError, EventStream, unless_gone
from server.version import VERSION

_HEADERS = {
    name: {"schema": {"type": "string"}, "description": description}
    for name, description in (
        ("X-Steering-Profile", "The profile that answered."),
        ("X-Steering-Fingerprint", "Its fingerprint; empty without edits."),
        ("X-Steering-Experiment", "The experiment that chose it, if one did."),
        ("X-Steering-Arm", "And the arm."),
        ("X-Request-Id", "Of this request: the client's own if sane."),
        ("X-Ignored-Fields", "Unknown fields of the request, if there were any."),
    )
}


def _streams(chunk: str) -> dict[str, Any]:
    """The response of an endpoint that can stream events which hold `chunk`."""
    return {
        "description": "The reply, or with `stream` its chunks, then `data: [DONE]`.",
        "content": events_of(chunk),
        "headers": _HEADERS,
    }


def create_app(host: Host) -> FastAPI:
    """The application around a host, whose engine starts and stops with it."""
    metrics = Metrics([*host.profiles.names, COMPOSED])
    _describe(host, metrics)
    host.records.on_lost(metrics.records_lost.inc)
    recorder = Recorder(host, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(host.start)
        await recorder.start()
        try:
            yield
        finally:
            await recorder.close()
            await asyncio.to_thread(host.close)

    app = FastAPI(
        title="Pilothouse",
        version=VERSION,
        description="One language model under many activation-steering profiles.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.host = host
    app.state.metrics = metrics
    app.state.recorder = recorder
    # The last one added sees requests first.
    app.add_middleware(AccessMiddleware, access=host.access, metrics=metrics)
    app.add_middleware(RequestMiddleware, metrics=metrics, max_body_bytes=host.max_body_bytes)
    if host.cors_origins:
        app.add_middleware(cross_origin, origins=host.cors_origins)
    app.add_middleware(SecurityHeaders, documentation=DOCUMENTATION)
    install_handlers(app, lambda reason: metrics.rejections.labels(reason).inc())
    _add_generation(app, host, metrics, recorder)
    add_score(app, host)
    add_compare(app, host, metrics, recorder)
    _add_lists(app, host)
    add_admin(app, host, metrics)
    add_experiments(app, host, recorder)
    _add_operations(app, host, metrics)
    add_page(app)
    _declare_truthfully(app)
    return app


def _add_generation(app: FastAPI, host: Host, metrics: Metrics, recorder: Recorder) -> None:
    async def respond(
        request: Request,
        prepared: Prepared,
        complete: Callable[[Answer], Awaitable[BaseModel]],
        stream: Callable[[Answer], AsyncGenerator[str, None]],
    ) -> Response:
        [answer] = submit(host, metrics, [prepared], request.state.arrived, recorder.ended)
        request.state.noted = True
        if prepared.body.stream:
            return EventStream(stream(answer), answer.close, answer.headers)
        try:
            whole = await unless_gone(complete(answer), request.receive)
        except ClientGoneError:
            return Response(status_code=499)  # nginx's word for it; nobody reads this
        finally:
            await answer.close()
        return JSONResponse(whole.model_dump(), headers=answer.headers)

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={200: _streams("ChatCompletionChunk"), **errors(400, 404, 413, 429, 503, 504)},
        tags=["chat"],
        summary="Answer a conversation under a profile",
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        request.state.asked = body.asked_profile
        prepared = await prepare(host, body, caller_of(request), request.headers)
        return await respond(request, prepared, complete, stream)

    @app.post(
        "/v1/completions",
        response_model=Completion,
        responses={200: _streams("Completion"), **errors(400, 404, 413, 429, 503, 504)},
        tags=["chat"],
        summary="Continue plain text under a profile",
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        request.state.asked = body.asked_profile
        prepared = await prepare_completion(host, body, caller_of(request), request.headers)
        return await respond(request, prepared, complete_text, stream_text)

    @app.post("/tokenize", responses=errors(400, 404), tags=["chat"], summary="Count a prompt")
    async def tokenize(body: TokenizeRequest, request: Request) -> Tokens:
        """The tokens that a prompt, or messages in the chat template, are to the model."""
        body.check()
        profiles = caller_of(request).sees(host.profiles)
        if (named := experiment_named(profiles, body.model)) is None:
            profiles.choose(body.model)
        else:
            find_enterable(host.experiments, profiles, named)
        if body.prompt is not None:
            tokens = await tokenize_text(host, body.prompt, body.add_special_tokens is not False)
        else:
            tokens = await render_prompt(host, body)
        texts = None
        if body.return_token_strs:
            text_of = host.token_texts.text_of
            texts = await asyncio.to_thread(lambda: list(map(text_of, tokens)))
        return Tokens(
            count=len(tokens),
            max_model_len=host.engine.max_model_len,
            tokens=tokens,
            token_strs=texts,
        )


def _add_lists(app: FastAPI, host: Host) -> None:
    def seen(request: Request) -> ProfileStore:
        return caller_of(request).sees(host.profiles)

    def card(profiles: ProfileStore, model: str) -> ModelCard:
        known = {"created": host.created, "max_model_len": host.engine.max_model_len}
        if (named := experiment_named(profiles, model)) is None:
            return profiles.model_card(model, **known)
        entry = find_enterable(host.experiments, profiles, named)
        if not visible(entry.experiment, profiles):
            raise unknown_experiment(named, "model")
        return profiles.experiment_card(named, **known)

    def experiments(profiles: ProfileStore) -> list[str]:
        """Values of `model` that take part in one."""
        registry = host.experiments
        going_on = [e.experiment for e in registry if registry.status(e) != "ended"]
        shown = [each.name for each in going_on if visible(each, profiles)]
        return [f"{profiles.served_name}@{name}" for name in shown]

    @app.get("/v1/models", responses=errors(), tags=["models"], summary="List models")
    async def list_models(request: Request) -> ModelList:
        """Every value that `model` may have in a request with this key."""
        profiles = seen(request)
        models = [*profiles.model_ids, *experiments(profiles)]
        return ModelList(data=[card(profiles, model) for model in models])

    @app.get(
        "/v1/models/{model:path}", responses=errors(404), tags=["models"], summary="Show a model"
    )
    async def show_model(model: str, request: Request) -> ModelCard:
        return card(seen(request), model)

    @app.get(
        "/v1/steering/profiles", responses=errors(), tags=["steering"], summary="List profiles"
    )
    async def list_profiles(request: Request) -> ProfileList:
        return ProfileList(data=[host.profiles.card(profile) for profile in seen(request)])

    @app.get(
        "/v1/steering/profiles/{name}",
        responses=errors(404),
        tags=["steering"],
        summary="Show a profile",
    )
    async def show_profile(name: str, request: Request) -> ProfileCard:
        return host.profiles.card(seen(request).resolve(name, param="name"))


def _add_operations(app: FastAPI, host: Host, metrics: Metrics) -> None:
    @app.get("/health", responses=errors(503), tags=["operations"], summary="Is it alive?")
    async def health() -> Health:
        """The engine's thread runs. Restart the server where this fails. `records` says whether
        those of experiments reach their database, which no restart would change."""
        if not host.engine.healthy():
            raise UnavailableError("The engine does not run.")
        return Health(status="ok", records=host.records.state)

    @app.get("/ready", responses=errors(503), tags=["operations"], summary="Send it requests?")
    async def ready() -> Status:
        """Model and profiles are loaded and tested, and the server is not about to stop."""
        if not host.ready:
            raise UnavailableError("The server takes no requests now.")
        return Status(status="ready")

    @app.get("/version", responses=errors(), tags=["operations"], summary="Which version?")
    async def version() -> Version:
        return Version(version=VERSION)

    @app.get(
        "/metrics",
        responses={
            200: {"description": "For Prometheus.", "content": {"text/plain": {}}},
            **errors(),
        },
        response_class=Response,
        tags=["operations"],
        summary="Metrics",
    )
    async def show_metrics(request: Request) -> Response:
        pending = host.records.pending
        metrics.watch(host.engine.stats(), records_pending=pending)
        hidden = caller_of(request).hidden_labels(host.profiles)
        restricted = {
            entry.experiment.name
            for entry in host.experiments
            if any(arm.profile in hidden for each in entry.versions for arm in each.arms)
        }
        page, content_type = metrics.page(request.headers.get("accept", ""), hidden, restricted)
        return Response(page, headers={"Content-Type": content_type})


def _describe(host: Host, metrics: Metrics) -> None:
    """The metrics that say what is served."""
    lm = host.lm
    metrics.build_info.labels(VERSION, torch.__version__).set(1)
    metrics.model_info.labels(
        host.profiles.served_name,
        lm.fingerprint.architecture,
        lm.fingerprint.weights[:12],
        lm.revision,
        str(lm.dtype).removeprefix("torch."),
        "vllm" if lm.device.type == "meta" else str(lm.device),
    ).set(1)
    for profile in host.profiles:
        metrics.add_profile(profile.name, profile.fingerprint, profile.method)


def _declare_truthfully(app: FastAPI) -> None:
    """Fit the OpenAPI document to what is sent: a 400 for FastAPI's 422, and chunks' schema."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            declare_access(document)
            schemas = document["components"]["schemas"]
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            for model in (ChatCompletionChunk, ComparisonChunk):
                chunk = model.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas.update(chunk.pop("$defs", {}))
                schemas[model.__name__] = chunk
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way
