"""Who answers where experiments have a say, and what the receipt, headers and lists tell."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from server.access import Access
from server.auth import hash_secret
from server.errors import ConflictError
from server.hosting import Host
from tests.server.experiments.trials import ARMS, answers, experiment, hosting, unit_in
from tests.server.fakes import (
    FakeEngine,
    body,
    error_of,
    events,
    get,
    http_client,
    make_host,
    make_profile,
    post,
)

TRIAL = experiment()
TREATED = unit_in(TRIAL, "treated")
CONTROL = unit_in(TRIAL, "control")


def ask(host: Host, model: str = "tiny@trial", key: str | None = None, **changes: Any) -> Any:
    headers = {"Authorization": f"Bearer ph-{key}"} if key else {}
    return post(body(model=model, **changes), host=host, headers=headers)


def told(response: Any) -> tuple[str, str | None, str | None]:
    assert response.status_code == 200, response.text
    receipt = response.json()["steering"]
    return receipt["profile"], receipt["experiment"], receipt["arm"]


@pytest.mark.parametrize(
    ("user", "profile", "arm"), [(TREATED, "bold", "treated"), (CONTROL, "raw", "control")]
)
def test_the_units_arm_answers_and_says_so(user: str, profile: str, arm: str) -> None:
    host = hosting(TRIAL)
    for _ in range(3):  # a conversation stays on its arm
        response = ask(host, user=user)
        assert told(response) == (profile, "trial", arm)
        assert response.headers["X-Steering-Experiment"] == "trial"
        assert response.headers["X-Steering-Arm"] == arm
        assert response.json()["model"] == "tiny@trial"
    assert {r.arm for r in answers(host)} == {arm}


def test_a_stream_and_a_completion_take_part_too() -> None:
    host = hosting(TRIAL)
    chunks = events(ask(host, user=TREATED, stream=True))
    assert chunks[-2]["steering"]["arm"] == "treated"
    completion = post(
        {"model": "tiny@trial", "prompt": "Hi", "user": CONTROL}, host=host, path="/v1/completions"
    )
    assert told(completion) == ("raw", "trial", "control")
    assert [r.arm for r in answers(host)] == ["treated", "control"]


def test_an_arm_has_its_own_strength() -> None:
    arms = [
        {"name": "control", "profile": "raw"},
        {"name": "treated", "profile": "bold", "strength": 1.5},
    ]
    host = hosting(experiment(arms=arms))
    assert ask(host, user=TREATED).json()["steering"]["strength"] == 1.5
    [record] = answers(host)
    assert record.strength == 1.5


@pytest.mark.parametrize(
    ("model", "steering", "profile"),
    [
        ("tiny:shy", None, "shy"),
        ("tiny", {"profile": "shy"}, "shy"),
        ("tiny@trial", {"profile": "shy", "strength": 0.1}, "shy"),
        ("tiny", {"profiles": [{"name": "bold"}, {"name": "shy"}]}, "bold+shy"),
        ("tiny@trial", {"profiles": [{"name": "bold"}, {"name": "shy"}]}, "bold+shy"),
    ],
)
def test_an_explicit_profile_wins_and_is_no_exposure(
    model: str, steering: dict[str, Any] | None, profile: str
) -> None:
    host = hosting(TRIAL, default="trial")
    response = ask(host, model, user=TREATED, steering=steering)
    assert told(response) == (profile, None, None)
    assert "X-Steering-Experiment" not in response.headers
    assert answers(host) == []


def test_the_default_experiment_takes_in_who_names_nothing_and_an_explicit_one_wins() -> None:
    other = experiment(name="other", arms=[{"name": n, "profile": "shy"} for n in "ab"])
    host = hosting(TRIAL, other, default="trial")
    assert told(ask(host, "tiny", user=TREATED)) == ("bold", "trial", "treated")
    assert told(ask(host, "tiny", user=TREATED, steering={}))[1] == "trial"
    assert told(ask(host, "tiny@other", user=TREATED))[:2] == ("shy", "other")
    assert told(ask(hosting(TRIAL), "tiny", user=TREATED)) == ("raw", None, None)


@pytest.mark.parametrize("steering", [{"strength": 0.5}, {"phase": "prompt"}])
@pytest.mark.parametrize("model", ["tiny", "tiny@trial"])
def test_what_an_arm_decides_cannot_be_set(model: str, steering: dict[str, Any]) -> None:
    host = hosting(TRIAL, default="trial")
    response = ask(host, model, steering=steering, user=TREATED)
    assert response.status_code == 400
    assert error_of(response)["param"] == f"steering.{next(iter(steering))}"
    assert answers(host) == []


@pytest.mark.parametrize("steering", [None, {"profile": "shy"}])
def test_an_unknown_experiment_is_a_404(steering: dict[str, Any] | None) -> None:
    response = ask(hosting(TRIAL), "tiny@nothing", steering=steering)
    assert response.status_code == 404
    assert error_of(response)["param"] == "model"
    assert "nothing" in error_of(response)["message"]


@pytest.mark.parametrize(
    "changes",
    [{"start": "2100-01-01T00:00:00Z"}, {"end": "2020-01-01T00:00:00Z"}],
    ids=["not begun", "over"],
)
def test_before_and_after_an_experiment_the_default_profile_answers(
    changes: dict[str, Any],
) -> None:
    host = hosting(experiment(**changes), default="trial")
    for model in ("tiny", "tiny@trial"):
        assert told(ask(host, model, user=TREATED)) == ("raw", None, None)
    assert answers(host) == []


def test_units_outside_the_coverage_are_answered_as_without_the_experiment() -> None:
    small = experiment(coverage=0.2, arms=[{"name": n, "profile": "bold"} for n in "ab"])
    host = hosting(small)
    assert told(ask(host, user=unit_in(small, None))) == ("raw", None, None)
    assert told(ask(host, user=unit_in(small, "a"))) == ("bold", "trial", "a")
    assert len(answers(host)) == 1


class Picky(FakeEngine):
    """Cannot take edited prompts."""

    def check(self, request: Any) -> None:
        if request.edits:
            raise ValueError("this gate reads the whole prompt")


def test_a_prompt_that_not_every_arm_can_take_is_nobodys_exposure() -> None:
    host = hosting(TRIAL, host=make_host(Picky()))
    for user in (TREATED, CONTROL):
        assert told(ask(host, user=user)) == ("raw", None, None)
    assert answers(host) == []


def test_a_score_takes_no_part() -> None:
    host = hosting(TRIAL, default="trial")
    plain = post(body(), host=host, path="/v1/steering/score")
    assert plain.json()["profile"] == "raw"
    refused = post(body(model="tiny@trial"), host=host, path="/v1/steering/score")
    assert refused.status_code == 400 and error_of(refused)["param"] == "model"


def test_models_and_tokenize_know_experiments() -> None:
    over = experiment(name="over", end="2020-01-01T00:00:00Z")
    host = hosting(TRIAL, over)
    listed = {card["id"]: card for card in get("/v1/models", host).json()["data"]}
    assert "tiny@over" not in listed
    assert listed["tiny@trial"]["experiment"] == "trial"
    assert get("/v1/models/tiny@trial", host).json() == listed["tiny@trial"]
    assert get("/v1/models/tiny@nothing", host).status_code == 404
    counted = post({"model": "tiny@trial", "prompt": "Hi"}, host=host, path="/tokenize")
    assert counted.json()["count"] > 0
    assert post({"model": "tiny@x", "prompt": "Hi"}, host=host, path="/tokenize").status_code == 404


RED = [{"name": "control", "profile": "raw"}, {"name": "treated", "profile": "unbound"}]


def red_host(*experiments: Any, allow: bool = True, default: str | None = None) -> Host:
    profiles = [make_profile("bold"), make_profile("unbound", red_team=True)]
    host = make_host(profiles=profiles)
    keys: dict[str, dict[str, Any]] = {
        "user": {},
        "red": {"profiles": ["*", "unbound"]},
        "bold": {"profiles": ["bold"]},
        "admin": {"scopes": ["admin"]},
        "red-admin": {"scopes": ["admin"], "profiles": ["*", "unbound"]},
        "scraper": {"scopes": ["metrics"]},
    }
    entries = [
        {"id": id, "sha256": hash_secret(f"ph-{id}"), **fields} for id, fields in keys.items()
    ]
    host.access = Access(json.dumps(entries))
    return hosting(*experiments, host=host, allow_red_team=allow, default=default)


def test_who_may_not_use_every_arm_is_answered_by_control_and_never_exposed() -> None:
    host = red_host(experiment(arms=RED))
    for user in (TREATED, CONTROL):
        assert told(ask(host, key="user", user=user)) == ("raw", None, None)
    assert answers(host) == []
    assert told(ask(host, key="red", user=TREATED)) == ("unbound", "trial", "treated")
    assert told(ask(host, key="red", user=CONTROL)) == ("raw", "trial", "control")
    # Who may not even use the control learns of no experiment.
    assert ask(host, key="bold", user=TREATED).status_code == 404


def test_an_experiment_with_a_red_team_arm_does_not_exist_for_others() -> None:
    host = red_host(experiment(arms=RED))
    ask(host, key="red", user=TREATED)
    for path in ("/v1/experiments/trial", "/v1/experiments/trial/report"):
        assert get(path, host, Authorization="Bearer ph-user").status_code == 404
    shown = get("/v1/experiments", host, Authorization="Bearer ph-user").json()
    assert shown["data"] == []
    page = get("/metrics", host, Authorization="Bearer ph-scraper").text
    assert "unbound" not in page and 'arm="treated"' not in page
    assert 'exposures_total{arm="restricted",experiment="restricted"} 0.0' in page


def as_keys(host: Host, *steps: tuple[Any, ...]) -> list[Any]:
    """Responses to (key, method, path, body) in one life of the server."""

    async def run() -> list[Any]:
        async with http_client(host) as client:
            return [
                await client.request(
                    method,
                    path,
                    json=rest[0] if rest else None,
                    headers={"Authorization": f"Bearer ph-{key}"},
                )
                for key, method, path, *rest in steps
            ]

    return asyncio.run(run())


def test_lists_of_models_hold_no_experiment_with_a_red_team_arm_for_others() -> None:
    host, one = red_host(experiment(arms=RED)), "/v1/models/tiny@trial"
    for key, there in (("user", False), ("red", True)):
        listed, shown = as_keys(host, (key, "GET", "/v1/models"), (key, "GET", one))
        assert ("tiny@trial" in {card["id"] for card in listed.json()["data"]}) is there
        assert shown.status_code == (200 if there else 404)


def test_who_does_not_see_an_experiment_cannot_replace_it_nor_learn_of_it_from_a_profile() -> None:
    host = red_host()
    arms = [*RED, {"name": "mild", "profile": "bold"}]
    url, mine = "/v1/experiments", {"name": "trial", "arms": arms}
    made, replaced = as_keys(
        host,
        ("red-admin", "POST", url, mine),
        ("admin", "POST", url, {"name": "trial", "arms": ARMS}),
    )
    assert (made.status_code, replaced.status_code) == (201, 409)
    assert error_of(replaced)["message"] == "The name 'trial' is taken."
    assert host.experiments.find("trial").experiment.version == 1
    with pytest.raises(ConflictError, match="removed: an experiment uses it"):
        host.profiles.remove("bold")


def test_others_learn_nothing_of_a_version_with_a_red_team_arm() -> None:
    url = "/v1/experiments/trial"
    first, second, all_, one, mine, hidden, none, page = as_keys(
        red_host(),
        *(
            ("red-admin", "POST", "/v1/experiments", {"name": "trial", "arms": a})
            for a in (RED, ARMS)
        ),
        ("red", "GET", url),
        ("red", "GET", f"{url}/report?version=1"),
        ("user", "GET", url),
        ("user", "GET", f"{url}/report?version=1"),
        ("user", "GET", f"{url}/report?version=9"),
        ("scraper", "GET", "/metrics"),
    )
    assert (first.status_code, second.status_code, one.status_code) == (201, 201, 200)
    assert (all_.json()["versions"], mine.json()["versions"]) == ([1, 2], [2])
    assert hidden.status_code == none.status_code == 404
    assert error_of(hidden)["message"] == error_of(none)["message"].replace("9", "1")
    assert "trial" not in page.text  # the first one's series are there still


def test_an_error_does_not_name_the_default_experiment() -> None:
    host = red_host(experiment(arms=RED), default="trial")
    refused = ask(host, "tiny", key="user", steering={"strength": 1.0})
    assert refused.status_code == 400 and "trial" not in refused.text


def test_settings_need_a_flag_for_red_team_arms() -> None:
    with pytest.raises(ValueError, match="--allow-red-team-arms"):
        red_host(experiment(arms=RED), allow=False)


def test_a_red_team_arm_needs_a_creator_who_names_the_profile_still() -> None:
    host = red_host(allow=False)
    payload = json.dumps({"name": "trial", "arms": RED})

    def define(key: str) -> Any:
        headers = {"Authorization": f"Bearer ph-{key}"}
        return post(raw=payload, host=host, path="/v1/experiments", headers=headers)

    assert define("red").status_code == 403  # not an admin
    assert define("admin").status_code == 404  # for whom the profile does not exist
    made = define("red-admin")
    assert made.status_code == 201 and made.json()["creator"] == "red-admin"
    assert told(ask(host, key="red", user=TREATED))[0] == "unbound"
    keys = [key for key in host.access.keys or () if key.id != "red-admin"]
    host.access = Access(json.dumps([key.to_json() for key in keys]))
    assert told(ask(host, key="red", user=TREATED)) == ("raw", None, None)
