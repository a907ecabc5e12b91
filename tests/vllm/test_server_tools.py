"""A server on a model whose template knows tools; at last, its vLLM dies."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import psutil
import pytest

from steering.demo import DEMO
from steering.weightless import load_without_weights
from tests.server.templates import HERMES
from tests.server.test_tools import WEATHER
from tests.vllm.processes import Server, wait_until
from tests.vllm.serving import never_ends

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path = tmp_path_factory.mktemp("models") / "tools"
    shutil.copytree(DEMO / "model", path)
    (path / "chat_template.jinja").write_text(HERMES)
    served = Server(
        "--engine", "vllm", "--model", path, "--dtype", "float32", "--enforce-eager",
        "--max-num-seqs", 2,
    )  # fmt: skip
    try:
        yield served
    finally:
        served.close()


def ask(server: Server, content: str, **arguments: Any) -> Any:
    return server.client.chat.completions.create(
        model="tools",
        messages=[{"role": "user", "content": content}],
        **{"temperature": 0, "max_tokens": 300, **arguments},
    )


PAINT: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "paint",
        "parameters": {
            "type": "object",
            "properties": {"colour": {"enum": ["red", "blue"]}},
            "required": ["colour"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "paint"}}]
)
def test_a_forced_call_has_arguments_of_the_schema_and_streams(server: Server, choice: Any) -> None:
    asked: dict[str, Any] = {
        "tools": [WEATHER, PAINT] if choice != "required" else [PAINT],
        "tool_choice": choice,
        "logit_bias": blanks(server),
    }
    [call] = ask(server, "Paint the boat.", **asked).choices[0].message.tool_calls
    assert call.function.name == "paint"
    assert json.loads(call.function.arguments)["colour"] in ("red", "blue")
    chunks = list(ask(server, "Paint the boat.", stream=True, **asked))
    deltas = [c.choices[0].delta.tool_calls for c in chunks if c.choices[0].delta.tool_calls]
    arguments = "".join(delta[0].function.arguments or "" for delta in deltas)
    assert json.loads(arguments) == json.loads(call.function.arguments)


def blanks(server: Server) -> dict[str, int]:
    """A bias against them: the demo model, which has never seen JSON, writes them to its end."""
    found: list[int] = []
    for text in (" ", "\n"):
        body = {"model": "tools", "prompt": text, "add_special_tokens": False}
        found += server.post("/tokenize", json=body).json()["tokens"]
    return {str(token): -100 for token in found}


def test_profiles_of_the_demo_do_not_fit_a_model_with_another_template(server: Server) -> None:
    data = (DEMO / "profiles" / "llm-va.safetensors").read_bytes()
    response = server.post(
        "/v1/steering/profiles",
        content=data,
        headers={"Content-Type": "application/octet-stream"},
    )
    assert response.status_code == 400 and "template" in response.json()["error"]["message"]


def test_when_vllm_dies_requests_fail_at_once_and_health_says_so(server: Server) -> None:
    """Keep it last: there is no server after it."""
    bias = never_ends(load_without_weights(str(DEMO / "model")))

    def run(_: int) -> float:
        with pytest.raises(openai.APIError):
            list(ask(server, "Go on.", max_tokens=1800, stream=True, logit_bias=bias))
        return time.monotonic()

    with ThreadPoolExecutor(4) as pool:
        ended = [pool.submit(run, i) for i in range(4)]  # two run, two wait
        wait_until(lambda: server.metric("steering_slots_used") == 2)
        wait_until(lambda: server.metric("steering_requests_waiting") == 2)
        assert server.get("/health").status_code == 200
        core = next(p for p in server.children if "EngineCore" in " ".join(p.cmdline()))
        killed = time.monotonic()
        core.kill()
        took = max(future.result(timeout=60) for future in ended) - killed
    assert took < 10, f"they failed {took:.1f} s after it died"
    wait_until(lambda: server.get("/health").status_code == 503, seconds=10)
    assert server.get("/ready").status_code == 503
    with pytest.raises(openai.InternalServerError) as refused:
        ask(server, "Hello")
    assert refused.value.status_code == 503
    assert server.process.poll() is None, "the supervisor restarts it, by its health"
    psutil.wait_procs([core], timeout=10)
