"""Stop strings end a reply and are never shown, not even in part."""

from __future__ import annotations

import random
from typing import Any

import pytest

from server.stops import StopStrings
from tests.server.fakes import FakeEngine, body, events, make_host, post


def shown(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    scanner = StopStrings(stops)
    found = [scanner.push(piece) for piece in pieces]
    if not scanner.stopped:
        found.append(scanner.flush())
    return found, scanner.stopped


def test_without_stop_strings_everything_passes_at_once() -> None:
    assert shown([], ["a", "", "bc"]) == (["a", "", "bc", ""], False)


def test_text_that_may_become_a_stop_string_is_held_back_until_it_is_none() -> None:
    assert shown(["END"], ["aE", "N", "x", "EN"]) == (["a", "", "ENx", "", "EN"], False)
    assert shown(["END"], ["aE", "N", "Dx"]) == (["a", "", ""], True)


def test_a_stop_string_that_begins_with_itself_is_found() -> None:
    assert shown(["aab"], list("aaab")) == (["", "", "a", ""], True)


def test_the_string_that_is_complete_first_ends_the_text() -> None:
    for pieces in (["xabc"], ["xab", "c"], list("xabc")):
        assert "".join(shown(["abc", "b"], pieces)[0]) == "xa"
        assert "".join(shown(["bc", "abc"], pieces)[0]) == "x"


def test_what_is_shown_does_not_depend_on_the_pieces_and_holds_no_part_of_a_stop() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices("ab🙂", k=rng.randint(0, 12)))
        stops = [
            "".join(rng.choices("ab🙂", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 4))
        ]
        cuts = sorted(rng.choices(range(len(text) + 1), k=3))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        found, stopped = shown(stops, pieces)
        ends = {text.find(s) + len(s) for s in stops if s in text}
        assert stopped == bool(ends)
        if not ends:
            assert "".join(found) == text
        else:
            cut = min(text[: min(ends)].find(s) for s in stops if text[: min(ends)].endswith(s))
            assert "".join(found) == text[:cut]
        assert ("".join(found), stopped) == (
            "".join(shown(stops, list(text))[0]),
            shown(stops, list(text))[1],
        )


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("wör", "Hello, "),
        (["zzz", "ld"], "Hello, wör"),
        ("🙂", "Hello, wörld! "),
        ("rld! 🙂", "Hello, wö"),
        (["Hello"], ""),
        ("🙂🙂", "Hello, wörld! 🙂"),
        ([], "Hello, wörld! 🙂"),
    ],
)
def test_a_reply_ends_before_a_stop_string(path: str, stop: Any, text: str) -> None:
    prompt: dict[str, Any] = {"prompt": "Hi"} if "chat" not in path else body()
    logprobs: Any = True if "chat" in path else 1
    asked = {"model": "tiny", **prompt, "max_tokens": 50, "stop": stop, "logprobs": logprobs}
    engine = FakeEngine()
    whole = post(asked, host=make_host(engine), path=path).json()
    choice = whole["choices"][0]
    assert (choice["text"] if "text" in choice else choice["message"]["content"]) == text
    assert choice["finish_reason"] == "stop"
    ended_early = text != "Hello, wörld! 🙂"
    last = stop if isinstance(stop, str) else "".join(stop[-1:])
    # All that was generated counts: the stop string, or the end token.
    read = len((text + last).encode()) if ended_early else len(text.encode()) + 1
    assert whole["usage"]["completion_tokens"] == read
    assert whole["steering"]["outcome"] == ("answer" if text else "empty")
    assert len(engine.cancelled) == ended_early  # its slot is free at once

    *chunks, _ = events(post({**asked, "stream": True}, path=path))
    choices = [chunk["choices"][0] for chunk in chunks]
    pieces = [c["text"] if "text" in c else c["delta"].get("content", "") for c in choices]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["steering"] == whole["steering"]

    # The tokens told are those of the text, streamed or not.
    told = [choice["logprobs"], *(c["logprobs"] for c in choices)]
    if "chat" in path:
        lists = [[t["bytes"] for t in each["content"]] if each else [] for each in told]
        assert bytes(b for t in lists[0] for b in t) == text.encode()
        assert [t for each in lists[1:] for t in each] == lists[0]
    else:
        assert [t for each in told[1:] if each for t in each["tokens"]] == told[0]["tokens"]
        assert len(told[0]["tokens"]) == len(text.encode())


def test_a_stop_string_wins_over_the_length() -> None:
    choice = post(stop="lo", max_tokens=5).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hel", "stop")
    choice = post(stop="lo", max_tokens=4).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hell", "length")
