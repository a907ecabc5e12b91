"""Experiments are defined, versioned, stopped, ended and reported through the API, and survive."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from server.cli import main
from server.errors import ConflictError, UnavailableError
from server.experiments import registry as registry_module
from server.experiments.definitions import Experiment
from server.experiments.records import AnswerRecord, EventRecord
from server.experiments.registry import Registry
from server.experiments.report_plots import Plot
from server.hosting import Host
from server.settings import SettingsError, load_settings
from steering.judge import JUDGE_VERSION
from steering.judge_set import Card
from tests.server.experiments.trials import (
    ARMS,
    answers,
    definition,
    events_of,
    experiment,
    hosting,
    unit_in,
)
from tests.server.fakes import body, error_of, http_client, make_host, make_profile, post
from tests.server.live import live_server

URL = "/v1/experiments"
TREATED = unit_in(experiment(), "treated")


def talk(host: Host, *steps: tuple[Any, ...]) -> list[httpx2.Response]:
    """Responses to (method, path, body) in one life of the server."""

    async def run() -> list[httpx2.Response]:
        async with http_client(host) as client:
            return [
                await client.request(method, path, json=rest[0] if rest else None)
                for method, path, *rest in steps
            ]

    return asyncio.run(run())


def told(response: httpx2.Response) -> tuple[str, str | None]:
    receipt = response.json()["steering"]
    return receipt["profile"], receipt["arm"]


ASK = ("POST", "/v1/chat/completions", body(model="tiny@trial", user=TREATED))


def test_an_experiment_is_defined_while_the_server_runs() -> None:
    host = make_host()
    before, made, asked, shown = talk(host, ASK, ("POST", URL, definition()), ASK, ("GET", URL))
    assert before.status_code == 404 and made.status_code == 201
    assert told(asked) == ("bold", "treated")
    [card] = shown.json()["data"]
    assert card == made.json()
    assert (card["model"], card["version"], card["status"]) == ("tiny@trial", 1, "running")
    assert (card["source"], card["arms"][1]["profile"]) == ("api", "bold")
    assert [e.kind for e in events_of(host)] == ["registered"]


def test_a_changed_definition_is_the_next_version_with_records_of_its_own() -> None:
    host = make_host()
    changed = definition(coverage=0.5)
    first, same, second, asked, last = talk(
        host,
        ("POST", URL, definition()),
        ("POST", URL, definition()),
        ("POST", URL, changed),
        ASK,
        ("GET", f"{URL}/trial"),
    )
    assert [r.status_code for r in (first, same, second)] == [201, 200, 201]
    assert [r.json()["version"] for r in (first, same, second)] == [1, 1, 2]
    assert last.json()["versions"] == [1, 2]
    in_part = asked.json()["steering"]["arm"] is not None
    assert (len(answers(host)), len(answers(host, version=2))) == (0, int(in_part))


def elsewhere(host: Host) -> Host:
    """Another server, with the records of the first and nothing else of it."""
    other = make_host()
    other.records = host.records
    return other


def test_a_name_that_only_the_records_know_goes_on_or_begins_anew() -> None:
    host = make_host()
    talk(host, ("POST", URL, definition()), ASK)
    host = elsewhere(host)
    [same] = talk(host, ("POST", URL, definition()))
    assert (same.status_code, same.json()["version"]) == (201, 1)  # as on another replica
    host = elsewhere(host)
    wrong, other, asked = talk(
        host,
        ("POST", URL, definition(version=1, coverage=0.999)),
        ("POST", URL, definition(coverage=0.999)),
        ASK,
    )
    assert wrong.status_code == 409 and "begins with version 2" in error_of(wrong)["message"]
    assert other.json()["version"] == 2
    assert [len(answers(host, version=v)) for v in (1, 2)] == [1, 1]
    assert told(asked) == ("bold", "treated")
    host = elsewhere(host)
    [again] = talk(host, ("POST", URL, definition(coverage=0.999, version=2)))
    assert (again.status_code, again.json()["version"]) == (201, 2)


@pytest.mark.parametrize(
    "over",
    [("DELETE", f"{URL}/trial"), ("POST", f"{URL}/trial/stop", {"arm": "treated"})],
)
def test_what_was_ended_is_not_taken_up_again(over: tuple[Any, ...]) -> None:
    host = make_host()
    talk(host, ("POST", URL, definition()), over)
    [again] = talk(elsewhere(host), ("POST", URL, definition()))
    assert (again.json()["version"], again.json()["status"]) == (2, "running")


def test_a_guard_rail_that_fired_on_the_control_ends_nothing() -> None:
    host = make_host()
    talk(host, ("POST", URL, definition()))
    fired = EventRecord("x", 0.0, "trial", 1, "guard_rail", "control", {})
    host.records.append(fired)
    [again] = talk(elsewhere(host), ("POST", URL, definition()))
    assert (again.json()["version"], again.json()["status"]) == (1, "running")


def test_a_moment_is_the_same_in_every_time_zone() -> None:
    host = make_host()
    times = ("2026-01-01T01:00:00+01:00", "2026-01-01T00:00:00Z")
    here, same = talk(host, *(("POST", URL, definition(start=start)) for start in times))
    [there] = talk(elsewhere(host), ("POST", URL, definition(start=times[1])))
    assert (here.status_code, same.status_code) == (201, 200)
    assert there.json()["version"] == 1


def test_experiments_that_made_room_are_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "MOST_EXPERIMENTS", 1)
    host = make_host()
    steps = [
        step
        for name in ("trial", "second", "trial")
        for step in (
            ("POST", URL, definition(name=name)),
            ("DELETE", f"{URL}/{name}"),
        )
    ]
    made = talk(host, *steps)
    assert [r.json()["version"] for r in made[::2]] == [1, 1, 2]


def test_records_that_cannot_be_read_make_no_version() -> None:
    host = make_host()

    def broken(experiment: str) -> int:
        raise UnavailableError("The records of experiments cannot be read now.")

    host.records.latest_version = broken  # type: ignore[method-assign]
    refused, listed = talk(host, ("POST", URL, definition()), ("GET", URL))
    assert refused.status_code == 503 and listed.json()["data"] == []


def test_another_definition_under_the_same_version_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    host = hosting(experiment())
    talk(host, ASK)
    changed = hosting(experiment(horizon=500))  # the settings were changed, and not the version
    changed.records = host.records
    [report] = talk(changed, ("GET", f"{URL}/trial/report?format=text"))
    assert "on record with another definition" in report.text
    assert caplog.text.count("version 1 is on record with another definition") == 1


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"version": 1, "coverage": 0.5}, 409, "version"),
        ({"version": 3}, 409, "version"),
        ({"creator": "me"}, 400, "creator"),
        ({"arms": [ARMS[0], {"name": "b", "profile": "nobody"}]}, 404, "arms[1].profile"),
        ({"arms": ARMS[:1]}, 400, "arms"),
        ({"coverage": 2}, 400, "coverage"),
        ({"unit": ["cookie"]}, 400, "unit[0]"),
        ({"arms": [{**arm, "weight": 1e308} for arm in ARMS]}, 400, "arms[0].weight"),
        ({"arms": [ARMS[0], {**ARMS[1], "weight": 1e-300}]}, 400, "arms[1].weight"),
        ({"arms": [ARMS[0], {**ARMS[1], "weight": 0}]}, 400, "arms[1].weight"),
        ({"horizon": 10**400}, 400, "horizon"),
        ({"alpha": 0.0}, 400, "alpha"),
        ({"colour": "red"}, 400, "colour"),
    ],
)
def test_what_makes_no_experiment_is_refused(
    changes: dict[str, Any], status: int, param: str
) -> None:
    _, refused, shown = talk(
        make_host(),
        ("POST", URL, definition()),
        ("POST", URL, definition(**changes)),
        ("GET", f"{URL}/trial"),
    )
    assert refused.status_code == status, refused.text
    assert error_of(refused)["param"] == param
    assert shown.json()["version"] == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"arms": [ARMS[0], ARMS[0]]}, "two arms have the same name."),
        (
            {"start": "2026-12-02T00:00:00Z", "end": "2026-12-01T00:00:00Z"},
            "the end must lie after the start.",
        ),
        ({"arms": ARMS[:1]}, "'arms' must have at least 2 items."),
        (
            {"arms": [ARMS[0], {**ARMS[1], "weight": 0}]},
            "'arms[1].weight' should be greater than or equal to 0.000001 (got 0).",
        ),
    ],
)
def test_a_contradiction_is_told_in_its_own_words(changes: dict[str, Any], says: str) -> None:
    [refused] = talk(make_host(), ("POST", URL, definition(**changes)))
    error = error_of(refused)
    assert (refused.status_code, error["message"]) == (400, says)
    assert error["code"] == "invalid_value"


def test_an_ended_experiment_answers_nobody_and_a_new_version_begins_again() -> None:
    host = make_host()
    _, ended, asked, again, card, restarted = talk(
        host,
        ("POST", URL, definition()),
        ("DELETE", f"{URL}/trial"),
        ASK,
        ("DELETE", f"{URL}/trial"),
        ("GET", f"{URL}/trial"),
        ("POST", URL, definition()),
    )
    assert ended.json() == {"name": "trial", "object": "steering.experiment.ended", "ended": True}
    assert told(asked) == ("raw", None)
    assert again.status_code == 409 and card.json()["status"] == "ended"
    assert restarted.json()["version"] == 2 and restarted.json()["status"] == "running"
    assert [e.kind for e in events_of(host)] == ["registered", "removed"]


def test_an_arm_is_stopped_by_hand_and_the_control_is_not() -> None:
    host = hosting(experiment(arms=[*ARMS, {"name": "third", "profile": "shy"}]))
    user = unit_in(experiment(arms=[*ARMS, {"name": "third", "profile": "shy"}]), "treated")
    ask = ("POST", "/v1/chat/completions", body(model="tiny@trial", user=user))
    before, control, unknown, stopped, after, missing = talk(
        host,
        ask,
        ("POST", f"{URL}/trial/stop", {"arm": "control"}),
        ("POST", f"{URL}/trial/stop", {"arm": "nobody"}),
        ("POST", f"{URL}/trial/stop", {"arm": "treated"}),
        ask,
        ("POST", f"{URL}/nothing/stop", {"arm": "treated"}),
    )
    assert told(before) == ("bold", "treated") and told(after) == ("raw", None)
    assert [r.status_code for r in (control, unknown, stopped, missing)] == [400, 404, 200, 404]
    assert stopped.json()["arms"][1]["stopped"]["kind"] == "stopped"
    assert [(e.kind, e.arm) for e in events_of(host)][-1] == ("stopped", "treated")


def test_with_one_arm_left_an_experiment_is_over() -> None:
    host = hosting(experiment())
    stopped, asked = talk(host, ("POST", f"{URL}/trial/stop", {"arm": "treated"}), ASK)
    assert stopped.json()["status"] == "ended" and told(asked) == ("raw", None)


def test_profiles_in_use_stay_until_the_experiment_ends() -> None:
    host = make_host()
    talk(host, ("POST", URL, definition()))
    with pytest.raises(ConflictError, match="experiment trial uses it"):
        host.profiles.remove("bold")
    talk(host, ("DELETE", f"{URL}/trial"))
    host.profiles.remove("bold")
    with pytest.raises(ConflictError, match="it is the default"):
        host.profiles.remove("raw")


def test_what_the_settings_define_is_changed_there() -> None:
    host = hosting(experiment())
    [refused] = talk(host, ("POST", URL, definition(coverage=0.1)))
    assert refused.status_code == 409 and "settings" in error_of(refused)["message"]


def test_there_is_room_for_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "MOST_EXPERIMENTS", 2)
    host = make_host()
    responses = talk(
        host,
        *(("POST", URL, definition(name=name)) for name in "abc"),
        ("DELETE", f"{URL}/a"),
        ("POST", URL, definition(name="c")),
        ("GET", URL),
        ("GET", "/metrics"),
    )
    assert [r.status_code for r in responses[:5]] == [201, 201, 409, 200, 201]
    assert [card["name"] for card in responses[5].json()["data"]] == ["b", "c"]
    assert 'experiment="a"' not in responses[6].text and 'experiment="c"' in responses[6].text


# Restarts.


def restarted(folder: Path, *experiments: Experiment, **options: Any) -> Host:
    return hosting(*experiments, folder=folder, **options)


def test_what_the_api_did_survives_a_restart_with_a_folder_only(tmp_path: Path) -> None:
    steps = [("POST", URL, definition()), ("POST", f"{URL}/trial/stop", {"arm": "treated"})]
    talk(restarted(tmp_path), *steps, ("POST", URL, definition(name="other")))
    host = restarted(tmp_path, default="other")
    first, second = talk(host, ("GET", URL))[0].json()["data"]
    assert (first["name"], first["status"]) == ("trial", "ended")
    assert (second["name"], second["default"]) == ("other", True)
    assert list(make_host().experiments) == []
    talk(host, ("DELETE", f"{URL}/other"))
    [entry] = [e for e in restarted(tmp_path).experiments if e.experiment.name == "other"]
    assert entry.ended is not None
    assert [path.name for path in tmp_path.iterdir()] == ["experiments.json"]


def test_a_definition_of_the_settings_cannot_change_inside_its_version(tmp_path: Path) -> None:
    restarted(tmp_path, experiment())
    with pytest.raises(ValueError, match="write version = 2"):
        restarted(tmp_path, experiment(coverage=0.5))
    [entry] = restarted(tmp_path, experiment(coverage=0.5, version=2)).experiments
    assert [each.version for each in entry.past] == [1]
    assert list(restarted(tmp_path).experiments) == []  # no more in the settings
    with pytest.raises(ValueError, match="write version = 3"):
        restarted(tmp_path, experiment())


def test_a_profile_that_is_gone_stops_its_arm(tmp_path: Path) -> None:
    talk(restarted(tmp_path), ("POST", URL, definition()))
    host = make_host(profiles=[make_profile("shy")])
    host = hosting(host=host, folder=tmp_path)
    asked, shown = talk(host, ASK, ("GET", f"{URL}/trial"))
    assert told(asked) == ("raw", None)
    assert (shown.status_code, shown.json()["status"]) == (200, "ended")
    [entry] = host.experiments
    assert entry.stopped["treated"].kind == "profile_missing"
    assert [(e.kind, e.arm) for e in events_of(host)] == [("profile_missing", "treated")]


@pytest.mark.parametrize("text", ["{", '{"format": 2, "experiments": []}', '{"format": 1}', "[]"])
def test_a_damaged_state_stops_the_start(tmp_path: Path, text: str) -> None:
    (tmp_path / "experiments.json").write_text(text)
    with pytest.raises(ValueError, match="--experiments-state"):
        restarted(tmp_path)


def test_a_folder_that_cannot_be_written_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = restarted(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(registry_module, "replace_file", full)
    refused, shown = talk(host, ("POST", URL, definition()), ("GET", URL))
    assert refused.status_code == 503 and shown.json()["data"] == []


def test_an_unknown_profile_or_default_stops_the_start() -> None:
    host = make_host()
    arms = [ARMS[0], {"name": "b", "profile": "nobody"}]
    with pytest.raises(ValueError, match="no profile nobody"):
        Registry(host.profiles, [experiment(arms=arms)])
    with pytest.raises(ValueError, match="--default-experiment other"):
        Registry(host.profiles, [experiment()], default="other")


def test_settings_hold_experiments_as_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "pilothouse.toml"
    config.write_text(
        '[[experiments]]\nname = "trial"\nshadow = 0.1\nstart = 2026-12-01T00:00:00Z\n'
        'arms = [{name = "a", profile = "raw"}, {name = "b", profile = "bold", weight = 2}]\n'
    )
    [found] = load_settings({"config": config}).experiments
    assert found.shares == (1 / 3, 2 / 3) and found.shadow == 0.1
    monkeypatch.setenv("PILOTHOUSE_EXPERIMENTS", json.dumps([definition()]))
    assert load_settings().experiments == [experiment()]
    monkeypatch.setenv("PILOTHOUSE_EXPERIMENTS", json.dumps([definition(colour=1)]))
    with pytest.raises(SettingsError, match=r"experiments\[0\].colour"):
        load_settings()


# Reports.


@dataclass
class Counted:
    """A report that counts."""

    experiment: Experiment
    records: Sequence[AnswerRecord]
    events: Sequence[EventRecord]
    judge_card: Card | None = None
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "version": self.experiment.version,
            "arms": [r.arm for r in self.records],
            "events": [e.kind for e in self.events],
            "judge": self.judge_card and self.judge_card.version,
            "none": float("nan"),
        }

    def to_text(self) -> str:
        return f"{self.experiment.name}: {len(self.records)} answers\n"

    def to_html(self) -> str:
        return f"<h1>{self.experiment.name}</h1>"

    def plots(self) -> list[Plot]:
        return [Plot("rates.png", "Rates", b"PNG")] if self.records else []


def reporting() -> Host:
    host = hosting(experiment())
    host.make_report = Counted
    post(body(model="tiny@trial", user=TREATED), host=host)
    return host


def test_a_report_is_json_a_page_or_text() -> None:
    report = f"{URL}/trial/report"
    plain, page, text, wrong, version, missing = talk(
        reporting(),
        ("GET", report),
        ("GET", f"{report}?format=html"),
        ("GET", f"{report}?format=text"),
        ("GET", f"{report}?format=pdf"),
        ("GET", f"{report}?version=7"),
        ("GET", f"{URL}/nothing/report"),
    )
    assert plain.json() == {
        "version": 1, "arms": ["treated"], "events": ["registered"], "judge": JUDGE_VERSION,
        "none": None,
    }  # fmt: skip
    assert page.headers["content-type"].startswith("text/html")
    assert "img-src data:" in page.headers["content-security-policy"]
    assert text.text == "trial: 1 answers\n"
    assert [r.status_code for r in (wrong, version, missing)] == [400, 404, 404]


def test_the_command_prints_a_running_servers_report(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with live_server(reporting()) as url:
        assert main(["experiments", "report", "trial", "--url", url]) == 0
        assert capsys.readouterr().out == "trial: 1 answers\n"
        plots = ["--plots", str(tmp_path / "plots")]
        assert main(["experiments", "report", "trial", "--url", url, *plots]) == 0
        assert (tmp_path / "plots" / "rates.png").read_bytes() == b"PNG"
        assert main(["experiments", "report", "nothing", "--url", f"{url}/v1"]) == 2
        assert "no experiment 'nothing'" in capsys.readouterr().err
    assert main(["experiments", "report", "trial", "--url", url]) == 2
    assert "cannot reach" in capsys.readouterr().err
    assert main(["experiments", "report", "trial", "--url", "file:///etc"]) == 2
