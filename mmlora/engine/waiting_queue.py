"""`WaitingQueue`: the sequences that wait to run, in the order in which they may start.

A group is a request with its `n` sequences, or several requests that one caller sent together (`EngineInput.group`).
"""

import heapq
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace

from mmlora.engine.sequence import Sequence
from mmlora.lora.adapter import Adapter, AdapterIdentity


@dataclass(frozen=True)
class QueuePosition:
    """Position of a waiting sequence: by priority, then by the running sequences of its group, then by time.

    Attributes:
        order: when it was queued; negative if it was requeued in front.
        step: the scheduler step in which it was queued.
        priority: lower is earlier.
        num_running: running sequences of its group.
        last_turn: when a sequence of its group last started, on the scale of `order`; 0 for never.
    """

    order: int
    step: int
    priority: int = 0
    num_running: int = 0
    last_turn: int = 0

    @property
    def time(self) -> int:
        """When it was queued, or when its group had its last turn if that is later."""
        return self.order if self.order < 0 else max(self.order, self.last_turn)

    def __lt__(self, other: "QueuePosition") -> bool:
        return (self.priority, self.num_running, self.time) < (other.priority, other.num_running, other.time)


Entry = tuple[QueuePosition, Sequence]  # no two positions are equal, so sequences are never compared


@dataclass
class Lane:
    """Waiting sequences of one adapter, or of the base model: a sorted line per group, and the heads of the lines."""

    lines: dict[Hashable, list[Entry]] = field(default_factory=dict)  # positions without those of their groups
    size: int = 0
    heads: list[Entry] = field(default_factory=list)  # sorted, with the running sequences and turns of their groups
    head_of: dict[Hashable, Entry] = field(default_factory=dict)

    def add(self, group: Hashable, entry: Entry) -> None:
        """Add a sequence to the line of its group; `update_head` must follow."""
        insort(self.lines.setdefault(group, []), entry)
        self.size += 1

    def remove(self, group: Hashable, entry: Entry) -> None:
        """Remove a sequence that was added with the same entry; `update_head` must follow."""
        line = self.lines[group]
        del line[bisect_left(line, entry)]
        self.size -= 1
        if not line:
            del self.lines[group]
            self._remove_head(group)

    def update_head(self, group: Hashable, num_running: int, last_turn: int) -> None:
        """Sort the head of a line by the running sequences and the last turn of its group."""
        self._remove_head(group)
        position, seq = self.lines[group][0]
        entry = self.head_of[group] = replace(position, num_running=num_running, last_turn=last_turn), seq
        insort(self.heads, entry)

    def _remove_head(self, group: Hashable) -> None:
        old = self.head_of.pop(group, None)
        if old is not None:
            del self.heads[bisect_left(self.heads, old)]


class WaitingQueue:
    """Waiting sequences in one lane per adapter, and one for the base model.

    Groups take turns: in a lane, the sequence whose group has the fewest running sequences comes first, and of several
    the one whose group has waited longest since it arrived or had a turn. So a request with `n=128` does not hold back
    a request that arrives after it.

    Adding and removing cost a binary search, and reading a head is O(1). A lane whose head cannot start costs the
    scheduler one look per step.
    """

    def __init__(self) -> None:
        self._lanes: dict[AdapterIdentity | None, Lane] = {}
        self._positions: dict[Sequence, QueuePosition] = {}
        self._num_running: Counter[Hashable] = Counter()  # by group
        self._last_turns: dict[Hashable, int] = {}  # by group, while it has sequences
        self._lanes_of: dict[Hashable, set[AdapterIdentity | None]] = {}  # keys of the lanes in which a group waits
        self._front = 0
        self._back = 0

    def __len__(self) -> int:
        return len(self._positions)

    def __iter__(self) -> Iterator[Sequence]:
        lines = [line for lane in self._lanes.values() for line in lane.lines.values()]
        return (seq for _, seq in heapq.merge(*lines))

    @property
    def num_base(self) -> int:
        """Number of waiting sequences without an adapter."""
        lane = self._lanes.get(None)
        return lane.size if lane is not None else 0

    def num_running(self, seq: Sequence) -> int:
        """Return how many sequences of a sequence's group are running."""
        return self._num_running[seq.group]

    @property
    def max_running(self) -> int:
        """The most running sequences of any group."""
        return max(self._num_running.values(), default=0)

    def count_start(self, seq: Sequence) -> None:
        """Count a sequence that starts to run."""
        self._back += 1
        self._num_running[seq.group] += 1
        self._last_turns[seq.group] = self._back
        self._update(seq.group)

    def count_end(self, seq: Sequence) -> None:
        """Count a sequence that stops running."""
        self._num_running[seq.group] -= 1
        if self._num_running[seq.group] == 0:
            del self._num_running[seq.group]
        self._update(seq.group)

    def append(self, seq: Sequence, step: int) -> None:
        """Add a sequence behind all others of its priority and group."""
        self._back += 1
        self._insert(seq, QueuePosition(self._back, step, seq.priority))

    def appendleft(self, seq: Sequence, step: int) -> None:
        """Add a sequence before all others of its priority and group."""
        self._front -= 1
        self._insert(seq, QueuePosition(self._front, step, seq.priority))

    def remove(self, seq: Sequence) -> None:
        """Remove a sequence; one that is not waiting is ignored."""
        position = self._positions.pop(seq, None)
        if position is None:
            return
        key = _key(seq.adapter)
        lane = self._lanes[key]
        lane.remove(seq.group, (position, seq))
        if seq.group not in lane.lines:
            self._lanes_of[seq.group].remove(key)
            if not self._lanes_of[seq.group]:
                del self._lanes_of[seq.group]
        if not lane.lines:
            del self._lanes[key]
        self._update(seq.group)

    def head(self, adapter: Adapter | None) -> Entry | None:
        """Return the first sequence of an adapter's lane (None: the base model's); None if the lane is empty."""
        lane = self._lanes.get(_key(adapter))
        return lane.heads[0] if lane is not None else None

    def heads(self) -> list[Entry]:
        """Return the first sequence of every lane, unordered."""
        return [lane.heads[0] for lane in self._lanes.values()]

    def adapter_heads(self) -> list[Entry]:
        """Return the first sequence of every adapter's lane, unordered."""
        return [lane.heads[0] for key, lane in self._lanes.items() if key is not None]

    def head_among(self, adapter: Adapter, orders: frozenset[int]) -> Sequence | None:
        """Return the first sequence of the lane's best priority that has one of the orders or was requeued."""
        heads = self._lanes[_key(adapter)].heads
        for position, seq in heads:
            if position.priority > heads[0][0].priority:
                return None
            if position.order < 0 or position.order in orders:
                return seq
        return None

    def first_orders(self, adapter: Adapter, count: int) -> frozenset[int]:
        """Return the orders of the first `count` sequences of a non-empty lane, with its groups taking turns."""
        turns = (
            replace(position, num_running=self._num_running[group] + index, last_turn=self._last_turns.get(group, 0))
            for group, line in self._lanes[_key(adapter)].lines.items()
            for index, (position, _) in enumerate(line[:count])
        )
        return frozenset(position.order for position in heapq.nsmallest(count, turns))

    def _insert(self, seq: Sequence, position: QueuePosition) -> None:
        self._positions[seq] = position
        key = _key(seq.adapter)
        self._lanes_of.setdefault(seq.group, set()).add(key)
        self._lanes.setdefault(key, Lane()).add(seq.group, (position, seq))
        self._update(seq.group)

    def _update(self, group: Hashable) -> None:
        """Sort a group's heads after a change of its sequences."""
        num_running, lanes = self._num_running[group], self._lanes_of.get(group, ())
        if not num_running and not lanes:
            self._last_turns.pop(group, None)
        for key in lanes:
            self._lanes[key].update_head(group, num_running, self._last_turns.get(group, 0))


def _key(adapter: Adapter | None) -> AdapterIdentity | None:
    return adapter.identity if adapter is not None else None
