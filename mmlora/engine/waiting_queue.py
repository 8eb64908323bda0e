"""`WaitingQueue`: the sequences that wait to run, in one lane for each adapter and one for the base model."""

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

from mmlora.engine.sequence import Sequence
from mmlora.lora.adapter import Adapter, AdapterIdentity


@dataclass(frozen=True)
class Place:
    """Where a sequence stands: `order` grows towards the back, and `step` is when it came.

    Lower priorities stand before higher ones, whatever their order.
    """

    order: int
    step: int
    priority: int = 0

    def __lt__(self, other: "Place") -> bool:
        return (self.priority, self.order) < (other.priority, other.order)


Lane = list[tuple[Place, Sequence]]  # sorted


class WaitingQueue:
    """First come, first served among equal priorities in a lane; the heads of lanes compare by their places.

    Adding and removing take a binary search and a move of pointers, looking at a head takes constant time, and no step
    of the scheduler has to look at more than one sequence of a lane that cannot start.
    """

    def __init__(self) -> None:
        self._lanes: dict[AdapterIdentity | None, Lane] = {}
        self._places: dict[Sequence, Place] = {}
        self._front = 0
        self._back = 0

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Sequence]:
        return (seq for _, seq in heapq.merge(*self._lanes.values()))

    @property
    def num_base(self) -> int:
        """How many wait without an adapter."""
        return len(self._lanes.get(None, ()))

    def append(self, seq: Sequence, step: int) -> None:
        """Add a sequence behind all others of its priority."""
        self._back += 1
        self._insert(seq, Place(self._back, step, seq.priority))

    def appendleft(self, seq: Sequence, step: int) -> None:
        """Add a sequence before all others of its priority."""
        self._front -= 1
        self._insert(seq, Place(self._front, step, seq.priority))

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it stands; one that does not wait is ignored."""
        place = self._places.pop(seq, None)
        if place is None:
            return
        key = _key(seq.adapter)
        lane = self._lanes[key]
        del lane[bisect_left(lane, place, key=_place)]
        if not lane:
            del self._lanes[key]

    def head(self, adapter: Adapter | None) -> tuple[Place, Sequence] | None:
        """Return the first of an adapter's lane (None: the base model's) and its place, None if nobody waits there."""
        lane = self._lanes.get(_key(adapter))
        return lane[0] if lane is not None else None

    def heads(self) -> list[tuple[Place, Sequence]]:
        """Return the first of every lane with its place, in no order."""
        return [lane[0] for lane in self._lanes.values()]

    def adapter_heads(self) -> list[tuple[Place, Sequence]]:
        """Return the first of every adapter's lane with its place, in no order."""
        return [lane[0] for key, lane in self._lanes.items() if key is not None]

    def last_order(self, adapter: Adapter, count: int) -> int:
        """Return the greatest order among the first `count` sequences in a lane that is not empty."""
        return max(place.order for place, _ in self._lanes[_key(adapter)][:count])

    def _insert(self, seq: Sequence, place: Place) -> None:
        self._places[seq] = place
        insort(self._lanes.setdefault(_key(seq.adapter), []), (place, seq), key=_place)


def _key(adapter: Adapter | None) -> AdapterIdentity | None:
    return adapter.identity if adapter is not None else None


def _place(entry: tuple[Place, Sequence]) -> Place:
    return entry[0]
