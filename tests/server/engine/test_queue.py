"""The queue is fair between clients and never full for a newcomer."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.base import EngineRequest, QueueFullError
from server.engine.queue import FairQueue
from server.engine.rows import Waiting
from server.engine.stream import Outbox


def waiting(client: str, name: str = "", priority: int = 0) -> Waiting:
    loop = asyncio.new_event_loop()
    loop.close()
    return Waiting(EngineRequest(name, (1,), client=client, priority=priority), Outbox(loop))


def fill(queue: FairQueue, client: str) -> int:
    """Put requests until the queue refuses; how many it took."""
    for count in range(queue.limit + 1):
        try:
            queue.put(waiting(client, f"{client}{count}"))
        except QueueFullError:
            return count
    raise AssertionError("more than the limit")


def drained(queue: FairQueue) -> list[str]:
    found = []
    while (item := queue.pop()) is not None:
        found.append(item.request.client)
    return found


def test_one_clients_requests_keep_their_order() -> None:
    queue = FairQueue(8)
    for name in "abcd":
        queue.put(waiting("x", name))
    assert [queue.pop().request.request_id for _ in range(4)] == list("abcd")  # type: ignore[union-attr]
    assert queue.pop() is None


def test_clients_take_turns_however_many_requests_each_has() -> None:
    queue = FairQueue(100)
    for _ in range(20):
        queue.put(waiting("loud"))
    for _ in range(3):
        queue.put(waiting("quiet"))
    assert drained(queue)[:6] == ["loud", "quiet"] * 3


def test_a_slot_goes_to_whom_fewest_run_for() -> None:
    queue = FairQueue(10)
    queue.put(waiting("loud"))
    queue.put(waiting("quiet"))
    found = queue.pop(Counter(loud=7, quiet=1))
    assert found is not None and found.request.client == "quiet"


def test_clients_without_a_name_have_the_whole_queue() -> None:
    assert fill(FairQueue(16), "") == 16


def test_a_named_client_leaves_room_for_a_newcomer() -> None:
    queue = FairQueue(100)
    assert fill(queue, "loud") == 80
    assert fill(queue, "second") == 16
    assert fill(queue, "third") >= 1
    assert len(queue) <= 100


@pytest.mark.parametrize(("limit", "taken"), [(0, 0), (1, 1), (2, 1), (5, 4)])
def test_a_short_queue_still_takes_one(limit: int, taken: int) -> None:
    assert fill(FairQueue(limit), "only") == taken


def test_several_requests_go_in_together_or_not_at_all() -> None:
    queue = FairQueue(4)
    queue.put(waiting(""), waiting(""), waiting(""))
    with pytest.raises(QueueFullError):
        queue.put(waiting(""), waiting(""))
    assert len(queue) == 3


def test_who_has_gone_takes_no_room() -> None:
    queue = FairQueue(2)
    gone = [waiting("") for _ in range(2)]
    queue.put(*gone)
    for each in gone:
        each.outbox.cancelled = True
    queue.put(waiting("", "new"))
    found = queue.pop()
    assert found is not None and found.request.request_id == "new"
    assert queue.pop() is None


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=60),
    st.integers(min_value=0, max_value=12),
)
def test_nothing_is_lost_or_invented(steps: list[tuple[str, bool]], limit: int) -> None:
    queue, inside = FairQueue(limit), Counter[str]()
    for client, put in steps:
        if put:
            try:
                queue.put(waiting(client))
            except QueueFullError:
                continue
            inside[client] += 1
        elif (found := queue.pop()) is not None:
            inside[found.request.client] -= 1
        assert len(queue) == inside.total() <= limit
    assert Counter(drained(queue)) == +inside


def test_lower_classes_wait_for_everybody_else() -> None:
    queue = FairQueue(10)
    queue.put(waiting("s", "late", priority=2))
    queue.put(waiting("s", "shadow 1", priority=1), waiting("s", "shadow 2", priority=1))
    queue.put(waiting("a", "first"))
    queue.put(waiting("b", "second"))
    names = [found.request.request_id for _ in range(5) if (found := queue.pop()) is not None]
    assert names == ["first", "second", "shadow 1", "shadow 2", "late"]
    assert queue.pop() is None


def test_lower_classes_fill_no_more_than_half_and_cost_nobody_a_place() -> None:
    queue = FairQueue(8)
    for _ in range(4):
        queue.put(waiting("s", priority=1))
    with pytest.raises(QueueFullError, match="half full"):
        queue.put(waiting("s", priority=1))
    for _ in range(8):
        queue.put(waiting(""))
    with pytest.raises(QueueFullError, match="8 requests"):
        queue.put(waiting(""))
    assert queue.urgent == 8 and len(queue) == 12
    assert len(queue.drain()) == 12 and not len(queue)


def test_a_lower_class_that_has_gone_is_forgotten() -> None:
    queue = FairQueue(4)
    gone = waiting("s", priority=1)
    queue.put(gone)
    gone.outbox.cancelled = True
    assert queue.pop() is None and not len(queue)
