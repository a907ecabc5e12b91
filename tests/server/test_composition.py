"""Several profiles, and other phases, in one request."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from server.engine.local import LocalEngine
from server.hosting import Host
from server.prepare import Prepared, profiles_used
from steering.edit import AppliedEdit, Edit, edits_digest
from steering.profile import Profile
from tests.conftest import make_model
from tests.reference import greedy
from tests.server.engine.running import ask, prompt_of, running, stream_all, without_end
from tests.server.fakes import FakeEngine, error_of, make_host, make_profile, post
from tests.server.test_metrics import scrape, value
from tests.steering.edits import mixture, random_edit, random_gate

PROMPT = [{"role": "user", "content": "Hi"}]


def profile(name: str, *edits: Edit, **changes: Any) -> Profile:
    return make_profile(name, edits=edits, **changes)


def served(*profiles: Profile, **store: Any) -> tuple[Host, FakeEngine]:
    engine = FakeEngine()
    return make_host(engine, profiles=profiles, **store), engine


ONE = profile("one", random_edit("1.resid_post", 2), random_edit("2.attn_out", 1, seed=1))
TWO = profile(
    "two", random_edit("1.resid_post", 1, seed=2), random_edit("3.mlp_out", 2, seed=3), strength=0.8
)
BOTH = {"profiles": [{"name": "two"}, {"name": "one", "strength": -0.4}]}


def test_profiles_are_applied_in_the_order_given_each_at_its_strength() -> None:
    host, engine = served(ONE, TWO)
    receipt = post(host=host, steering=BOTH).json()["steering"]
    expected = [*TWO.applied(), *ONE.applied(-0.4)]
    [request] = engine.requests
    assert list(request.edits) == expected
    assert request.answer_probe is None
    assert receipt["profile"] == "two+one" and receipt["strength"] is None
    assert receipt["fingerprint"] == edits_digest(expected)
    assert receipt["profiles"] == [
        {"name": "two", "fingerprint": TWO.fingerprint, "strength": 0.8},
        {"name": "one", "fingerprint": ONE.fingerprint, "strength": -0.4},
    ]
    other = post(host=host, steering={"profiles": BOTH["profiles"][::-1]})
    assert other.json()["steering"]["fingerprint"] != receipt["fingerprint"]
    assert other.headers["X-Steering-Profile"] == "one+two"


def test_one_profile_in_a_list_is_that_profile() -> None:
    host, engine = served(ONE, TWO)
    listed = post(host=host, steering={"profiles": [{"name": "one", "strength": 2}]}).json()
    named = post(host=host, steering={"profile": "one", "strength": 2}).json()
    assert listed["steering"] == named["steering"] and "profiles" not in named["steering"]
    assert engine.requests[0].edits == engine.requests[1].edits


def test_all_off_is_raw() -> None:
    host, engine = served(ONE, TWO)
    off = [{"name": "one", "strength": 0}, {"name": "two", "strength": 0}]
    receipt = post(host=host, steering={"profiles": off}).json()["steering"]
    assert receipt["fingerprint"] == ""
    assert (engine.requests[0].edits, engine.requests[0].answer_probe) == ((), "")


def test_compositions_share_one_label_in_metrics() -> None:
    host, _ = served(ONE, TWO)
    request = {"model": "tiny", "messages": PROMPT, "steering": BOTH}
    page = scrape(request, host=host)
    assert value(page, "requests_total", profile="composed", finish_reason="stop") == 1
    assert not [labels for _, labels in page if "two+one" in str(labels)]


def test_a_composed_row_in_a_mixed_batch_is_its_edits_in_order_on_the_model_alone() -> None:
    lm = make_model("llama")
    rows = [row for row in mixture().values() if row]
    composed = [[*a, *b] for a, b in pairwise(rows)]
    composed.append([*ONE.applied(), *TWO.applied()])
    prompts = [prompt_of(9 + i, seed=i) for i in range(len(composed))]
    requests = [ask(p, e) for p, e in zip(prompts, composed, strict=True)]
    requests += [ask(prompts[0]), ask(prompts[1], ONE.applied())]
    with running(lm, max_num_seqs=6) as engine:
        together = stream_all(engine, requests)
        alone = [stream_all(engine, [request])[0] for request in requests]
    for request, mixed, single in zip(requests, together, alone, strict=True):
        tokens = without_end(lm, mixed)
        assert tokens == without_end(lm, single)
        assert tokens == greedy(lm, request.prompt_ids, request.edits, 8)


def test_a_phase_replaces_that_of_every_edit_and_shows_in_the_receipt() -> None:
    host, engine = served(ONE, TWO)
    for phase in ("prompt", "generation", "all"):
        receipt = post(host=host, steering={**BOTH, "phase": phase}).json()["steering"]
        assert receipt["phase"] == phase
        edits = engine.requests[-1].edits
        assert [a.edit.phase for a in edits] == [phase] * 4
        assert receipt["fingerprint"] == edits_digest(edits)
    assert post(host=host, steering=BOTH).json()["steering"].get("phase") is None
    assert [edit.phase for edit in ONE.edits] == ["all", "all"]


def test_an_edit_in_another_phase_is_that_edit_made_with_it() -> None:
    edit = random_edit("1.resid_post", 2)
    assert edit.fingerprint  # cached before
    moved = edit.in_phase("prompt")
    assert moved.fingerprint == replace(edit, phase="prompt").fingerprint != edit.fingerprint
    assert moved.read is edit.read and edit.in_phase("all") is edit
    lm = make_model("llama")
    prompt = prompt_of(12)
    with running(lm) as engine:
        [reply] = stream_all(engine, [ask(prompt, [AppliedEdit(moved)])])
    assert without_end(lm, reply) == greedy(
        lm, prompt, [AppliedEdit(replace(edit, phase="prompt"))], 8
    )


def test_the_answer_probe_is_read_only_where_it_was_calibrated() -> None:
    host, engine = served(ONE)
    for steering, probe in (
        ({"profile": "one"}, ONE.fingerprint),
        ({"profile": "one", "phase": "all"}, ONE.fingerprint),  # its own phase
        ({"profile": "one", "phase": "prompt"}, None),
        ({"profile": "one", "strength": 2}, None),
        ({"phase": "prompt"}, ""),
    ):
        assert post(host=host, steering=steering).status_code == 200
        assert engine.requests[-1].answer_probe == probe


def test_a_gate_that_measures_the_prompt_goes_with_the_prompt_only() -> None:
    def gated(name: str, **gate: Any) -> Profile:
        edit = random_edit(
            "2.resid_pre", 0, phase="prompt", gate=random_gate("1.resid_pre", **gate)
        )
        return profile(name, edit)

    host, _ = served(
        gated("measure", reduce="last_prompt_token"),
        gated("condition", reduce="prompt_mean", comparator=">"),
        gated("token"),
    )
    for name, allowed in (("measure", False), ("condition", True), ("token", True)):
        for phase in ("prompt", "generation", "all"):
            response = post(host=host, steering={"profile": name, "phase": phase})
            assert response.status_code == (200 if allowed or phase == "prompt" else 400)
            if response.status_code == 400:
                assert error_of(response)["param"] == "steering.phase"


@pytest.mark.parametrize(
    ("changes", "param", "status"),
    [
        ({"steering": {**BOTH, "profile": "one"}}, "steering.profile", 400),
        ({"steering": {**BOTH, "strength": 1}}, "steering.strength", 400),
        ({"steering": BOTH, "model": "tiny:one"}, "steering.profiles", 400),
        ({"steering": {"profiles": []}}, "steering.profiles", 400),
        ({"steering": {"profiles": [{"name": "one"}] * 2}}, "steering.profiles[1].name", 400),
        ({"steering": {"profiles": [{"name": "one"}] * 9}}, "steering.profiles", 400),
        ({"steering": {"profiles": [{"name": "none"}]}}, "steering.profiles[0].name", 404),
        ({"steering": {"profiles": ["one"]}}, "steering.profiles[0]", 400),
        ({"steering": {"profiles": [{"name": "one", "x": 1}]}}, "steering.profiles[0].x", 400),
        ({"steering": {"phase": "reply"}}, "steering.phase", 400),
        ({"steering": BOTH, "model": "gpt-4"}, "model", 404),
    ],
)
def test_what_contradicts_itself_is_refused(
    changes: dict[str, Any], param: str, status: int
) -> None:
    host, engine = served(ONE, TWO)
    response = post(host=host, **changes)
    assert (response.status_code, error_of(response)["param"]) == (status, param)
    assert not engine.requests


def test_a_folded_profile_is_composed_with_nothing_and_has_no_phase() -> None:
    host, engine = served(ONE, TWO, folded="one")
    assert post(host=host, steering={"profiles": [{"name": "one"}]}).status_code == 200
    assert engine.requests[0].edits == ()
    assert post(host=host, steering=BOTH).status_code == 404
    for steering, param in (
        ({"phase": "prompt"}, "steering.phase"),
        ({"profiles": [{"name": "one", "strength": 3}]}, "steering.profiles[0].strength"),
    ):
        wrong = post(host=host, steering=steering)
        assert (wrong.status_code, error_of(wrong)["param"]) == (400, param)


def test_access_sees_every_profile_of_a_composition(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Prepared] = []
    monkeypatch.setattr("server.reply.answered_by", _remember(seen))
    host, _ = served(ONE, replace(TWO, red_team=True))
    off = {"profiles": [{"name": "one"}, {"name": "two", "strength": 0}]}
    assert post(host=host, steering=off).status_code == 200
    assert [p.name for p in profiles_used(seen[0])] == ["one", "two"]


def _remember(seen: list[Prepared]) -> Any:
    from server.reply import answered_by

    def remember(host: Host, prepared: Prepared) -> dict[str, Any]:
        seen.append(prepared)
        return answered_by(host, prepared)

    return remember


def test_the_real_engine_answers_a_composition_over_http() -> None:
    lm = make_model("llama")
    host = make_host(LocalEngine(lm, max_num_seqs=2, max_model_len=100), profiles=[ONE, TWO])
    body = {"messages": PROMPT, "steering": BOTH, "temperature": 0, "max_tokens": 8}
    answer = post(host=host, **body).json()
    edits = [*TWO.applied(), *ONE.applied(-0.4)]
    tokens = greedy(lm, lm.encode_chat(PROMPT), edits, 8)
    assert answer["choices"][0]["message"]["content"] == lm.tokenizer.decode(
        tokens, skip_special_tokens=True
    )
