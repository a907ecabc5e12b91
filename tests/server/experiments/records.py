"""Records for tests, and a process that writes them until it is killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from server.experiments.database import Database
from server.experiments.journal import Journal
from server.experiments.records import AnswerRecord, EventRecord
from server.experiments.store import Records
from server.experiments.writer import DatabaseWriter

ROOT = Path(__file__).parents[3]


def answer(i: int = 0, **changes: Any) -> AnswerRecord:
    """An exposure whose id and time follow from `i`."""
    values: dict[str, Any] = dict(
        id=f"chatcmpl-{i:06}", time=1_700_000_000.0 + i, experiment="tone", version=1, arm="a",
        unit="0f", sticky=True, kind="exposure", pair=f"chatcmpl-{i:06}", request_id=f"r{i}",
        profile="raw", fingerprint="", strength=None, model="demo", weights="ab",
        prompt_class="benign", benign_probability=0.9, refusal_score=-3.25,
        answer_probability=None, outcome="answer", judge="phrases", finish_reason="stop",
        prompt_tokens=12, completion_tokens=7, ttft_seconds=0.01, duration_seconds=0.25,
    )  # fmt: skip
    return AnswerRecord(**values | changes)


def event(i: int = 0, **changes: Any) -> EventRecord:
    values: dict[str, Any] = dict(
        id=f"event-{i}", time=1_700_000_000.0 + i, experiment="tone", version=1,
        kind="guard_rail", arm="b", detail={"rate": 0.5, "of": [1, None, "é"]},
    )  # fmt: skip
    return EventRecord(**values | changes)


def make_records(folder: Path, url: str, *, with_text: bool = False, **writer: Any) -> Records:
    """Not started; asks a database that does not answer again at once."""
    writer.setdefault("backoff_seconds", (0.01, 0.02))
    journal, database = Journal(folder), Database(url)
    return Records(
        journal, database, DatabaseWriter(journal, database, **writer), with_text=with_text
    )


_WRITER = """
import sys
from pathlib import Path
from tests.server.experiments.records import answer, make_records

folder, url, first, last = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
records = make_records(folder, url)
records.start()
for i in range(first, last):
    records.append(answer(i))
    assert records.lost == 0
    print(i, flush=True)  # the client has its answer
records.close(60)
"""


def writing_process(
    folder: Path, url: str, first: int = 0, last: int = 10**6
) -> subprocess.Popen[str]:
    """A server, as far as records go, that says of each when it has it."""
    return subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(folder), url, str(first), str(last)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def kill_after(process: subprocess.Popen[str], records: int) -> list[int]:
    """Kill -9 once so many records are acknowledged; all those that were."""
    assert process.stdout is not None
    acknowledged = [int(process.stdout.readline()) for _ in range(records)]
    process.kill()
    rest = process.stdout.read()  # the last line may be cut off
    acknowledged += [int(line) for line in rest[: rest.rfind("\n") + 1].split()]
    process.wait()
    process.stdout.close()
    return acknowledged
