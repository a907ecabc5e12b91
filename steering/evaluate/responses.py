"""Every response, kept as it comes: one JSON object a line, and never the same one twice.

A line that an interruption tore is cut off when the file is opened again. A reply that failed
(`error`) is asked for again; of two lines with one key the later counts, and the earlier is gone
once a run has ended. Replies are judged when all are there, and only those that this judge, in this
version, has not judged yet.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from steering.edit import AppliedEdit
from steering.evaluate.arms import Arm, Decoding, NamedPrompts, response_key
from steering.judge import Judge, Outcome, ask
from steering.models import LanguageModel
from steering.prompts import Prompt


@dataclass(frozen=True)
class Question:
    """One reply to ask for.

    Args:
        prompt_ids: the rendered prompt.
        answer_probe: key of the monitor's answer probe, for answerers that have one.
    """

    prompt_ids: tuple[int, ...]
    edits: tuple[AppliedEdit, ...]
    decoding: Decoding
    seed: int
    answer_probe: str = ""


@dataclass(frozen=True)
class Reply:
    """What came back.

    Args:
        token_ids: with the end token, if the reply ended.
        finish_reason: `stop`, `length` or `error`.
        seconds: from the first token to the last.
        error: why there is no reply, else `""`.
        scores: what was read beside it: `refusal_score`, `benign_probability` and the like.
    """

    token_ids: tuple[int, ...]
    finish_reason: str
    seconds: float = 0.0
    error: str = ""
    scores: dict[str, float | None] | None = None


class Answerer(Protocol):
    """Answers many questions, of all arms together; a serving engine does it in shared batches."""

    def __call__(
        self, questions: Sequence[Question], on_done: Callable[[int, Reply], object], /
    ) -> object:
        """Call `on_done(index, reply)` for each question as it is answered, in any order."""
        ...


@dataclass(frozen=True)
class Response:
    """A line of the file. `profile`, `strength` and `prompt_set` are those it was first asked for;
    arms that do the same thing, and sets that share the prompt, use it too. `outcome` is `error`
    where there is no reply, or none that the judge could judge, and as long as `judge` is `""`."""

    key: str
    profile: str
    fingerprint: str
    strength: float
    prompt_set: str
    prompt: str
    reply: str
    token_ids: tuple[int, ...]
    finish_reason: str
    scores: dict[str, float | None]
    seconds: float
    session: str
    elapsed: float
    """Seconds from the start of its session to its end; of the session's last one, its length."""
    error: str = ""
    outcome: Outcome = "error"
    judge: str = ""


class ResponseLog:
    """The file of responses; opening it reads what is there. A context manager.

    Raises ValueError naming the line of what is no response.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Response] = {}
        self._lines = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.exists() else b""
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                values = json.loads(line)
                response = Response(**{**values, "token_ids": tuple(values["token_ids"])})
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{path}:{number}: not a response of this version ({error}); give another "
                    "--out, or delete the file to start again"
                ) from None
            self.found[response.key] = response
            self._lines = number
        self._file = path.open("ab")
        self._file.truncate(whole)

    def __enter__(self) -> ResponseLog:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()

    def add(self, response: Response) -> None:
        """Append at once, so that nothing that was computed is lost."""
        self.found[response.key] = response
        self._lines += 1
        self._file.write(_line(response))
        self._file.flush()

    def tidy(self) -> None:
        """One line for each response: earlier lines of the same key are dropped."""
        if self._lines == len(self.found):
            return
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_bytes(b"".join(map(_line, self.found.values())))
        self._file.close()
        partial.replace(self.path)
        self._file, self._lines = self.path.open("ab"), len(self.found)

    def done(self, key: str) -> bool:
        return key in self.found and not self.found[key].error


def _line(response: Response) -> bytes:
    return json.dumps(asdict(response), ensure_ascii=False, allow_nan=False).encode() + b"\n"


def collect(
    lm: LanguageModel,
    arms: Sequence[Arm],
    sets: Sequence[NamedPrompts],
    decoding: Decoding,
    answerer: Answerer,
    log: ResponseLog,
    *,
    on_done: Callable[[int], object] | None = None,
) -> dict[tuple[str, str], list[str]]:
    """Keys of responses by arm's and set's name, in the order of the set's prompts; the log has
    them all then, not yet judged.

    What the log has is not asked for again. Arms take turns prompt by prompt, so that rows of all
    profiles share forward passes, and an interrupted run has seen all arms alike.

    Args:
        on_done: called with the number of responses that are there, for a progress bar.
    """
    keys = {
        (arm.name, found.name): [
            response_key(lm, arm, p.text, decoding) for p in found.prompts.prompts
        ]
        for arm in arms
        for found in sets
    }
    wanted: dict[str, tuple[Arm, NamedPrompts, Prompt]] = {}
    for found in sets:
        for i, prompt in enumerate(found.prompts.prompts):
            for arm in arms:
                key = keys[arm.name, found.name][i]
                if not log.done(key):
                    wanted.setdefault(key, (arm, found, prompt))
    if on_done is not None:
        on_done(len({key for each in keys.values() for key in each}) - len(wanted))
    order = list(wanted)
    session, start = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()

    def receive(index: int, reply: Reply) -> None:
        arm, found, prompt = wanted[order[index]]
        text = lm.decode(reply.token_ids)
        log.add(
            Response(
                key=order[index],
                profile=arm.profile.name,
                fingerprint=arm.profile.fingerprint,
                strength=arm.strength,
                prompt_set=found.name,
                prompt=prompt.text,
                reply=text,
                token_ids=reply.token_ids,
                finish_reason=reply.finish_reason,
                scores=dict(reply.scores or {}),
                seconds=round(reply.seconds, 4),
                session=session,
                elapsed=round(time.monotonic() - start, 3),
                error=reply.error,
            )
        )
        if on_done is not None:
            on_done(1)

    encoded: dict[str, tuple[int, ...]] = {}
    for _, _, prompt in wanted.values():
        if prompt.text not in encoded:
            encoded[prompt.text] = tuple(lm.encode_prompt(prompt.text))
    questions = [
        Question(
            prompt_ids=encoded[prompt.text],
            edits=arm.edits,
            decoding=decoding,
            seed=decoding.seed_of(prompt.text),
            answer_probe=arm.profile.fingerprint if arm.main else "",
        )
        for arm, _, prompt in wanted.values()
    ]
    if questions:
        answerer(questions, receive)
    return keys


def judge_all(
    log: ResponseLog,
    keys: Iterable[str],
    judge: Judge,
    *,
    on_done: Callable[[int], object] | None = None,
) -> None:
    """Judge what another judge, or another version of this one, judged, or none. Outcomes are
    written down batch by batch.

    Args:
        on_done: called with the number of responses that are judged, for a progress bar.
    """
    responses = [log.found[key] for key in dict.fromkeys(keys)]
    waiting = [r for r in responses if not r.error and r.judge != judge.version]
    if on_done is not None:
        on_done(len(responses) - len(waiting))

    def receive(outcomes: Mapping[int, Outcome]) -> None:
        for i, outcome in outcomes.items():
            log.add(replace(waiting[i], outcome=outcome, judge=judge.version))
        if on_done is not None:
            on_done(len(outcomes))

    ask(judge, [r.reply for r in waiting], [r.prompt for r in waiting], receive)
