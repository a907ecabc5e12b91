"""How a request's conversation is rendered, and whether the monitor was fitted on such prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from server.errors import InvalidRequestError
from server.hosting import Host
from server.protocol import ChatRequest, TokenizeRequest
from server.tools import Tool
from steering.template import check_kwargs

ROLES = ("system", "developer", "user", "assistant")
"""Of turns that the monitor may be fitted on; a tool's results are of another form."""


def asked_kwargs(host: Host, body: ChatRequest | TokenizeRequest) -> dict[str, Any]:
    """`chat_template_kwargs` for the template; null asks for nothing. Raises InvalidRequestError
    for one that the template does not know."""
    asked = {k: v for k, v in (body.chat_template_kwargs or {}).items() if v is not None}
    try:
        check_kwargs(host.lm, asked)
    except ValueError as error:
        raise InvalidRequestError(
            f"'chat_template_kwargs': {error}.", param="chat_template_kwargs"
        ) from None
    return asked


@dataclass(frozen=True)
class Reading:
    """What the monitor can read of a prompt.

    Args:
        probes: the prompt has the form that the monitor was fitted on.
        refusal_score: it ends as those prompts do, so that the reply begins right after it.
    """

    probes: bool = True
    refusal_score: bool = True


WITHOUT_TEMPLATE = Reading(probes=False, refusal_score=False)
"""Of a plain completion's prompt, which is no conversation."""


def reading(
    host: Host, body: ChatRequest, prompt_ids: Sequence[int], offered: Sequence[Tool] = ()
) -> Reading:
    """What the host's monitor can read of a request's prompt.

    Args:
        offered: the tools that the prompt tells of, which need not be all that the body holds.
    """
    if host.monitor is None:
        return Reading()
    ending = host.prompt_ending
    ends_alike = tuple(prompt_ids[len(prompt_ids) - len(ending) :]) == ending
    # Asked by name, because not all of them show in what they make of a short prompt's end.
    plain = not (offered or body.continue_final_message) and all(
        message.role in ROLES and not message.tool_calls for message in body.messages
    )
    same_form = plain and host.monitor.template.admits(
        [message.rendered() for message in body.messages],
        {**host.lm.template_kwargs, **asked_kwargs(host, body)},
    )
    return Reading(ends_alike and same_form, ends_alike)
