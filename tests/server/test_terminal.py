"""`pilothouse chat`: columns, plain output, JSON, and a real terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from server.cli import main
from server.commands.chat import parse_profiles
from server.engine.local import LocalEngine
from server.terminal.columns import Column, Conversation, Reply
from server.terminal.show import colour, reply_text, safe, table
from server.terminal.sources import Local, Remote
from steering.models import LanguageModel
from tests.conftest import make_model
from tests.server.fakes import FakeEngine, make_host, make_profile
from tests.server.live import live_server, wait_until
from tests.server.test_access import RED, guarded

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PILOTHOUSE_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def profiles(saved: LanguageModel, tmp_path: Path) -> Path:
    """A folder with the profile bold."""
    make_profile("bold", saved, strength=3.0).save(tmp_path / "bold.safetensors")
    return tmp_path


def entry(offset: int, value: float | None = 0.5) -> dict[str, Any]:
    scores = dict.fromkeys(("answer_probability", "benign_probability", "edit_norm"), value)
    return {"token": "?", "offset": offset, **scores}


def replied(text: str, **changes: Any) -> Reply:
    return Reply(text=text, **changes)


def drawn(columns: list[Column], width: int = 80, **options: Any) -> list[str]:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        console.print(table(columns, "none", console, **options))
        return [line.rstrip() for line in console.export_text().splitlines()]


# Columns.


def test_histories_part_after_the_first_turn_and_can_be_taken_back() -> None:
    talk = Conversation([Column("raw"), Column("bold", 0.5)], {"temperature": 0})
    body = talk.ask("Hi")
    turn = {"role": "user", "content": "Hi"}
    assert body == {
        "temperature": 0,
        "messages": [turn],
        "arms": [
            {"profile": "raw", "messages": [turn]},
            {"profile": "bold", "strength": 0.5, "messages": [turn]},
        ],
    }
    for index, text in enumerate(("A", "B")):
        choice = {"index": index, "delta": {"content": text}, "finish_reason": "stop"}
        talk.take({"choices": [choice]})
    talk.end()
    arms = talk.ask("And?")["arms"]
    assert [arm["messages"][1]["content"] for arm in arms] == ["A", "B"]
    failed = {"index": 1, "delta": {}, "finish_reason": "error", "error": {"message": "no"}}
    talk.take({"choices": [{"index": 0, "delta": {"content": "C"}, "finish_reason": "stop"}]})
    talk.take({"choices": [failed]})
    talk.end()
    assert [len(column.history) for column in talk.columns] == [4, 2]  # a failure is no history
    assert talk.take_back() == "And?"
    assert [len(column.history) for column in talk.columns] == [2, 2]
    assert talk.take_back() is None
    talk.clear()
    assert [column.history for column in talk.columns] == [[], []]


def test_strengths_are_set_by_name_or_number() -> None:
    talk = Conversation([Column("raw"), Column("bold"), Column("bold", 2.0)], {})
    talk.set_strength("bold", 0.5)
    assert [column.strength for column in talk.columns] == [None, 0.5, 0.5]
    talk.set_strength("3", None)
    assert [column.strength for column in talk.columns] == [None, 0.5, None]
    with pytest.raises(ValueError, match="no column shy; there are raw, bold"):
        talk.set_strength("shy", 1.0)
    assert parse_profiles("raw, bold=0.5,") == [("raw", None), ("bold", 0.5)]
    for wrong in ("", "bold=x", "bold=nan", "bold=inf"):
        with pytest.raises(ValueError):
            parse_profiles(wrong)


def test_what_has_no_edits_has_no_strength_to_tell_of() -> None:
    raw, bold = Column("raw"), Column("bold")
    for column, fingerprint in ((raw, ""), (bold, "abc")):
        told = {"profile": column.profile, "fingerprint": fingerprint, "strength": 3.0}
        column.reply.take({"delta": {}, "finish_reason": None, "steering": told})
    assert [raw.title, bold.title] == ["raw", "bold \u00d7 3"]


def test_a_reply_is_cut_where_its_tokens_begin() -> None:
    reply = replied("h\u00e9\U0001f642!", trace=[entry(0), entry(1), entry(1), entry(2), entry(3)])
    pieces = list(reply.tokens())
    assert [text for text, _ in pieces] == ["h", "\u00e9", "\U0001f642", "!"]
    assert pieces[1][1] is reply.trace[2]
    assert list(replied("abc").tokens()) == [("abc", None)]
    assert list(replied("", trace=[entry(0)]).tokens()) == []
    assert [text for text, _ in replied("abc", trace=[entry(1)]).tokens()] == ["a", "bc"]


def test_a_models_text_does_not_steer_the_terminal() -> None:
    text = "\x1b[31mred\x07 \x9b1m \u202eback\x7f\r\n\tkept [bold]"
    shown = safe(text)
    assert len(shown) == len(text) and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", shown)
    assert "\n\tkept [bold]" in shown
    assert reply_text(replied(text), "none").plain == shown
    lines = drawn([Column("[red]x[/]", reply=replied("[bold]a[/bold]"))])
    assert lines[0].startswith("[red]x[/]") and lines[1] == "[bold]a[/bold]"


def test_tokens_are_tinted_by_the_score_asked_for() -> None:
    low, high = entry(0, 0.0), entry(0, 1.0)
    for tint in ("answer", "benign", "edit"):
        assert colour(tint, low) != colour(tint, high)  # type: ignore[arg-type]
        assert colour(tint, low).startswith("black on #")  # type: ignore[arg-type]
        assert colour(tint, entry(0, None)) == colour(tint, None) == ""  # type: ignore[arg-type]
    assert colour("none", high) == ""
    assert colour("edit", entry(0, 7.0)) == colour("edit", high)


def test_columns_stand_side_by_side_and_below_each_other_where_they_do_not_fit() -> None:
    columns = [Column(name, reply=replied(f"This is {name}.")) for name in ("one", "two", "three")]
    assert "one" in drawn(columns)[0] and "three" in drawn(columns)[0]
    narrow = drawn(columns, width=40)
    assert [line for line in narrow if line.startswith("This is")] == [
        "This is one.", "This is two.", "This is three.",
    ]  # fmt: skip
    pairs = drawn([*columns, Column("four")], width=60)
    assert "two" in pairs[0] and "three" not in pairs[0]


def test_a_growing_reply_shows_its_end_and_a_whole_one_all() -> None:
    columns = [Column("one", reply=replied("\n".join(f"line {i}" for i in range(50))))]
    growing = drawn(columns, rows=13)
    assert len(growing) <= 13 and "line 49" in growing and "line 3" not in growing
    whole = drawn(columns)
    assert "line 0" in whole and "line 49" in whole


# The command.


def chat(*arguments: object) -> int:
    return main(["chat", *map(str, arguments)])


def test_one_question_is_answered_by_every_profile_and_told_plainly(
    model_path: Path, profiles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--model", model_path, "--profile", profiles, "--prompt", "Hi", "--max-tokens", 8)
    assert chat(*asked) == 0
    out = capsys.readouterr().out
    assert re.match(r"== raw\n.+\n   \w+, cut off\n== bold \u00d7 3\n", out, re.DOTALL)
    assert chat(*asked, "--profiles", "bold=0,raw", "--json") == 0
    turn = json.loads(capsys.readouterr().out)
    off, raw = turn["choices"]
    assert turn["prompt"] == "Hi" and off["message"] == raw["message"]
    assert (off["steering"]["profile"], off["steering"]["strength"]) == ("bold", 0)
    assert raw["usage"]["completion_tokens"] == 8 and raw["finish_reason"] == "length"
    assert len(raw["steering"]["trace"]) > 0 and "error" not in raw
    assert safe(out) == out


def test_lines_of_a_pipe_are_turns_and_commands(
    model_path: Path,
    profiles: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = iter(["Hi", "", "/strength bold 0", "/retry", "/clear", "/nope", "/retry", "/help"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, None) or _end(lines))
    asked = ("--model", model_path, "--profile", profiles, "--max-tokens", 6, "--json")
    assert chat(*asked) == 1  # something went wrong
    captured = capsys.readouterr()
    turns = [json.loads(line) for line in captured.out.splitlines() if line.startswith("{")]
    assert [turn["prompt"] for turn in turns] == ["Hi", "Hi"]
    strengths = [turn["choices"][1]["steering"]["strength"] for turn in turns]
    assert strengths == [3.0, 0.0]
    raw, bold = (choice["message"] for choice in turns[1]["choices"])
    assert raw == bold
    assert "/nope is no command" in captured.err and "nothing to ask again" in captured.err
    assert "/strength NAME X" in captured.out


def _end(lines: Iterator[str]) -> str:
    """An empty line, or the end of the input."""
    if lines.__length_hint__() == 0:  # type: ignore[attr-defined]
        raise EOFError
    return ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--profiles", "raw,shy"), "there is no profile shy; there are raw, bold"),
        (("--profiles", "bold=1e9"), "arms[0].strength"),
        (("--profiles", "bold=x"), "'x' is no strength"),
        (("--temperature", "3"), "'temperature'"),
        (("--max-tokens", "100000"), "tokens, prompt and reply together"),
    ],
)
def test_what_cannot_be_asked_is_one_line_that_says_why(
    arguments: tuple[str, ...],
    says: str,
    model_path: Path,
    profiles: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ("--model", model_path, "--profile", profiles, "--prompt", "Hi")
    assert chat(*asked, *arguments) == 2
    [line] = [li for li in capsys.readouterr().err.splitlines() if "error: " in li]
    assert says in line


def test_a_running_server_answers_the_same(
    model_path: Path, profiles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--prompt", "Hi", "--max-tokens", 8, "--json", "--profiles", "raw,bold=2")
    lm = make_model("llama")
    host = make_host(LocalEngine(lm, max_num_seqs=4, max_model_len=200))
    with live_server(host) as address:
        assert chat("--url", address, *asked) == 0
    there = json.loads(capsys.readouterr().out)
    assert chat("--model", model_path, "--profile", profiles, *asked) == 0
    here = json.loads(capsys.readouterr().out)
    for one, other in zip(there["choices"], here["choices"], strict=True):
        assert one["message"] == other["message"] and one["usage"] == other["usage"]


def test_a_servers_refusals_are_told_in_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert chat("--url", "http://127.0.0.1:9", "--prompt", "Hi") == 2
    assert "cannot reach http://127.0.0.1:9" in capsys.readouterr().err
    assert chat("--url", "127.0.0.1:9", "--prompt", "Hi") == 2
    assert "write http://host:port" in capsys.readouterr().err
    with live_server(guarded()) as address:
        assert chat("--url", address, "--prompt", "Hi") == 2
        assert "needs a key" in capsys.readouterr().err
        with_key = ("--url", address, "--prompt", "Hi", "--key")
        assert chat(*with_key, "ph-user", "--profiles", RED) == 2
        assert f"no profile {RED}; there are raw, bold, shy" in capsys.readouterr().err
        assert chat(*with_key, "ph-red", "--profiles", RED) == 0
        assert f"== {RED} \u00d7 1.5 (red-team)" in capsys.readouterr().out
        assert chat(*with_key, "ph-red") == 0  # red-team profiles come only by name
        assert RED not in capsys.readouterr().out


def test_a_server_that_stops_in_the_middle_is_an_error_and_no_end() -> None:
    engine = FakeEngine("x" * 150, delay=0.02)
    with live_server(make_host(engine)) as address:
        source = Remote(address, None)
        body = {"messages": [{"role": "user", "content": "Hi"}], "arms": [{"profile": "raw"}]}
        events = source.compare(body)
        next(events)
        engine.close()
        [last] = [event for event in events if event["choices"]][-1:]
    assert last["choices"][0]["error"]["code"] == "engine_stopped"


def test_leaving_a_comparison_frees_the_slots_here_too() -> None:
    engine = LocalEngine(make_model("llama"), max_num_seqs=2, max_model_len=250)
    source = Local(make_host(engine))
    try:
        body = {
            "messages": [{"role": "user", "content": "Hi"}],
            "arms": [{"profile": "raw"}, {"profile": "bold"}],
            "max_tokens": 200,
            "temperature": 2.0,
        }
        events = source.compare(body)
        next(events)
        assert engine.stats().slots_used + engine.stats().waiting > 0
        events.close()
        wait_until(lambda: engine.stats().slots_used == 0)
        assert list(source.compare({**body, "max_tokens": 2}))[-1]["usage"]["total_tokens"] > 0
    finally:
        source.close()


# A terminal.


def _take_terminal() -> None:
    ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which shells ignore for what runs behind them


class Terminal:
    """A process with a terminal of its own."""

    def __init__(self, *command: str, columns: int = 100, rows: int = 30) -> None:
        self._end, theirs = pty.openpty()
        ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=environment,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(theirs)
        self.shown = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._end, 65536)
            except OSError:  # the process has ended
                return
            if not data:
                return
            self.shown += data.decode("utf-8", "replace")

    def type(self, keys: str) -> None:
        os.write(self._end, keys.encode())

    def wait_for(self, pattern: str, seconds: float = 60.0) -> None:
        wait_until(lambda: re.search(pattern, self.shown) is not None, seconds)

    def close(self) -> int:
        try:
            return self.process.wait(20)
        finally:
            self.process.kill()
            self._reader.join()
            os.close(self._end)


def test_in_a_terminal_columns_grow_side_by_side_and_can_be_stopped() -> None:
    engine = FakeEngine("Of course. " * 200, delay=0.02)  # surely not over before Ctrl-C
    with live_server(make_host(engine)) as address:
        terminal = Terminal(
            sys.executable, "-m", "server.cli", "chat", "--url", address, "--profiles", "raw,bold"
        )
        try:
            terminal.wait_for("> ")
            terminal.type("Hi\n")
            terminal.wait_for("Of.{0,40}course")
            terminal.type("\x03")  # Ctrl-C
            terminal.wait_for("stopped")
            wait_until(lambda: len(engine.cancelled) == 2)
            # Both columns have the row of their titles, and tokens are tinted.
            assert re.search(r"raw\b.*bold \u00d7 0\.5", terminal.shown)
            assert "48;5;" in terminal.shown or "48;2;" in terminal.shown
            terminal.type("\x03/tint none\n/quit\n")  # at the prompt, Ctrl-C leaves nothing
        finally:
            assert terminal.close() == 0
    assert "Traceback" not in terminal.shown


def test_a_terminal_that_ends_its_input_is_left_quietly() -> None:
    with live_server(make_host()) as address:
        terminal = Terminal(sys.executable, "-m", "server.cli", "chat", "--url", address)
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.close() == 0
    assert "Traceback" not in terminal.shown
