"""What a key may ask for in a minute: requests, and tokens of prompts and replies together.

Token buckets: each holds a minute's worth, refills evenly, and an idle key may spend all at once.
A reply's tokens are reserved before the engine starts, as many as it may get, and what it did not
need is given back when it ends, however it ends.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from server.auth import Key
from server.errors import RateLimitError

Clock = Callable[[], float]
"""Seconds from any fixed point, never backwards."""


class TokenBucket:
    """Holds up to `per_minute` tokens and refills evenly; full at first."""

    def __init__(self, per_minute: int, clock: Clock = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._at = clock()

    @property
    def level(self) -> float:
        """What is in it now; below 0 after more was taken than it holds."""
        now = self._clock()
        refilled = self._level + (now - self._at) * self.per_minute / 60
        self._level, self._at = min(float(self.per_minute), refilled), now
        return self._level

    def take(self, amount: int) -> float:
        """Take `amount` and return 0, or take nothing and return the seconds until that works.

        More than a bucket holds can be taken from a full one, which is then in debt for longer:
        what is asked is never impossible, and the rate holds all the same.
        """
        missing = min(amount, self.per_minute) - self.level
        if missing > 1e-9:
            return missing * 60 / self.per_minute
        self._level -= amount
        return 0.0

    def give_back(self, amount: int) -> None:
        """Undo a part of what was taken."""
        self._level = min(float(self.per_minute), self.level + amount)

    def headers(self, what: str) -> dict[str, str]:
        """OpenAI's headers."""
        level = self.level
        return {
            f"X-RateLimit-Limit-{what}": str(self.per_minute),
            f"X-RateLimit-Remaining-{what}": str(max(0, math.floor(level + 1e-9))),
            f"X-RateLimit-Reset-{what}": duration((self.per_minute - level) * 60 / self.per_minute),
        }


class Quota:
    """A key's two buckets."""

    def __init__(self, key: Key, clock: Clock = time.monotonic) -> None:
        def bucket(per_minute: int | None) -> TokenBucket | None:
            return None if per_minute is None else TokenBucket(per_minute, clock)

        self.limits = (key.requests_per_minute, key.tokens_per_minute)
        self.requests, self.tokens = map(bucket, self.limits)

    def take_request(self) -> None:
        """Count a request. Raises RateLimitError."""
        _take(self.requests, 1, "requests")

    def reserve(self, tokens: int) -> Charge:
        """Set tokens aside for a reply. Raises RateLimitError."""
        _take(self.tokens, tokens, "tokens")
        return Charge(self.tokens, tokens)

    @property
    def headers(self) -> dict[str, str]:
        """What a response says of the limits that there are."""
        requests = {} if self.requests is None else self.requests.headers("Requests")
        return requests | ({} if self.tokens is None else self.tokens.headers("Tokens"))


class Charge:
    """Tokens set aside for one reply, until it is known how many it used."""

    def __init__(self, bucket: TokenBucket | None, reserved: int) -> None:
        self._bucket = bucket
        self._reserved = reserved

    def split(self, parts: Sequence[int]) -> list[Charge]:
        """One for each part of what was reserved; this one is theirs from now on."""
        assert sum(parts) == self._reserved or self._bucket is None
        bucket, self._bucket = self._bucket, None
        return [Charge(bucket, part) for part in parts]

    def settle(self, used: int) -> None:
        """The reply has ended; only the first call counts."""
        bucket, self._bucket = self._bucket, None
        if bucket is not None:
            bucket.give_back(self._reserved - used)


def _take(bucket: TokenBucket | None, amount: int, what: str) -> None:
    seconds = 0.0 if bucket is None else bucket.take(amount)
    if bucket is not None and seconds:
        raise RateLimitError(
            f"This key may use {bucket.per_minute} {what} per minute and this request needs "
            f"{amount}. Try again in {duration(seconds)}.",
            headers={"Retry-After": str(math.ceil(seconds))},
        )


def duration(seconds: float) -> str:
    """As OpenAI writes it in headers: `250ms`, `1.5s`, `6m0s`."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < 60:
        return f"{seconds:.1f}".removesuffix(".0") + "s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s"
