"""`Scheduler`: which sequences run in the next step, and how many tokens of each."""

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from mmlora.engine.block_manager import BlockManager
from mmlora.engine.sequence import Sequence, Status
from mmlora.errors import AdapterError
from mmlora.inputs.engine_input import MediaInput
from mmlora.lora.adapter import Adapter, AdapterIdentity
from mmlora.lora.layers.slots import LoRASlots

MAX_WAIT_STEPS = 32  # that an adapter waits for a slot before the slots in use are drained


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


@dataclass(frozen=True)
class ScheduledSequence:
    """Compute the tokens `[start, start + num_tokens)` of a sequence."""

    seq: Sequence
    start: int
    num_tokens: int

    @property
    def end(self) -> int:
        """One past the last token computed."""
        return self.start + self.num_tokens

    @property
    def is_sampled(self) -> bool:
        """Whether the next token is known after this step: all tokens so far then have KV."""
        return self.end == len(self.seq.token_ids)

    @property
    def media(self) -> list[tuple[int, MediaInput]]:
        """Media items, with their indices, that have placeholders among the tokens computed."""
        found = enumerate(self.seq.media)
        return [(index, item) for index, item in found if item.start < self.end and item.end > self.start]


@dataclass
class _Step:
    """A step in the making."""

    budget: int  # tokens left
    is_short: bool = False  # of blocks: nobody else starts
    items: dict[Sequence, ScheduledSequence] = field(default_factory=dict)

    @property
    def is_open(self) -> bool:
        return self.budget > 0 and not self.is_short

    def add(self, seq: Sequence, start: int, num_tokens: int) -> None:
        self.items[seq] = ScheduledSequence(seq, start, num_tokens)
        self.budget -= num_tokens

    def max_tokens(self, seq: Sequence, start: int) -> int:
        """How many tokens from `start` on; more than are left where an image may not be split."""
        if self.budget <= 0:
            return 0
        return seq.whole_chunk_end(start, min(len(seq.token_ids), start + self.budget)) - start

    def drop(self, seq: Sequence) -> None:
        item = self.items.pop(seq, None)
        self.budget += item.num_tokens if item is not None else 0


class Scheduler:
    """Continuous batching with chunked prefill, preemption by recompute, and fair shares for adapters and the base.

    A step holds at most `max_num_seqs` sequences, `max_num_batched_tokens` tokens (more where an image may not be
    split) and as many distinct adapters as there are slots. It decodes first. With the tokens that are left, prompts of
    the base model and prompts of adapters take turns in coming first; the side whose turn it is keeps it until it could
    use it, and while it lacks blocks nobody starts, so that neither starves. Up to three quarters of `max_num_seqs` are
    the base model's whenever it asks: adapter sequences leave these places free for it, and the youngest one is
    preempted if need be.

    Adapter sequences start oldest first; one whose adapter finds no slot is passed over. After `MAX_WAIT_STEPS` steps
    it is overdue, and a younger sequence then starts only if it waited already when its adapter got its slot, and was
    among the first `max_num_seqs` to do so. The slots in use thereby drain, and the first that is empty goes to the
    oldest. While all slots are asked for this is a gated round: every adapter is served in turn, with all that it has.

    With `is_by_priority`, base and adapters take no turns and have no shares: what waits starts by (priority, arrival),
    whatever it runs with, and what runs is preempted in the opposite order. While the first has no slot, nobody of a
    worse priority starts with another adapter, so that a slot drains for it at once.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        slots: LoRASlots | None,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        *,
        is_by_priority: bool = False,
    ) -> None:
        self.block_manager = block_manager
        self.slots = slots
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.is_by_priority = is_by_priority
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self.failed: list[tuple[Sequence, AdapterError]] = []  # ended: their adapter could not be activated
        self.num_steps = 0
        self.num_preemptions = 0
        self._is_base_turn = True
        self._gates = [0] * (slots.max_loras if slots is not None else 0)  # by slot: last order of its round

    @property
    def has_unfinished(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(seq, self.num_steps)

    def schedule(self) -> list[ScheduledSequence]:
        """Choose the next step's work; running sequences come before waiting ones."""
        self.num_steps += 1
        step = _Step(self.max_num_batched_tokens)
        self._continue(step, [seq for seq in self.running if len(seq.token_ids) - seq.num_computed_tokens == 1])
        if self.is_by_priority:
            self._continue(step, [seq for seq in self.running if seq not in step.items])
            self._start_in_order(step, self.waiting.heads(), self.max_num_seqs)
            return list(step.items.values())
        is_base_first = self._is_base_turn
        if self._prefill(step, is_base=is_base_first):
            self._is_base_turn = not is_base_first
        self._prefill(step, is_base=not is_base_first)
        return list(step.items.values())

    def finish(self, seq: Sequence, reason: str) -> None:
        """End a sequence wherever it is, and free what it holds."""
        if seq.status is Status.FINISHED:
            return
        if seq.status is Status.RUNNING:
            self.running.remove(seq)
        else:
            self.waiting.remove(seq)
        self._release(seq)
        seq.status = Status.FINISHED
        seq.finish_reason = reason

    def _continue(self, step: _Step, seqs: Iterable[Sequence]) -> int:
        """Schedule running sequences, those of one priority in the order in which they started; return how many."""
        num_scheduled = 0
        for seq in sorted(seqs, key=lambda seq: seq.priority):
            start = seq.num_computed_tokens
            num_tokens = step.max_tokens(seq, start)
            if num_tokens == 0:
                break
            if seq.status is Status.RUNNING and self._make_room(step, seq, start + num_tokens):
                step.add(seq, start, num_tokens)
                num_scheduled += 1
        return num_scheduled

    def _make_room(self, step: _Step, seq: Sequence, num_tokens: int) -> bool:
        """Find blocks for a running sequence, at the cost of those that rank last; False if it was the last.

        Among equal priorities, those rank last that started last.
        """
        while not self.block_manager.can_allocate(seq, num_tokens):
            victim = max(reversed(self.running), key=lambda running: running.priority)
            self._preempt(step, victim)
            if victim is seq:
                return False
        self.block_manager.allocate(seq, num_tokens)
        return True

    def _preempt(self, step: _Step, seq: Sequence) -> None:
        step.drop(seq)
        self.recompute(seq)
        self.num_preemptions += 1

    def recompute(self, seq: Sequence) -> None:
        """Have a running sequence start over, before all others; its tokens stay."""
        self.running.remove(seq)
        self._release(seq)
        seq.num_computed_tokens = 0
        seq.status = Status.WAITING
        self.waiting.appendleft(seq, self.num_steps)

    def _release(self, seq: Sequence) -> None:
        self.block_manager.free(seq)
        seq.media_embeds.clear()
        if seq.slot is not None and self.slots is not None:
            self.slots.release(seq.slot)
            seq.slot = None

    def _prefill(self, step: _Step, *, is_base: bool) -> int:
        """Go on with the prompts of one side, then start those that wait; return how many."""
        begun = [seq for seq in self.running if seq not in step.items and (seq.adapter is None) is is_base]
        num_continued = self._continue(step, begun)
        return num_continued + (self._start_base(step) if is_base else self._start_adapters(step))

    def _start_base(self, step: _Step) -> int:
        num_started = 0
        while step.is_open and (head := self.waiting.head(None)) is not None:
            if len(self.running) >= self.max_num_seqs and not self._vacate(step):
                break
            num_started += self._start(step, head[1])
        return num_started

    def _start_adapters(self, step: _Step) -> int:
        max_num_running = self.max_num_seqs - min(self.waiting.num_base, self._num_base_places())
        heads = self.waiting.adapter_heads() if len(self.running) < max_num_running else []
        return self._start_in_order(step, heads, max_num_running)

    def _start_in_order(self, step: _Step, heads: list[tuple[Place, Sequence]], max_num_running: int) -> int:
        """Start what waits in some lanes, passing over what has no slot; return how many."""
        num_started = 0
        heapq.heapify(heads)
        first_passed: Place | None = None
        is_draining = False
        while heads and step.is_open and len(self.running) < max_num_running:
            place, seq = heapq.heappop(heads)
            is_outranked = first_passed is not None and first_passed.priority < place.priority
            if seq.adapter is None or self._has_slot(seq, place, is_draining, is_outranked):
                num_started += self._start(step, seq)
                head = self.waiting.head(seq.adapter)
                if head is not None:
                    heapq.heappush(heads, head)
            else:
                first_passed = first_passed or place
                is_draining |= self.num_steps - place.step > MAX_WAIT_STEPS
        return num_started

    def _num_base_places(self) -> int:
        """How many more of the running sequences may be the base model's by right."""
        num_for_adapters = max(1, self.max_num_seqs // 4)
        return max(0, self.max_num_seqs - num_for_adapters - sum(seq.adapter is None for seq in self.running))

    def _vacate(self, step: _Step) -> bool:
        """Preempt an adapter sequence for one of the base model, if that has less than its share."""
        victim = next((seq for seq in reversed(self.running) if seq.adapter is not None), None)
        if victim is None or self._num_base_places() == 0:
            return False
        self._preempt(step, victim)
        return True

    def _has_slot(self, seq: Sequence, place: Place, is_draining: bool, is_outranked: bool) -> bool:
        """Tell whether an adapter sequence can have a slot.

        When draining, an older one is overdue for it; when outranked, one of a better priority lacks it.
        """
        assert self.slots is not None and seq.adapter is not None
        if not (is_draining or is_outranked):
            return self.slots.can_activate(seq.adapter)
        slot = self.slots.slot_of(seq.adapter.identity)
        if slot is None:
            return False
        return self._is_held(slot) or (not is_outranked and place.order <= self._gates[slot])

    def _is_held(self, slot: int) -> bool:
        """Tell whether a slot is in use beside what runs, by a pin: then it drains for nobody."""
        assert self.slots is not None
        return self.slots.num_users(slot) > sum(seq.slot == slot for seq in self.running)

    def _start(self, step: _Step, seq: Sequence) -> bool:
        """Start a waiting sequence; without blocks it keeps waiting, and without its adapter it fails."""
        start = self.block_manager.match_prefix(seq)
        num_tokens = step.max_tokens(seq, start)
        if not self.block_manager.can_allocate(seq, start + num_tokens):
            self.block_manager.free(seq)
            step.is_short = True
            return False
        if not self._take_slot(seq):
            return False
        self.block_manager.allocate(seq, start + num_tokens)
        if seq.request.num_cached_tokens is None:
            seq.request.num_cached_tokens = start
        seq.num_computed_tokens = start
        seq.status = Status.RUNNING
        self.waiting.remove(seq)
        self.running.append(seq)
        step.add(seq, start, num_tokens)
        return True

    def _take_slot(self, seq: Sequence) -> bool:
        if seq.adapter is None or self.slots is None:
            return True
        is_resident = self.slots.slot_of(seq.adapter.identity) is not None
        try:
            seq.slot = self.slots.activate(seq.adapter)
        except Exception as error:  # out of device memory, a module that cannot be wrapped
            self.finish(seq, "error")
            self.failed.append((seq, AdapterError(f"adapter {seq.adapter.name!r} could not be activated: {error}")))
            return False
        self.slots.retain(seq.slot)
        if not is_resident:
            self._gates[seq.slot] = self.waiting.last_order(seq.adapter, self.max_num_seqs)
        return True
