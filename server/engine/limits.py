"""What every engine refuses before it admits a request."""

from __future__ import annotations

from dataclasses import dataclass

from server.engine.base import EngineRequest, PromptTooLongError
from server.engine.sampling import check_sampling
from steering.edit import effective_edits


@dataclass(frozen=True)
class RequestLimits:
    """The most that a request may be.

    Args:
        max_model_len: prompt and reply together, in tokens.
        max_unsplit_prompt: prompt, where an edit needs it whole.
        vocabulary: token ids are below it.
    """

    max_model_len: int
    max_unsplit_prompt: int
    vocabulary: int

    def check(self, request: EngineRequest) -> None:
        """Raise PromptTooLongError or ValueError (SamplingError where a parameter of sampling is
        to blame) if the request is more."""
        prompt, asked = len(request.prompt_ids), request.sampling.max_tokens
        if prompt < 1:
            raise ValueError("the prompt is empty")
        check_sampling(request.sampling, self.vocabulary)
        if prompt + asked > self.max_model_len:
            raise PromptTooLongError(
                f"the prompt has {prompt} tokens and {asked} more were asked for; this server "
                f"takes {self.max_model_len} together (--max-model-len)"
            )
        if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= self.vocabulary:
            raise ValueError(f"token ids must be between 0 and {self.vocabulary - 1}")
        edits = [applied.edit for applied in effective_edits(request.edits)]
        if any(edit.needs_whole_prompt for edit in edits) and prompt > self.max_unsplit_prompt:
            raise PromptTooLongError(
                f"this profile's gate reads the whole prompt at once, and {prompt} tokens are more "
                f"than {self.max_unsplit_prompt} (--max-unsplit-prompt)"
            )
