"""Traffic as a public service gets it: benign, borderline, harmful and wrapped prompts.

    locust -f deploy/loadtest/locustfile.py --host http://127.0.0.1:8000 --headless -u 4

Prompts are of the demo model's synthetic corpus, headlines without any instructions. Users have
ids and keep them, so that an experiment keeps them on their arms. Requests are spread over the
profiles that the key sees; with `--experiment NAME` (repeatable), half of the users take part in
one. About half of the requests stream. Locust's figures are whole responses; `first token` is the
time to the first piece of text of a stream.

The key comes from `--api-key`, or the file `--api-key-file`, or neither. A server that is not ready
yet is waited for.
"""

from __future__ import annotations

import itertools
import json
import logging
import random
import time
import urllib.request
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from locust import HttpUser, between, events, task
from locust.env import Environment

from steering.demo.corpus import Kind, prompts

WEIGHTS: dict[Kind, int] = {"benign": 6, "borderline": 2, "harmful": 1, "jailbroken": 1}
"""How often each kind of prompt is asked."""

_PROMPTS = {
    kind: [prompt.text for prompt in prompts("test", (kind,), per_kind=200)] for kind in WEIGHTS
}
_numbers = itertools.count()
READY_SECONDS = 300.0
"""How long a server is waited for."""

logger = logging.getLogger(__name__)


@events.init_command_line_parser.add_listener
def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--api-key", default="", help="of the server, if it has keys")
    parser.add_argument("--api-key-file", default="", help="file that holds the key")
    parser.add_argument("--experiment", action="append", default=[], help="half of the users join")
    parser.add_argument("--max-tokens", type=int, default=32, help="of a reply")


@events.test_start.add_listener
def _read_key(environment: Environment, **_: Any) -> None:
    options = environment.parsed_options
    assert options is not None
    if options.api_key_file:
        options.api_key = Path(options.api_key_file).read_text("utf-8").strip()


@events.test_start.add_listener
def _wait_for_the_server(environment: Environment, **_: Any) -> None:
    # A user who fails at the start asks nothing, and does not try again.
    url, deadline = f"{environment.host}/ready", time.monotonic() + READY_SECONDS
    while True:
        try:
            urllib.request.urlopen(url, timeout=10).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                logger.error("%s: %s", url, error)
                environment.process_exit_code = 1
                assert environment.runner is not None
                environment.runner.quit()
                return
        time.sleep(0.5)


class Client(HttpUser):
    """One user of the service, who asks, reads and asks again."""

    wait_time = between(0.2, 1.0)

    def on_start(self) -> None:
        options = self.environment.parsed_options
        assert options is not None
        number = next(_numbers)
        self.name = f"user-{number}"
        self.random = random.Random(number)
        self.max_tokens = options.max_tokens
        self.headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
        listed = self.client.get("/v1/models", headers=self.headers, name="GET /v1/models").json()
        models = [model["id"] for model in listed["data"]]
        served = models[0].partition(":")[0]
        if options.experiment and number % 2:
            self.models = [f"{served}@{self.random.choice(options.experiment)}"]
        else:
            self.models = [model for model in models if "@" not in model]

    @task
    def ask(self) -> None:
        (kind,) = self.random.choices(list(WEIGHTS), weights=list(WEIGHTS.values()))
        body = {
            "model": self.random.choice(self.models),
            "messages": [{"role": "user", "content": self.random.choice(_PROMPTS[kind])}],
            "max_tokens": self.max_tokens,
            "safety_identifier": self.name,
        }
        if self.random.random() < 0.5:
            self._stream(body, kind)
        else:
            path = "/v1/chat/completions"
            self.client.post(path, json=body, headers=self.headers, name=f"chat, {kind}")

    def _stream(self, body: dict[str, Any], kind: Kind) -> None:
        since = time.perf_counter()
        first: float | None = None
        with self.client.post(
            "/v1/chat/completions",
            json=body | {"stream": True},
            headers=self.headers,
            name=f"chat, {kind}, streamed",
            stream=True,
            catch_response=True,
        ) as response:
            finished = False
            if response.status_code == 200:
                # By bytes: larger pieces would be waited for, and the first token with them.
                for line in response.iter_lines(chunk_size=1):
                    text = line.decode()
                    if text == "data: [DONE]":
                        finished = True
                    elif text.startswith("data: {"):
                        event = json.loads(text.removeprefix("data: "))
                        if "error" in event:
                            break
                        choices = event["choices"]
                        if first is None and choices and choices[0]["delta"].get("content"):
                            first = time.perf_counter() - since
            # Else it would be the time to the headers.
            response.request_meta["response_time"] = 1000 * (time.perf_counter() - since)
            if not finished:
                response.failure(f"the stream broke off (status {response.status_code})")
        if first is not None:
            self.environment.events.request.fire(
                request_type="SSE",
                name="first token",
                response_time=1000 * first,
                response_length=0,
                exception=None,
                context={},
            )
