"""`WaitingQueue`: the sequences that wait to run, in one lane for each adapter and one for the base model."""

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from mmlora.lora.adapter import Adapter, AdapterIdentity
from mmlora.sequence import Sequence

Lane = OrderedDict[Sequence, "Place"]


class Place(NamedTuple):
    """Where a sequence stands: `order` grows towards the back, and `step` is when it came."""

    order: int
    step: int


class WaitingQueue:
    """First come, first served in a lane; the heads of lanes compare by their places.

    Whatever the length, adding, removing and looking at a head take constant time, and no step of the scheduler has
    to look at more than one sequence of a lane that cannot start.
    """

    def __init__(self) -> None:
        self._lanes: dict[AdapterIdentity | None, Lane] = {}
        self._front = 0
        self._back = 0

    def __len__(self) -> int:
        return sum(len(lane) for lane in self._lanes.values())

    def __iter__(self) -> Iterator[Sequence]:
        lanes = (((place, seq) for seq, place in lane.items()) for lane in self._lanes.values())
        return (seq for _, seq in heapq.merge(*lanes))

    @property
    def num_base(self) -> int:
        """How many wait without an adapter."""
        return len(self._lanes.get(None, ()))

    def append(self, seq: Sequence, step: int) -> None:
        """Add a sequence behind all others."""
        self._back += 1
        self._lanes.setdefault(_key(seq.adapter), OrderedDict())[seq] = Place(self._back, step)

    def appendleft(self, seq: Sequence, step: int) -> None:
        """Add a sequence before all others."""
        self._front -= 1
        lane = self._lanes.setdefault(_key(seq.adapter), OrderedDict())
        lane[seq] = Place(self._front, step)
        lane.move_to_end(seq, last=False)

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it stands; one that does not wait is ignored."""
        key = _key(seq.adapter)
        lane = self._lanes.get(key)
        if lane is not None:
            lane.pop(seq, None)
            if not lane:
                del self._lanes[key]

    def head(self, adapter: Adapter | None) -> tuple[Place, Sequence] | None:
        """Return the first of an adapter's lane (None: the base model's) and its place, None if nobody waits there."""
        lane = self._lanes.get(_key(adapter))
        return _head(lane) if lane is not None else None

    def adapter_heads(self) -> list[tuple[Place, Sequence]]:
        """Return the first of every adapter's lane with its place, in no order."""
        return [_head(lane) for key, lane in self._lanes.items() if key is not None]

    def last_order(self, adapter: Adapter, count: int) -> int:
        """Return the order of the last of the first `count` sequences in a lane that is not empty."""
        lane = self._lanes[_key(adapter)]
        return next(islice(lane.values(), min(count, len(lane)) - 1, None)).order


def _key(adapter: Adapter | None) -> AdapterIdentity | None:
    return adapter.identity if adapter is not None else None


def _head(lane: Lane) -> tuple[Place, Sequence]:
    seq, place = next(iter(lane.items()))
    return place, seq
