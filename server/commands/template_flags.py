"""Flags that say how prompts are rendered."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from server.validation import parse_template_kwargs

if TYPE_CHECKING:
    from steering.models import LanguageModel


def register(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("chat template")
    group.add_argument(
        "--chat-template-kwargs",
        default="{}",
        metavar="JSON",
        help="passed to the template; one that knows enable_thinking gets false by default",
    )
    group.add_argument("--system-prompt", metavar="TEXT", help="system message before each prompt")
    group.add_argument(
        "--template-date",
        metavar="YYYY-MM-DD",
        help="what templates print for today (default: always the same date)",
    )


def check(arguments: argparse.Namespace) -> None:
    """Raise ValueError for values that no template takes."""
    from steering.template import check_date

    for flag, parse in (
        ("chat_template_kwargs", parse_template_kwargs),
        ("template_date", check_date),
    ):
        if (value := getattr(arguments, flag)) is not None:
            try:
                parse(value)
            except ValueError as error:
                raise ValueError(f"--{flag.replace('_', '-')}: {error}") from None


def apply(lm: LanguageModel, arguments: argparse.Namespace) -> LanguageModel:
    """The model, rendering prompts as the flags say. Raises ValueError for what the model's
    template does not know."""
    from dataclasses import replace

    from steering.template import FIXED_DATE, check_kwargs, prints_today, template_text

    kwargs = parse_template_kwargs(arguments.chat_template_kwargs)
    check_kwargs(lm, kwargs)
    dated = prints_today(template_text(lm.tokenizer))
    if arguments.template_date is not None and not dated:
        raise ValueError("--template-date: this model's chat template prints no date; leave it out")
    return replace(
        lm,
        template_kwargs={**lm.template_kwargs, **kwargs},
        system_prompt=arguments.system_prompt,
        template_date=(arguments.template_date or FIXED_DATE) if dated else None,
    )
