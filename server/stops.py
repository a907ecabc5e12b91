"""Stop strings: text that ends a reply and is never shown, not even in part."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets a reply's text through until one of the strings appears in it.

    Text that may be the beginning of a stop string is held back until it is known to be none. The
    string that is complete first ends the text, and of those the longest, so that what is shown
    does not depend on how the text was cut into pieces.

    Args:
        stops: none of them empty; where there are none, everything is let through at once.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        assert all(stops)
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False
        """True once a stop string has appeared; there is no more text then."""

    def push(self, piece: str) -> str:
        """What can be shown now that the text goes on with `piece`; often `""`."""
        if self.stopped:
            return ""
        text = self._held + piece
        ends = [(at + len(s), at) for s in self._stops if (at := text.find(s)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)[1]]
        held = max((overlap(text, stop) for stop in self._stops), default=0)
        shown = len(text) - held
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """What is still held back, at the end of the reply."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins, short of all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
