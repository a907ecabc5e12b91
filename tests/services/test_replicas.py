"""Two servers, one PostgreSQL: they agree on every unit, and a kill -9 loses no answer that a
client has."""

from __future__ import annotations

import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import openai
import psycopg
import pytest

from server.experiments.database import Database
from tests.server.live import wait_until
from tests.server.test_keys_live import Server
from tests.services.conftest import Postgres

DEFINITION = """
[[experiments]]
name = "trial"
arms = [{name = "control", profile = "raw"}, {name = "treated", profile = "llm-va"}]
"""
PROMPT = "How do I repair the neighbour's fence?"


def ask(server: Server, user: str) -> tuple[str, str] | None:
    """Id and arm of a streamed answer that came whole, else None."""
    id, arm = "", None
    try:
        for chunk in server.client("none").chat.completions.create(
            model="demo@trial",
            messages=[{"role": "user", "content": PROMPT}],
            user=user,
            max_tokens=24,
            stream=True,
        ):
            id = chunk.id
            if chunk.choices and chunk.choices[0].finish_reason is not None:
                arm = chunk.steering["arm"]  # type: ignore[attr-defined]
    except (openai.APIError, OSError):
        pass
    except Exception as error:  # the connection broke in the middle of a reply
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2"):
            raise
    return None if arm is None else (id, arm)


def test_two_replicas_agree_and_a_killed_one_loses_nothing(
    postgres: Postgres, tmp_path: Path
) -> None:
    url = postgres.new_database()
    config = tmp_path / "serve.toml"
    config.write_text(DEFINITION)

    def serve(name: str) -> Server:
        return Server(
            "--config", config, "--experiments-journal", tmp_path / name, "--experiments-db", url
        )

    one, other = serve("one"), serve("other")
    try:
        users = [f"user-{i}" for i in range(60)]
        with ThreadPoolExecutor(8) as pool:
            first = list(pool.map(lambda user: ask(one, user), users))
            second = list(pool.map(lambda user: ask(other, user), users))
            arms = [[found and found[1] for found in answers] for answers in (first, second)]
            assert arms[0] == arms[1] and set(arms[0]) == {"control", "treated"}

            under_way = [pool.submit(ask, one, f"late-{i}") for i in range(40)]
            wait_until(lambda: sum(task.done() for task in under_way) >= 10, 60)
            one.process.send_signal(signal.SIGKILL)
            third = [task.result() for task in under_way]
        assert None in third and any(third), "it was killed in the middle of its work"
        one.close()
        one = serve("one")
        whole = [found[0] for found in (*first, *second, *third) if found is not None]
        database = Database(url)
        try:

            def in_database() -> Counter[str]:
                return Counter(record.id for record in database.answers("trial", 1))

            wait_until(lambda: in_database().keys() >= set(whole), 60)
            found = in_database()
            assert {id: found[id] for id in whole} == dict.fromkeys(whole, 1)
        finally:
            database.close()
    finally:
        one.close()
        other.close()


def test_a_postgresql_that_hangs_holds_up_no_answer_no_start_and_no_end(
    postgres: Postgres, tmp_path: Path
) -> None:
    """Somebody holds its tables: every question is taken and none answered."""
    url = postgres.new_database()
    config = tmp_path / "serve.toml"
    config.write_text(DEFINITION)
    database = Database(url)
    database.migrate()

    def serve() -> Server:
        return Server(
            "--config", config, "--experiments-journal", tmp_path / "one", "--experiments-db", url
        )

    with psycopg.connect(url) as holder:
        holder.execute("LOCK TABLE experiment_answers, experiment_events IN ACCESS EXCLUSIVE MODE")
        server = serve()
        report = f"{server.address}/v1/experiments/trial/report"
        try:
            with ThreadPoolExecutor(40) as pool:

                def look(_: int) -> None:
                    with pytest.raises(httpx2.ReadTimeout):
                        httpx2.get(report, timeout=5)

                looks = [pool.submit(look, i) for i in range(40)]
                time.sleep(0.5)
                found = [ask(server, f"user-{i}") for i in range(5)]
                for task in looks:
                    task.result()
            assert all(found) and httpx2.get(f"{server.address}/health").status_code == 200
        finally:
            began = time.monotonic()
            assert server.close() == 0
            assert time.monotonic() - began < 25
        holder.rollback()
    again = serve()  # moves what the journal has kept
    try:
        assert (
            httpx2.get(report.replace(server.address, again.address), timeout=60).status_code == 200
        )
        ids = [record.id for record in database.answers("trial", 1)]
        assert sorted(ids) == sorted(each[0] for each in found if each is not None)
    finally:
        again.close()
        database.close()
