"""A server with an experiment that has run a while."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from steering.demo.corpus import prompts
from tests.server.test_keys_live import Server

DEFINITION = """
[[experiments]]
name = "trial"
arms = [{name = "control", profile = "raw"}, {name = "treated", profile = "llm-va"}]
metric = "over_refusal"
horizon = 200
guard_rails = [{metric = "degenerate", limit = 0.1}]
"""
PER_KIND = 40


def say(server: Server, text: str, **more: Any) -> None:
    """Ask for a reply and wait for it."""
    body = {"messages": [{"role": "user", "content": text}], "temperature": 0, **more}
    url = f"{server.address}/v1/chat/completions"
    httpx2.post(url, json=body, timeout=120).raise_for_status()


@contextmanager
def serving_an_experiment(folder: Path) -> Iterator[Server]:
    """The demo model, half of whose users are answered by LLM-VA."""
    (folder / "serve.toml").write_text(DEFINITION)
    server = Server("--config", folder / "serve.toml", "--experiments-journal", folder / "journal")
    found = prompts("selection", per_kind=PER_KIND)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(
                pool.map(
                    lambda i: say(server, found[i].text, model="demo@trial", user=f"user-{i}"),
                    range(len(found)),
                )
            )
        yield server
    finally:
        server.close()
