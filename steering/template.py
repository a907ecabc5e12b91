"""What a chat template is given besides the messages: kwargs, a system prompt, a date.

A probe reads the last prompt token, and that is whatever the generation prompt ends with: of a
reasoning template, another token with `enable_thinking` than without. So a monitor and a profile
record the form of the prompts they were fitted on.

Not covered: what tools and documents do to a prompt; no form has any.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cache
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateError, meta
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from steering.models import LanguageModel

FIXED_DATE = "2024-07-26"
"""What a template prints for today where prompts must be the same tomorrow: Llama-3.1's template
has this date of its own for when it is told none."""

DEFAULT_KWARGS: Mapping[str, Any] = {"enable_thinking": False}
"""Passed to templates that know them: replies then begin with the reply, not with reasoning."""

DATE_KWARGS = frozenset({"date_string"})
"""Of Llama-3's templates. A date does not make a prompt another form."""

_STRFTIME = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_RESERVED = frozenset(
    {
        *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
        *PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES,
        *("messages", "raise_exception", "strftime_now"),
    }
)
# They end in different characters, so that what all prompts end with is none of theirs.
_SAMPLES = ("Hello", "What is this?", "Count to 17")


@dataclass(frozen=True)
class TemplateForm:
    """How prompts were rendered.

    Args:
        template_kwargs: JSON scalars passed to the template.
        system_prompt: content of the system message; None for no such message.
        template_date: ISO date that the template printed for today; None where it prints none.
    """

    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    system_prompt: str | None = None
    template_date: str | None = None

    def admits(
        self, messages: Sequence[Mapping[str, Any]], template_kwargs: Mapping[str, Any]
    ) -> bool:
        """Whether a conversation rendered with these kwargs is of this form, whatever its date."""
        system = [message["content"] for message in messages if message["role"] == "system"]
        expected = [] if self.system_prompt is None else [self.system_prompt]
        return system == expected and _undated(template_kwargs) == _undated(self.template_kwargs)

    def to_json(self) -> dict[str, Any]:
        """Under the names that provenance has them."""
        return {
            "template_kwargs": dict(self.template_kwargs),
            "system_prompt": self.system_prompt,
            "template_date": self.template_date,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TemplateForm:
        """From `to_json`; what is absent is the default. Raises ValueError for what is no form."""
        kwargs = values.get("template_kwargs", {})
        system, day = values.get("system_prompt"), values.get("template_date")
        if not isinstance(kwargs, Mapping) or not isinstance(system, str | None):
            raise ValueError("its template_kwargs or its system_prompt is malformed")
        return cls(dict(kwargs), system, None if day is None else check_date(day))


def _undated(template_kwargs: Mapping[str, Any]) -> str:
    # In JSON, because Python takes 0 for False, and templates do not.
    kept = {key: value for key, value in template_kwargs.items() if key not in DATE_KWARGS}
    return json.dumps(kept, sort_keys=True)


def form_of(lm: LanguageModel) -> TemplateForm:
    """The form of the prompts that `lm.encode_prompt` makes."""
    return TemplateForm(dict(lm.template_kwargs), lm.system_prompt, lm.template_date)


def with_form(lm: LanguageModel, form: TemplateForm) -> LanguageModel:
    """The same model, making prompts of this form."""
    return replace(lm, **form.to_json())


def prompt_ending(lm: LanguageModel) -> tuple[int, ...]:
    """Token ids that every prompt ends with: the end of a turn and the generation prompt."""
    reversed_prompts = [lm.encode_prompt(text)[::-1] for text in _SAMPLES]
    columns = zip(*reversed_prompts, strict=False)
    common = [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, columns)]
    return tuple(reversed(common))


def check_kwargs(lm: LanguageModel, template_kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError naming the first one that the model's chat template does not mention."""
    known = template_variables(template_text(lm.tokenizer))
    for name in template_kwargs:
        if name not in known:
            there = ", ".join(sorted(known)) or "nothing besides messages"
            raise ValueError(f"the chat template does not know {name[:64]!r}; it takes {there}")


def template_text(tokenizer: Any) -> str:
    """The chat template that plain conversations are rendered with; `""` if there is none."""
    return str(tokenizer.get_chat_template()) if tokenizer.chat_template else ""


@cache
def template_variables(template: str) -> frozenset[str]:
    """Names that a chat template looks up and a caller may give, as `enable_thinking`.

    Not among them is what rendering itself provides: messages, tools, special tokens, the date.
    """
    environment = Environment(extensions=[loopcontrols, _Generation])  # only to parse
    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(template))) - _RESERVED
    except TemplateError:  # it cannot be rendered either, and says so then
        return frozenset()


class _Generation(Extension):
    """`{% generation %}`, which transformers adds to Jinja to mark the assistant's text."""

    tags = {"generation"}  # noqa: RUF012, as jinja2 declares it

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def default_kwargs(template: str) -> dict[str, Any]:
    """`DEFAULT_KWARGS` that the template knows."""
    known = template_variables(template)
    return {name: value for name, value in DEFAULT_KWARGS.items() if name in known}


def prints_today(template: str) -> bool:
    """Whether prompts rendered with it change from day to day."""
    return _STRFTIME.search(template) is not None


def with_date(template: str, day: str) -> str:
    """The template with an ISO date in place of today's.

    In its text, because transformers hands callables to no template.
    """
    on = date.fromisoformat(day)
    return _STRFTIME.sub(lambda match: json.dumps(on.strftime(match[2])), template)


def check_date(day: str) -> str:
    """`day` if it is an ISO date, as 2024-07-26; ValueError if not."""
    try:
        return date.fromisoformat(day).isoformat()
    except (TypeError, ValueError):
        raise ValueError(f"{day!r} is no date; write YYYY-MM-DD") from None
