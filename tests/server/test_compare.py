"""One conversation under several profiles: formats, faults, rights and accounts."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import httpx2
import pytest

from server.engine.base import EngineRequest, QueueFullError, StepFailedError
from server.engine.local import LocalEngine
from server.hosting import Host
from tests.conftest import make_model
from tests.server.experiments.trials import answers, experiment, hosting
from tests.server.fakes import FakeEngine, error_of, events, make_host, make_profile, post
from tests.server.live import live_server, wait_until
from tests.server.test_access import RED, ask, guarded
from tests.server.test_audit import lines
from tests.server.test_metrics import scrape, value
from tests.server.test_trace import monitored

URL = "/v1/steering/compare"
TEXT = "Hello, wörld! 🙂"
USER = [{"role": "user", "content": "Hi"}]
ARMS: list[dict[str, Any]] = [{"profile": "raw"}, {"profile": "bold", "strength": 3}]
READ = ("refusal_score", "answer_probability", "benign_probability")


def asked(**changes: Any) -> dict[str, Any]:
    return {"messages": USER, "arms": ARMS, **changes}


def compare(host: Host | None = None, **changes: Any) -> httpx2.Response:
    return post(asked(**changes), host=host, path=URL)


def by_arm(response: httpx2.Response) -> dict[int, list[dict[str, Any]]]:
    """The choices of a stream's events by arm; that of the usage is arm -1's."""
    *chunks, done = events(response)
    assert response.status_code == 200 and done == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1 and chunks[0]["id"].startswith("cmp-")
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for chunk in chunks:
        assert (chunk["object"], chunk["model"]) == ("steering.compare.chunk", "tiny")
        for choice in chunk["choices"] or [{"index": -1, "usage": chunk["usage"]}]:
            found[choice["index"]].append(choice)
    return found


def text_of(choices: list[dict[str, Any]]) -> str:
    return "".join(choice["delta"].get("content", "") for choice in choices)


class FailingArm(FakeEngine):
    """The arm at this index fails after two tokens."""

    def __init__(self, index: int, **options: Any) -> None:
        super().__init__(error=StepFailedError("/secret/path"), **options)
        self.index = index

    def generate(self, request: EngineRequest) -> Any:
        self.fail_after = 2 if request.request_id.endswith(f"-{self.index}") else 10**6
        tokens = FakeEngine(self.reply, error=self.error, fail_after=self.fail_after)
        return tokens.generate(request)


# What comes.


def test_a_stream_tells_who_answers_then_scores_text_and_receipt_of_each_arm() -> None:
    found = by_arm(compare(trace=True))
    assert set(found) == {0, 1, -1}
    for index, (profile, strength) in enumerate([("raw", 1.0), ("bold", 3.0)]):
        first, prompt, *rest, last = found[index]
        assert first["delta"] == {"role": "assistant", "content": ""}
        fingerprint = make_profile("bold").fingerprint if index else ""
        who = {"profile": profile, "fingerprint": fingerprint, "strength": strength}
        assert first["steering"] == who
        assert prompt["delta"] == {}
        assert prompt["steering"] == {
            "prompt": {
                "refusal_score": -3.5,
                "answer_probability": 0.9,
                "benign_probability": 0.8,
                "prompt_class": "unknown",
                "edit_norm": 0.02,
            }
        }
        assert text_of(rest) == TEXT
        trace = [entry for choice in rest for entry in choice["steering"]["trace"]]
        assert len(trace) == len(TEXT.encode()) and all(
            set(c["delta"]) == {"content"} for c in rest
        )
        assert last["delta"] == {} and last["finish_reason"] == "stop"
        assert who.items() <= last["steering"].items()
        assert last["steering"]["outcome"] == "answer" and last["steering"]["experiment"] is None
        assert [c["finish_reason"] for c in (first, prompt, *rest)] == [None] * (2 + len(rest))
        assert last["usage"]["completion_tokens"] == len(TEXT.encode()) + 1
    [end] = found[-1]
    assert end["usage"]["total_tokens"] == 2 * found[0][-1]["usage"]["total_tokens"]


def test_the_arms_come_side_by_side() -> None:
    *chunks, _ = events(compare())
    order = [chunk["choices"][0]["index"] for chunk in chunks if chunk["choices"]]
    assert order[:2] == [0, 1] and order != sorted(order)


def test_a_whole_reply_says_what_a_stream_does() -> None:
    found = by_arm(compare(trace=True))
    whole = compare(trace=True, stream=False).json()
    assert whole["object"] == "steering.compare" and whole["model"] == "tiny"
    assert whole["usage"] == found[-1][0]["usage"]
    for index, choice in enumerate(whole["choices"]):
        *rest, last = found[index]
        told = [e for c in rest for e in c.get("steering", {}).get("trace", ())]
        assert choice == {
            "index": index,
            "message": {"role": "assistant", "content": text_of(rest)},
            "finish_reason": last["finish_reason"],
            "steering": {**last["steering"], "trace": told},
            "usage": last["usage"],
        }
    assert "trace" not in compare(stream=False).text and "trace" not in compare().text


def test_the_prompts_scores_come_with_the_first_token_even_if_it_shows_nothing() -> None:
    found = by_arm(compare(make_host(FakeEngine("🙂x")), stop="🙂xy"))
    kinds = ["prompt" if "prompt" in c.get("steering", {}) else c["delta"] for c in found[0]]
    assert kinds[1:] == ["prompt", {"content": "🙂x"}, {}]


def test_every_arm_is_asked_with_the_same_sampling_and_its_own_conversation() -> None:
    engine = FakeEngine()
    own = [*USER, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Bye"}]
    arms = [*ARMS, {"profile": "shy", "messages": own}]
    compare(make_host(engine), arms=arms, seed=3, temperature=0.5, max_completion_tokens=9,
            top_k=4, stop=["x"], logit_bias={"65": 1})  # fmt: skip
    first, second, third = engine.requests
    assert first.sampling == second.sampling == third.sampling
    assert (first.sampling.seed, first.sampling.max_tokens, first.sampling.top_k) == (3, 9, 4)
    assert [[a.strength for a in r.edits] for r in engine.requests] == [[], [3.0], [2.0]]
    tokenizer = make_model("llama").tokenizer
    assert first.prompt_ids == second.prompt_ids
    assert tokenizer.decode(third.prompt_ids).count("<|user|>") == 2
    assert len({request.request_id for request in engine.requests}) == 3


def test_strength_zero_in_the_place_of_raw_changes_not_a_bit() -> None:
    greedy = {"temperature": 0, "max_tokens": 12, "stream": False, "trace": True}

    def beside(*arms: dict[str, Any]) -> list[dict[str, Any]]:
        return list(compare(monitored(), arms=[ARMS[1], *arms], **greedy).json()["choices"])

    off = {"profile": "bold", "strength": 0}
    (bold, raw, _), (_, zero, _) = beside(ARMS[0], ARMS[0]), beside(off, ARMS[0])
    assert zero["message"] == raw["message"] != bold["message"]
    assert zero["steering"]["trace"] == raw["steering"]["trace"] != bold["steering"]["trace"]
    assert [zero["steering"][name] for name in READ] == [raw["steering"][name] for name in READ]
    assert {entry["edit_norm"] for entry in zero["steering"]["trace"]} == {0}


def test_one_seed_means_the_same_tokens_in_every_arm_and_alone() -> None:
    sampling = {"temperature": 1.5, "seed": 11, "max_tokens": 16, "min_p": 0.01}
    host = monitored()
    arms = [{"profile": "raw"}, {"profile": "raw"}, {"profile": "bold", "strength": 3}]
    same, again, other = compare(host, arms=arms, stream=False, **sampling).json()["choices"]
    assert same["message"] == again["message"] != other["message"]
    alone = post(host=monitored(), **sampling).json()["choices"][0]["message"]["content"]
    assert same["message"]["content"] == alone


# What is refused.


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"model": "tiny:bold"}, 400, "model"),
        ({"model": "tiny@trial"}, 400, "model"),
        ({"model": "other"}, 404, "model"),
        ({"arms": []}, 400, "arms"),
        ({"arms": [{"profile": "raw"}] * 9}, 400, "arms"),
        ({"arms": [{"profile": "raw"}] * 5}, 400, "arms"),  # there are four slots
        ({"arms": [{"profile": "raw"}, {"profile": "no"}]}, 404, "arms[1].profile"),
        ({"arms": [{"profile": "raw", "strenght": 1}]}, 400, "arms[0].strenght"),
        ({"arms": [{"profile": "raw", "strength": 1e9}]}, 400, "arms[0].strength"),
        ({"arms": [{"profile": "raw", "messages": []}]}, 400, "arms[0].messages"),
        ({"messages": [{"role": "user"}]}, 400, "messages[0].content"),
        (
            {"arms": [*ARMS, {"profile": "raw", "messages": [{"role": "tool", "content": "x"}]}]},
            400,
            "arms[2].messages[0].tool_call_id",
        ),
        ({"max_tokens": 1000}, 400, "messages"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, 400, "max_tokens"),
        ({"chat_template_kwargs": {"mood": 1}}, 400, "chat_template_kwargs"),
        ({"n": 2}, 400, "n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"steering": {"profile": "bold"}}, 400, "steering"),
        ({"continue_final_message": True}, 400, "continue_final_message"),
        ({"functions": [1]}, 400, "functions"),
        ({"trace": "yes"}, 400, "trace"),
    ],
)
def test_what_cannot_be_compared_is_refused_and_named(
    changes: dict[str, Any], status: int, param: str
) -> None:
    engine = FakeEngine()
    response = compare(hosting(experiment(), host=make_host(engine)), **changes)
    assert (response.status_code, error_of(response)["param"]) == (status, param)
    assert not engine.requests
    if "arms[" in param:
        assert f"'{param}'" in error_of(response)["message"] or param.endswith("profile")


def test_the_served_name_may_be_given_and_unknown_fields_are_named() -> None:
    response = compare(model="tiny", vendor_key=1, messages=[{**USER[0], "name": "Ann"}])
    assert response.status_code == 200
    assert response.headers["x-ignored-fields"] == "vendor_key, messages.name"


def test_a_body_of_very_many_parts_in_an_arms_messages_is_refused_at_once() -> None:
    parts = [{"type": "text", "text": ""}] * 20_001
    arms = [{"profile": "raw", "messages": [{"role": "user", "content": parts}]}]
    response = compare(arms=arms)
    assert response.status_code == 400 and "20000" in error_of(response)["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_queue_without_room_for_all_arms_takes_none(stream: bool) -> None:
    engine = LocalEngine(make_model("llama"), max_num_seqs=4, max_waiting=2, max_model_len=200)
    host = make_host(engine)
    response = compare(host, arms=[{"profile": "raw"}] * 3, stream=stream)
    assert response.status_code == 429 and error_of(response)["code"] == "queue_full"
    assert int(response.headers["retry-after"]) >= 1
    full = make_host(FakeEngine(error=QueueFullError("full")))
    assert compare(full, stream=stream).status_code == 429


# What goes wrong on the way.


def test_an_arm_that_fails_ends_with_its_error_and_the_others_go_on() -> None:
    found = by_arm(compare(make_host(FailingArm(1)), arms=[*ARMS, {"profile": "shy"}]))
    for index in (0, 2):
        assert text_of(found[index]) == TEXT and found[index][-1]["finish_reason"] == "stop"
    last = found[1][-1]
    assert last["delta"] == {} and last["finish_reason"] == "error"
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert last["error"]["code"] == "internal_error" and "secret" not in json.dumps(last)
    assert found[-1][0]["usage"]["total_tokens"] == 2 * found[0][-1]["usage"]["total_tokens"]
    whole = compare(make_host(FailingArm(1)), stream=False)
    assert whole.status_code == 200
    good, bad = whole.json()["choices"]
    assert good["message"]["content"] == TEXT and "error" not in good
    assert bad["finish_reason"] == "error" and bad["message"]["content"] == "He"
    assert bad["error"]["code"] == "internal_error" and bad["steering"]["outcome"] is None


def test_only_where_every_arm_fails_is_the_status_an_errors() -> None:
    def engine() -> FakeEngine:
        return FakeEngine(error=StepFailedError("broken"), fail_after=1)

    response = compare(make_host(engine()), stream=False)
    assert response.status_code == 500 and error_of(response)["code"] == "internal_error"
    found = by_arm(compare(make_host(engine())))
    assert [found[i][-1]["finish_reason"] for i in (0, 1)] == ["error", "error"]
    assert found[-1][0]["usage"]["total_tokens"] == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_cancels_every_arm(stream: bool) -> None:
    engine = FakeEngine("x" * 150, delay=0.05)
    with live_server(make_host(engine)) as address:
        with (
            pytest.raises(httpx2.TimeoutException),
            httpx2.stream("POST", f"{address}{URL}", json=asked(stream=stream), timeout=0.5) as got,
        ):
            for _ in got.iter_lines():
                raise httpx2.TimeoutException("enough")
        wait_until(lambda: len(engine.cancelled) == 2)


def test_a_disconnect_frees_the_slots_of_all_arms() -> None:
    lm = make_model("llama")
    # Slow enough to be met under way, whatever the machine does.
    slow = lm.model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    engine = LocalEngine(lm, max_num_seqs=3, max_model_len=250)
    try:
        with live_server(make_host(engine)) as address:
            arms = [*ARMS, {"profile": "shy"}]
            endless = {str(token): -100 for token in lm.eos_token_ids}
            body = asked(arms=arms, max_tokens=200, temperature=2.0, logit_bias=endless)
            with httpx2.stream("POST", f"{address}{URL}", json=body) as response:
                next(response.iter_lines())
                wait_until(lambda: engine.stats().slots_used == 3)
            wait_until(lambda: engine.stats().slots_used == 0 and engine.stats().waiting == 0)
            page = httpx2.get(f"{address}/metrics").text
    finally:
        slow.remove()  # the model is everyone's
    for profile in ("raw", "bold", "shy"):
        ended = f'requests_total{{finish_reason="cancelled",profile="{profile}"}} 1.0'
        assert ended in page


# Rights and accounts.


@pytest.mark.parametrize("stream", [True, False])
def test_a_red_team_arm_is_to_other_keys_as_one_that_does_not_exist(stream: bool) -> None:
    def send(key: str, profile: str, red: bool = True) -> httpx2.Response:
        data = asked(arms=[{"profile": "raw"}, {"profile": profile}], stream=stream)
        return ask(guarded(red=red), ("POST", URL, key, data))[0]

    assert send("red", RED).status_code == 200
    hidden, unknown, without = send("user", RED), send("user", "zzz"), send("user", RED, red=False)
    assert hidden.status_code == 404 and error_of(hidden)["param"] == "arms[1].profile"
    assert hidden.text.replace(RED, "zzz") == unknown.text
    assert hidden.text == without.text
    assert send("admin", "raw").status_code == 403
    assert send("late", "raw").status_code == 401


def test_every_arm_is_a_line_of_the_audit_log(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    arms = [{"profile": "raw"}, {"profile": RED}]
    host = guarded(audit=path)
    requests: list[tuple[str, str, str | None, Any]] = [
        ("POST", URL, "red", asked(arms=arms)),
        ("POST", URL, "user", asked(arms=arms)),
    ]
    ask(host, *requests)
    host.access.audit.close()
    first, second, refused = lines(path)
    assert first["request_id"] == second["request_id"]
    assert {first["profile"]: first["red_team"], second["profile"]: second["red_team"]} == {
        "raw": False,
        RED: True,
    }
    for line in (first, second):
        assert (line["key"], line["outcome"], line["finish_reason"]) == ("red", "answer", "stop")
        assert line["id"].startswith("cmp-") and line["completion_tokens"] > 0
        assert "messages" not in line
    assert refused["status"] == 404 and refused["asked"]["profiles"] == f"raw,{RED}"


def test_every_arm_counts_as_an_answer_of_its_profile_and_none_as_an_exposure() -> None:
    trial = experiment()
    host = hosting(trial, host=make_host(), default=trial.name)
    page = scrape(asked(), asked(stream=False), host=host, path=URL)
    for profile in ("raw", "bold"):
        assert value(page, "requests_total", profile=profile, finish_reason="stop") == 2
        assert value(page, "prompt_tokens_total", profile=profile) == 12
        assert value(page, "refusal_score_count", profile=profile) == 2
        labels = {"profile": profile, "prompt_class": "unknown", "outcome": "answer"}
        assert value(page, "responses_judged_total", **labels) == 2
    for arm in ("control", "treated"):
        assert value(page, "experiment_exposures_total", experiment=trial.name, arm=arm) == 0
    assert answers(host) == []


def test_a_comparison_costs_the_sum_of_its_arms() -> None:
    def remaining(response: httpx2.Response) -> int:
        return int(response.headers["x-ratelimit-remaining-tokens"])

    # Of 100 a minute, both arms together may need 2 * (6 + 40), and use 2 * (6 + 4).
    request: tuple[str, str, str | None, Any] = ("POST", URL, "short", asked(max_tokens=40))
    first, second = ask(guarded(FakeEngine("abc")), request, request)
    assert first.status_code == 200 and remaining(first) == 8
    assert second.status_code == 429 and error_of(second)["code"] == "rate_limit_exceeded"
    assert remaining(second) == 80


def test_more_than_a_minutes_tokens_can_be_compared_from_a_full_bucket() -> None:
    data = asked(max_tokens=60, stream=False)
    [response] = ask(guarded(FakeEngine("abc")), ("POST", URL, "short", data))
    assert response.status_code == 200


def test_an_arm_that_fails_costs_no_tokens() -> None:
    host = guarded(FailingArm(1, reply="abc"))
    chat = {"model": "tiny", "messages": USER, "max_tokens": 1}
    requests: list[tuple[str, str, str | None, Any]] = [
        ("POST", URL, "short", asked(max_tokens=20, stream=False)),
        ("POST", "/v1/chat/completions", "short", chat),
    ]
    compared, after = ask(host, *requests)
    assert compared.status_code == 200
    assert int(after.headers["x-ratelimit-remaining-tokens"]) >= 100 - (6 + 4) - (6 + 1)
