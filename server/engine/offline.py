"""Greedy replies to many prompts on the local engine, for fitting and measuring without a server.

One engine serves all calls. It is started by the first, when the length of the prompts is known,
and again only where a later call needs longer sequences.

Not covered: scores and sampling; see `server.engine.local`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from server.engine.base import EngineError, EngineRequest, Sampling
from server.engine.batch import answer_all
from server.engine.local import LocalEngine
from steering.edit import AppliedEdit
from steering.models import LanguageModel

_LENGTHS = 64
"""Sequence lengths are rounded up to a multiple of this, so that similar calls share an engine."""


class OfflineGenerator:
    """A `steering.generate.Generator` that keeps its batch full; use it in a `with`.

    Args:
        max_num_seqs: prompts answered at once.
    """

    def __init__(self, *, max_num_seqs: int = 32) -> None:
        self.max_num_seqs = max_num_seqs
        self._engine: LocalEngine | None = None

    def __enter__(self) -> OfflineGenerator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine and remove its hooks; the next call starts another."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def __call__(
        self,
        lm: LanguageModel,
        prompts: Sequence[Sequence[int]],
        *,
        edits: Sequence[AppliedEdit] = (),
        max_tokens: int = 128,
        on_done: Callable[[int], object] | None = None,
    ) -> list[list[int]]:
        """Replies (token ids, without the end token), as `steering.generate.generate` gives them.

        Raises ValueError for prompts that do not fit the model's context with their reply.
        """
        if not prompts:
            return []
        engine = self._running(lm, max(map(len, prompts)) + max_tokens)
        sampling = Sampling(temperature=0.0, max_tokens=max_tokens)
        requests = [
            EngineRequest(str(i), tuple(ids), sampling, tuple(edits))
            for i, ids in enumerate(prompts)
        ]
        try:
            for request in requests:  # all of them, before the first is answered
                engine.check(request)
            answers = answer_all(engine, requests, lambda *_: on_done and on_done(1))
        except EngineError as error:
            raise ValueError(f"prompts cannot be answered: {error}") from error
        for answer in answers:
            if answer.error:
                raise ValueError(f"prompts cannot be answered: {answer.error}")
        return [_without_end(answer.token_ids, lm) for answer in answers]

    def _running(self, lm: LanguageModel, length: int) -> LocalEngine:
        engine = self._engine
        if engine is not None and engine.lm is lm and length <= engine.max_model_len:
            return engine
        self.close()
        # At least the context itself: what is longer is refused by the engine, with the numbers.
        longest = min(-(-length // _LENGTHS) * _LENGTHS, lm.context_length)
        engine = LocalEngine(
            lm,
            max_num_seqs=self.max_num_seqs,
            max_model_len=longest,
            max_waiting=sys.maxsize,
            max_unsplit_prompt=longest,
        )
        engine.start()
        self._engine = engine
        return engine


def _without_end(token_ids: Sequence[int], lm: LanguageModel) -> list[int]:
    ended = bool(token_ids) and token_ids[-1] in lm.eos_token_ids
    return list(token_ids[:-1] if ended else token_ids)
