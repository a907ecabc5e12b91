"""Grammars that a reply must follow, through llguidance (the extra `structured`).

A grammar is Lark text (llguidance's dialect, which embeds JSON schemas); compiled, it is a
`TokenConstraint` for the engine. It works on bytes, so it fits any tokenizer that transformers
loads as a fast one, and a half character is never the end of a string.

Chosen over xgrammar (whose bounded strings let control characters through, and which pulls in
triton) and outlines-core (no recursion, no numeric bounds).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import threading
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.engine.base import ConstraintError
from steering.models import LanguageModel

MAX_GRAMMAR_CHARACTERS = 32 * 1024
"""Of a grammar's text. Compiling takes up to about 1.5 s at this length (measured: a schema with
1,300 optional properties)."""
COMPILE_SECONDS = 10
CACHED_GRAMMARS = 64
MAX_MULTIPLE = 100_000
"""Of `multipleOf`, the least common multiple where there are several, without trailing zeros: the
automaton has a state for each remainder, and llguidance has no limit of its own."""

# Optional, and bounded: a model that likes blanks would otherwise write nothing else.
_WHITESPACE = r"[ ]|\n[ ]{0,20}"


class GrammarError(ValueError):
    """The grammar or schema cannot be used; the message says why."""


class MissingExtraError(GrammarError):
    """llguidance is not installed."""

    def __init__(self) -> None:
        super().__init__("this server lacks the extra for it: pip install 'pilothouse[structured]'")


class Grammar:
    """Where one reply stands in its grammar: a `TokenConstraint`."""

    def __init__(self, grammar: str, matcher: Any, vocabulary: int) -> None:
        self.grammar = grammar
        self._matcher = matcher
        self._vocabulary = vocabulary

    def allowed(self) -> Tensor:
        """Bool `[vocabulary]`; only end tokens once the text is complete.

        Raises ConstraintError where the grammar is too complex, or a dead end.
        """
        matcher = self._matcher
        bits = matcher.compute_bitmask()
        if matcher.is_error():
            raise ConstraintError(_reason(matcher.get_error()))
        packed = np.frombuffer(bits, np.uint8)
        unpacked = np.unpackbits(packed, count=self._vocabulary, bitorder="little")
        return torch.from_numpy(unpacked.view(np.bool_))

    def accept(self, token_id: int) -> None:
        if not self._matcher.consume_token(token_id):
            raise ConstraintError(_reason(self._matcher.get_error()))

    def copy(self) -> Grammar:
        return Grammar(self.grammar, self._matcher.deep_copy(), self._vocabulary)


class GrammarCompiler:
    """Compiles grammars for one model's tokens, off the event loop, and keeps the latest.

    Threads of its own compile one grammar after the other: a slow one delays other new grammars,
    and nothing else. One that takes too long is refused; its thread cannot be stopped, but it
    keeps neither the others nor the process's end waiting.
    """

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm
        self._tokenizer: Any = None
        self._cache: dict[str, Grammar] = {}
        self._turn = threading.Lock()

    async def compile(self, grammar: str) -> Grammar:
        """The grammar at its start; copy it before use. Raises GrammarError."""
        check_length(len(grammar))
        if (known := self._cache.get(grammar)) is not None:
            return known
        turn, loop = self._turn, asyncio.get_running_loop()
        result: asyncio.Future[Grammar] = loop.create_future()

        def tell(compiled: Grammar | None, error: Exception | None) -> None:
            if result.done():  # nobody waits any more
                return
            if compiled is not None:
                result.set_result(compiled)
            elif error is not None:
                result.set_exception(error)

        def work() -> None:
            compiled, failure = None, None
            try:
                with turn:
                    compiled = self._compile(grammar)
            except Exception as error:
                failure = error
            with contextlib.suppress(RuntimeError):  # the loop has closed
                loop.call_soon_threadsafe(tell, compiled, failure)

        threading.Thread(target=work, name="grammar", daemon=True).start()
        try:
            return await asyncio.wait_for(result, COMPILE_SECONDS)
        except TimeoutError:
            if self._turn is turn:
                self._turn = threading.Lock()
            raise GrammarError(f"compiling it takes more than {COMPILE_SECONDS} s") from None

    def _compile(self, grammar: str) -> Grammar:
        if (known := self._cache.get(grammar)) is not None:
            return known
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError:
            raise MissingExtraError from None
        if self._tokenizer is None:
            self._tokenizer = _byte_tokenizer(self._lm)
        limits = LLParserLimits(verbose_errors=False)
        try:
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        except ValueError as error:
            raise GrammarError(_reason(str(error))) from error
        if matcher.is_error():
            raise GrammarError(_reason(matcher.get_error()))
        compiled = Grammar(grammar, matcher, self._tokenizer.vocab_size)
        try:
            compiled.copy().allowed()
        except ConstraintError as error:
            raise GrammarError(str(error)) from error
        while len(self._cache) >= CACHED_GRAMMARS:
            del self._cache[next(iter(self._cache))]
        self._cache[grammar] = compiled
        return compiled


def check_length(characters: int) -> None:
    """Raise GrammarError for a grammar of more characters than are compiled, or at least so
    many."""
    if characters > MAX_GRAMMAR_CHARACTERS:
        raise GrammarError(
            f"the schemas are longer than {MAX_GRAMMAR_CHARACTERS} characters, together with what "
            "frames them"
        )


def json_text(schema: Mapping[str, Any]) -> str:
    """Lark for text that satisfies a JSON schema. Raises GrammarError."""
    common = 1
    for multiple in _multiples(schema):
        common = math.lcm(common, multiple)
        if common > MAX_MULTIPLE:
            raise GrammarError(
                f"'multipleOf' goes up to {MAX_MULTIPLE} here, several taken together"
            )
    # The last word on options: a schema may bring its own, `lenient` among them.
    options = {"whitespace_pattern": _WHITESPACE}
    try:
        return "%json " + json.dumps({**schema, "x-guidance": options})
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the schema is no JSON: {error}") from error


def _multiples(schema: Mapping[str, Any]) -> Iterator[int]:
    """The digits of every `multipleOf`, without point and trailing zeros.

    Raises GrammarError for a schema that is too long to be read to its end: this runs on the event
    loop.
    """
    pending: list[Any] = [schema]
    seen = 0
    while pending:
        node = pending.pop()
        check_length(seen := seen + 1)  # each takes a character or more
        if isinstance(node, Mapping):
            pending += node.values()
            value = node.get("multipleOf")
            if isinstance(value, int | float) and value and abs(value) < math.inf:
                digits = "".join(map(str, Decimal(str(abs(value))).as_tuple().digits))
                yield int(digits.rstrip("0"))
        elif isinstance(node, list):
            pending += node


def literal(text: str) -> str:
    """Lark for exactly this text."""
    return json.dumps(text)


def _byte_tokenizer(lm: LanguageModel) -> Any:
    """llguidance's view of the vocabulary: each token's bytes, and which tokens end a reply."""
    from llguidance.hf import from_tokenizer

    if not lm.eos_token_ids:
        raise GrammarError("this model has no end token, so no reply could ever be complete")
    try:
        return from_tokenizer(
            lm.tokenizer,
            n_vocab=lm.model.get_output_embeddings().weight.shape[0],
            eos_token=sorted(lm.eos_token_ids),
        )
    except ValueError as error:
        reason = _reason(str(error))
        raise GrammarError(f"this model's tokenizer cannot be constrained: {reason}") from error


def _reason(message: str) -> str:
    """What llguidance says, in a line, without its positions in text that no client wrote."""
    if message.startswith("NoExtension"):
        return "no text can satisfy it"
    said = re.split(r"\n *\d+ \|", message.replace("<non-verbose/>", ""))[0]
    said = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", said)
    return " ".join(said.split())[:300].rstrip(".")
