"""`pilothouse eval`, from the command line to the page."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForSequenceClassification

from server.cli import main
from steering.demo.suite import meanings
from steering.models import load_model
from tests.conftest import FAMILIES, make_model, make_tokenizer
from tests.server.fakes import make_profile


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PILOTHOUSE_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model, a profile and what to evaluate on."""
    path = tmp_path_factory.mktemp("eval")
    lm = make_model("llama")
    lm.model.save_pretrained(path / "tiny")
    lm.tokenizer.save_pretrained(path / "tiny")
    make_profile("bold", load_model(str(path / "tiny"))).save(path / "bold.safetensors")
    (path / "bad.txt").write_text("wreck it\nburn it\n")
    (path / "good.txt").write_text("mend it\npaint it\n")
    (path / "text.txt").write_text("some words to be predicted, one after the other")
    (path / "quiz.jsonl").write_text(
        json.dumps({"question": "Which?", "choices": ["this", "that"], "answer": "B"})
    )
    yield path


def command(folder: Path, out: Path, *more: object) -> list[str]:
    arguments = (
        "eval", "--model", folder / "tiny", "--profile", folder / "bold.safetensors",
        "--prompts", f"{folder / 'bad.txt'}:harmful", "--prompts", f"{folder / 'good.txt'}:benign",
        "--out", out, "--max-tokens", 9, "--kl-tokens", 8, "--threads", 1, "--max-num-seqs", 4,
        *more,
    )  # fmt: skip
    return [str(argument) for argument in arguments]


def test_the_command_writes_table_json_plots_and_page_and_resumes(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    more = (
        "--text", folder / "text.txt", "--choices", folder / "quiz.jsonl", "--strengths", "0,0.25",
    )  # fmt: skip
    assert main(command(folder, tmp_path, *more)) == 0
    printed = capsys.readouterr().out
    assert "bold at 0.25" in printed and "perplexity" in printed and str(tmp_path) in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert [arm["name"] for arm in results["arms"]] == ["raw", "bold at 0", "bold at 0.25", "bold"]
    assert results["model"]["fingerprint"]["weights"]
    responses = (tmp_path / "responses.jsonl").read_text()
    assert len(responses.splitlines()) == 3 * 4, "strength 0 is raw"
    assert (tmp_path / "report.html").is_file() and (tmp_path / "f1.png").is_file()
    assert main(command(folder, tmp_path, *more)) == 0
    assert (tmp_path / "responses.jsonl").read_text() == responses
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["arms"] == results["arms"] and again["throughput"] == results["throughput"]


DOOMED = """
import os, signal, sys, time
from server.cli import main
from server.engine.runner import Runner
from steering.evaluate.responses import ResponseLog

# Whoever runs the tests in the background may have switched it off.
signal.signal(signal.SIGINT, signal.default_int_handler)
add = ResponseLog.add

def add_and_be_stopped(log, response):
    add(log, response)
    if len(log.found) == 3:
        os.kill(os.getpid(), int(sys.argv[1]))

ResponseLog.add = add_and_be_stopped

# So slow that the signal is seen before the last reply, on the busiest machine.
def run_slowly(*args, **more):
    time.sleep(0.1)
    return run(*args, **more)

run, Runner.run = Runner.run, run_slowly
sys.exit(main(sys.argv[2:]))
"""
"""The command, in a process that gets a signal once three replies are there."""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill", "interrupt"])
def test_a_process_that_was_stopped_goes_on_to_the_same_results(
    folder: Path, tmp_path: Path, number: int
) -> None:
    torn = command(folder, tmp_path / "torn", "--no-plots")
    stopped = subprocess.run(
        [sys.executable, "-c", DOOMED, str(int(number)), *torn],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=300,
    )
    if number == signal.SIGINT:
        assert stopped.returncode == 130
        assert "Traceback" not in stopped.stderr
        last = stopped.stderr.splitlines()[-1]
        assert last.startswith("Interrupted") and "the same command goes on" in last
    else:
        assert stopped.returncode == -signal.SIGKILL
    assert not (tmp_path / "torn" / "results.json").exists()
    kept = (tmp_path / "torn" / "responses.jsonl").read_text().splitlines()
    assert 3 <= len(kept) < 8
    assert main(torn) == 0
    assert main(command(folder, tmp_path / "whole", "--no-plots")) == 0
    resumed, whole = (comparable(tmp_path / name) for name in ("torn", "whole"))
    assert resumed == whole
    replies = (tmp_path / "torn" / "responses.jsonl").read_text().splitlines()
    assert [json.loads(line)["reply"] for line in replies[:3]] == [
        json.loads(line)["reply"] for line in kept[:3]
    ]


def comparable(out: Path) -> dict[str, Any]:
    """The results without the clock's, and without what rounding in another batch may touch."""
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    for arm in results["arms"]:
        del arm["decode_tokens_per_second"], arm["scores"]
    return {k: v for k, v in results.items() if k not in ("date", "throughput")}


def test_a_classifier_is_a_drop_in(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    config = FAMILIES["llama"]()
    config.vocab_size = len(make_tokenizer())
    config.id2label, config.label2id = {0: "NORMAL", 1: "REJECTION"}, {"NORMAL": 0, "REJECTION": 1}
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "labels")
    make_tokenizer().save_pretrained(tmp_path / "labels")
    out = tmp_path / "out"
    assert main(command(folder, out, "--no-plots")) == 0
    before = (out / "responses.jsonl").read_text().splitlines()
    capsys.readouterr()
    judge = ("--judge", f"hf:{tmp_path / 'labels'}", "--judge-batch", "3")
    assert main(command(folder, out, "--no-plots", *judge)) == 0
    printed = capsys.readouterr().out
    assert "Judge labels-1:labels@" in printed and "sensitivity" in printed
    results = json.loads((out / "results.json").read_text())
    assert results["judge"]["version"].startswith("labels-1:labels@")
    after = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    assert [line["reply"] for line in after] == [json.loads(line)["reply"] for line in before]
    assert {line["judge"] for line in after} == {results["judge"]["version"]}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--strengths", "0,x"), "write numbers"),
        (("--prompts", "/no/such.txt:harmful"), "cannot be read"),
        (("--limit", "0"), "--limit"),
        (("--kl-tokens", "3"), "at least 8"),
        (("--text", "/no/such/text"), "cannot be read"),
        (("--dtype", "int3"), "--dtype"),
        (("--judge", "coin"), "--judge coin: write phrases, hf:ID"),
        (("--judge", "hf:/no/such/wildguard"), "cannot use"),
    ],
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    tmp_path: Path,
    more: tuple[str, ...],
    says: str,
) -> None:
    assert main(command(folder, tmp_path, *more)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1 and says in lines[0]


def test_a_model_without_prompts_is_a_mistake(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    assert main(["eval", "--model", str(folder / "tiny"), "--out", str(tmp_path)]) == 2
    assert "--prompts" in capsys.readouterr().err


def test_the_demo_is_one_command(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    arguments = ["eval", "--out", str(tmp_path), "--limit", "1", "--no-plots", "--threads", "1"]
    assert main([*arguments, "--kl-prompts", "2", "--choices", str(folder / "quiz.jsonl")]) == 0
    assert "optimal-transport" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert [p["name"] for p in results["prompts"]] == ["combinations", "phrasings", "wrappers"]
    assert results["model"]["name"] == "demo"
    assert results["settings"]["max_tokens"] == 64


def test_the_demos_word_meanings_have_one_right_choice_each() -> None:
    found = meanings()
    assert len({question.question for question in found}) == len(found) > 100
    assert {len(question.choices) for question in found} == {2}
    (piano,) = (q for q in found if q.question == "What kind of thing is the piano?")
    assert piano.choices[piano.answer] == "The piano is something people care about."
