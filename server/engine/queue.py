"""Requests that wait for a slot, taken fairly from the clients that sent them.

Fair means max-min: a free slot goes to the waiting client that has the fewest requests running, and
among equals to the one that has waited longest for its turn. Requests of one client keep their
order.

Requests of a lower class (`EngineRequest.priority` above 0: work that nobody waits for) come after
everybody else's, in their order, and take no room from them.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping

from server.engine.base import QueueFullError
from server.engine.rows import Waiting

_SHARE = 4
"""A named client may wait with at most this many requests per place that is still free, so that one
alone takes four fifths of the queue, two take four ninths each, and a newcomer always finds room
(the dynamic threshold of Choudhury and Hahne, 1998)."""


class FairQueue:
    """Waiting requests by client. Not safe for threads: the engine holds its lock.

    Args:
        limit: requests that may wait, all clients together.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._clients: OrderedDict[str, deque[Waiting]] = OrderedDict()
        self._later: deque[Waiting] = deque()
        """Of lower classes; the next one first."""

    def __len__(self) -> int:
        return self.urgent + len(self._later)

    @property
    def urgent(self) -> int:
        """Requests that somebody waits for."""
        return sum(len(queue) for queue in self._clients.values())

    def __iter__(self) -> Iterator[Waiting]:
        for queue in self._clients.values():
            yield from queue
        yield from self._later

    def put(self, *requests: Waiting) -> None:
        """Add requests of one client and class, all or none. Raises QueueFullError."""
        if not requests:
            return
        if requests[0].request.priority > 0:
            self._put_later(*requests)
            return
        client = requests[0].request.client
        own = len(self._clients.get(client, ()))
        if not self._room(client, own, len(requests)):
            self.forget_cancelled()
            own = len(self._clients.get(client, ()))
            if not self._room(client, own, len(requests)):
                raise QueueFullError(
                    f"{own} of this client's requests are waiting already"
                    if self.urgent + len(requests) <= self.limit
                    else f"{self.urgent} requests are waiting already"
                )
        self._clients.setdefault(client, deque()).extend(requests)

    def _room(self, client: str, own: int, more: int) -> bool:
        free = self.limit - self.urgent - more
        if free < 0:
            return False
        # Whoever has no name shares the whole queue with the others that have none.
        return not client or own + more <= max(1, _SHARE * free)

    def _put_later(self, *requests: Waiting) -> None:
        if len(self) + len(requests) > self.limit // 2:
            raise QueueFullError("the queue is more than half full")
        self._later.extend(requests)
        self._later = deque(sorted(self._later, key=lambda w: w.request.priority))  # stable

    def pop(self, running: Mapping[str, int] | None = None) -> Waiting | None:
        """The next request, None where nobody waits.

        Args:
            running: requests in slots, by client.
        """
        self.forget_cancelled()
        if not self._clients:
            return self._later.popleft() if self._later else None
        counts = Counter(running or {})
        client = min(self._clients, key=lambda name: counts[name])  # the first of equals
        queue = self._clients[client]
        found = queue.popleft()
        if queue:
            self._clients.move_to_end(client)  # its turn is over
        else:
            del self._clients[client]
        return found

    def drain(self) -> list[Waiting]:
        """Take everything out."""
        found = list(self)
        self._clients.clear()
        self._later.clear()
        return found

    def forget_cancelled(self) -> None:
        """Drop the requests whose clients have gone."""
        self._take(lambda w: w.outbox.cancelled)

    def take_late(self) -> list[Waiting]:
        """Take out the requests whose time is up."""
        now = time.monotonic()
        return self._take(lambda w: w.request.deadline <= now)

    def _take(self, chosen: Callable[[Waiting], bool]) -> list[Waiting]:
        found = [w for w in self if chosen(w)]
        if found:
            for client, queue in list(self._clients.items()):
                kept = deque(w for w in queue if w not in found)
                if kept:
                    self._clients[client] = kept
                else:
                    del self._clients[client]
            self._later = deque(w for w in self._later if w not in found)
        return found
