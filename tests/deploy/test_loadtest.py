"""The load generator starts before its server does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

LOCUSTFILE = Path(__file__).parents[2] / "deploy/loadtest/locustfile.py"


class LateServer(ThreadingHTTPServer):
    """Is ready when it was asked three times whether it is."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()
        self.too_early = 0

    def answer(self, path: str) -> tuple[int, object]:
        self.asked[path] += 1
        if self.asked["/ready"] < 3:
            self.too_early += path != "/ready"
            return 503, {}
        if path == "/v1/models":
            return 200, {"data": [{"id": "demo"}]}
        return 200, {}


class Handler(BaseHTTPRequestHandler):
    server: LateServer

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, body = self.server.answer(self.path)
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_locust_waits_for_a_server_that_is_not_ready() -> None:
    with LateServer() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            host = f"http://127.0.0.1:{server.server_address[1]}"
            command = [
                sys.executable, "-m", "locust", "--locustfile", str(LOCUSTFILE), "--host", host,
                "--headless", "--users", "1", "--run-time", "4s", "--exit-code-on-error", "0",
            ]  # fmt: skip
            done = subprocess.run(
                command,
                env={**os.environ, "PYTHONPATH": str(LOCUSTFILE.parents[2])},
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
        finally:
            server.shutdown()
            thread.join()
    assert server.asked["/v1/chat/completions"] > 0, done.stderr
    assert server.too_early == 0
