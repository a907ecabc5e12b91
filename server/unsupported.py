"""Fields that clients may send and this server does not implement: which are refused, and when."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from server.errors import InvalidRequestError

# Fields of OpenAI's or vLLM's API that this server does not implement, with the values that ask
# for nothing. Null asks for nothing everywhere.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # OpenAI
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM and others
    "add_special_tokens": (False,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "min_tokens": (0,),
    "priority": (0,),
    "prompt_logprobs": (0,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
UNSUPPORTED_IN_COMPLETIONS: dict[str, tuple[Any, ...]] = {
    **{k: v for k, v in UNSUPPORTED.items() if k not in ("add_special_tokens", "best_of")},
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "add_generation_prompt": (),
    "continue_final_message": (),
    "messages": (),
    "suffix": ("",),
    "top_logprobs": (0,),
}
UNSUPPORTED_IN_COMPARE: dict[str, tuple[Any, ...]] = {
    **UNSUPPORTED,
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "logprobs": (False,),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "steering": ({},),
    "stream_options": ({}, {"include_usage": True}),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
UNSUPPORTED_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
}


def ignored_fields(
    extra: dict[str, Any], unsupported: dict[str, tuple[Any, ...]], prefix: str
) -> Iterator[str]:
    """Names of the fields that nobody knows, as `X-Ignored-Fields` has them.

    Args:
        extra: fields that the server does not implement, with their values.
        unsupported: one of the tables above.
        prefix: path of what holds them, as `messages[0].`.

    Raises InvalidRequestError for one that is known and asks for something.
    """
    told_prefix = re.sub(r"\[\d+\]", "", prefix) if extra else ""
    for name, value in extra.items():
        if value is None:
            continue
        accepted = unsupported.get(name)
        if accepted is None:
            yield told_prefix + name
        elif not any(_same(value, default) for default in accepted):
            told = f" (leave it out or send {json.dumps(accepted[0])})" if accepted else ""
            raise InvalidRequestError(
                f"This server does not support {prefix + name!r}{told}.",
                param=prefix + name,
                code="unsupported_parameter",
            )


def _same(value: Any, default: Any) -> bool:
    """Equal, and no boolean that stands for a number or the other way round."""
    return bool(value == default) and isinstance(value, bool) == isinstance(default, bool)
