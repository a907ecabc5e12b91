"""The OpenAPI document against the server itself: schemathesis makes requests of what the document
allows and of what it forbids, and every answer must be one that it declares."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks, not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from server.engine.local import LocalEngine
from tests.conftest import make_model
from tests.server.experiments.trials import experiment, hosting
from tests.server.fakes import get, make_host
from tests.server.live import live_server

MESSAGES = [{"role": "user", "content": "Hi"}]
EXAMPLES = 20
"""Per operation and kind of request."""
KNOWN = {
    "model": "tiny",
    "name": "bold",
    "steering": {"profile": "shy"},
    "messages": MESSAGES,
    "arms": [{"profile": "raw"}, {"profile": "bold", "strength": 0.5}],
}
KNOWN_OF_EXPERIMENTS = {"name": "trial", "arm": "treated", "version": 1}
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


def operations() -> list[tuple[str, str]]:
    paths = get("/openapi.json").json()["paths"]
    return [(path, method) for path, methods in paths.items() for method in methods]


@pytest.fixture(scope="module")
def schema() -> Any:
    load_all_checks()
    engine = LocalEngine(make_model("llama"), max_num_seqs=16, max_model_len=96)
    with live_server(hosting(experiment(), host=make_host(engine))) as address:
        yield schemathesis.openapi.from_url(f"{address}/openapi.json")


@pytest.mark.parametrize(("path", "method"), operations())
def test_every_answer_is_one_that_the_document_declares(
    schema: Any, path: str, method: str
) -> None:
    operation = schema[path][method]
    statuses: Counter[int] = Counter()
    plain = not operation.body and not operation.path_parameters
    modes = (GenerationMode.POSITIVE,) if plain else tuple(GenerationMode)
    for mode in modes:
        _run(operation, mode, 3 if plain else EXAMPLES, statuses)
    expected = {"delete": 404}.get(method, 200)
    # A profile file is not guessed, nor an experiment's arms.
    if path not in ("/v1/steering/profiles", "/v1/experiments") or method == "get":
        assert statuses[expected], statuses


def _run(operation: Any, mode: GenerationMode, examples: int, statuses: Counter[int]) -> None:
    """Make requests of the document's kind, or of no kind that it allows, and check the answers."""
    of_experiments = "/v1/experiments" in operation.path and operation.method != "delete"

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), known=st.booleans())
    def run(case: Any, known: bool) -> None:
        if known:  # what no generator can guess
            for key, value in (KNOWN_OF_EXPERIMENTS if of_experiments else KNOWN).items():
                for where in (case.body, case.path_parameters, case.query):
                    if isinstance(where, dict) and key in where:
                        where[key] = value
        response = case.call(timeout=30)
        statuses[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    run()
