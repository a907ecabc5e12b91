"""Models that a server can load, with random weights and replies that can be read, and servers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A token per byte for prompts; the other ids are words, so that every reply is text."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols += [f"Ġ{i}" for i in range(len(symbols), vocabulary)]
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = _TEMPLATE
    return fast


def chat(tokenizer: Any, tokens: int, seed: int, system: str = "") -> list[dict[str, str]]:
    """A conversation of this many tokens in all, which differs from others from the start of its
    question."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": ""})
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    missing = tokens - len(rendered["input_ids"])
    assert missing > 0
    letters = torch.randint(97, 123, (missing,), generator=torch.Generator().manual_seed(seed))
    messages[-1]["content"] = "".join(map(chr, letters.tolist()))
    return messages


class Server:
    """A server in a process of its own, stopped (SIGSTOP) but where it is used."""

    def __init__(self, process: subprocess.Popen[bytes], address: str, model: str) -> None:
        self.process = process
        self.address = address
        self.model = model

    @contextmanager
    def running(self) -> Iterator[None]:
        self.process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGSTOP)


@contextmanager
def served(command: Sequence[str], model: str) -> Iterator[Server]:
    """A server whose command ends in a port, on one thread."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    quiet = subprocess.DEVNULL
    process = subprocess.Popen([*command, str(port)], env=environment, stdout=quiet, stderr=quiet)
    server = Server(process, f"http://127.0.0.1:{port}", model)
    try:
        _wait_for(server)
        yield server
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(server: Server) -> None:
    deadline = time.monotonic() + 300
    while True:
        try:
            with urllib.request.urlopen(f"{server.address}/health"):
                return
        except OSError:
            if server.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{server.process.args!r} does not answer") from None
            time.sleep(0.2)


def pilothouse(folder: Path) -> list[str]:
    serve = ["-m", "server.cli", "serve", "--model", str(folder), "--threads", "1"]
    return [sys.executable, *serve, "--port"]


def transformers(folder: Path) -> list[str]:
    """With the limits of `bench_engine`; its own ones on a CPU take most of the memory."""
    limits = ["--cb-block-size", "32", "--cb-num-blocks", "512", "--cb-max-batch-tokens", "1024"]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder)]
    return [*command, "--continuous-batching", "--device", "cpu", *limits, "--port"]
