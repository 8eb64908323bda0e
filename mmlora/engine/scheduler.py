"""`Scheduler`: chooses the sequences of the next step, and how many tokens of each are computed."""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

from mmlora.engine.block_manager import BlockManager
from mmlora.engine.sequence import Sequence, Status
from mmlora.engine.waiting_queue import Entry, QueuePosition, WaitingQueue
from mmlora.errors import AdapterError
from mmlora.inputs.engine_input import MediaInput
from mmlora.lora.layers.slots import LoRASlots

MAX_WAIT_STEPS = 32  # an adapter that has waited longer for a slot makes the slots in use drain


@dataclass(frozen=True)
class ScheduledSequence:
    """Work of one step on one sequence: compute its tokens `[start, start + num_tokens)`."""

    seq: Sequence
    start: int
    num_tokens: int

    @property
    def end(self) -> int:
        """One past the last token computed."""
        return self.start + self.num_tokens

    @property
    def is_sampled(self) -> bool:
        """Whether this step computes the last known token, so that its logits give the next one."""
        return self.end == len(self.seq.token_ids)

    @property
    def media(self) -> list[tuple[int, MediaInput]]:
        """Media items, with their indices, that have placeholders among the tokens computed."""
        return self.seq.media_between(self.start, self.end)


@dataclass
class _Step:
    """The step that is being scheduled."""

    budget: int  # tokens left
    is_out_of_blocks: bool = False  # no further sequence starts
    items: dict[Sequence, ScheduledSequence] = field(default_factory=dict)

    @property
    def is_open(self) -> bool:
        return self.budget > 0 and not self.is_out_of_blocks

    def add(self, seq: Sequence, start: int, num_tokens: int) -> None:
        self.items[seq] = ScheduledSequence(seq, start, num_tokens)
        self.budget -= num_tokens

    def max_tokens(self, seq: Sequence, start: int) -> int:
        """Return how many tokens from `start` on fit; a bidirectional span is never split, even beyond the budget."""
        if self.budget <= 0:
            return 0
        return seq.whole_chunk_end(start, min(len(seq.token_ids), start + self.budget)) - start

    def drop(self, seq: Sequence) -> None:
        item = self.items.pop(seq, None)
        self.budget += item.num_tokens if item is not None else 0


class Scheduler:
    """Continuous batching with chunked prefill, preemption by recompute, and fairness between adapters and the base.

    A step has at most `max_num_seqs` sequences, `max_num_batched_tokens` tokens (more where a bidirectional span may
    not be split) and as many distinct adapters as there are slots. Decodes are scheduled first. The remaining tokens go
    to prefills: base-model prompts and adapter prompts alternate in going first, and a side keeps its turn until it has
    used it. While that side lacks blocks no other sequence starts, so that neither side starves. Up to three quarters
    of `max_num_seqs` are reserved for base-model sequences while any are waiting: adapter sequences leave these places
    free, and the youngest is preempted if necessary.

    Adapter sequences start oldest first; one whose adapter gets no slot is skipped. After `MAX_WAIT_STEPS` steps it is
    overdue. From then on a younger sequence starts only if it was already waiting when its adapter got its slot, among
    the first `max_num_seqs` of that adapter. So the slots in use drain, and the first free slot goes to the oldest
    sequence. While there are more adapters than slots this is gated round-robin: each adapter is served in turn, with
    all sequences that were waiting when its turn began.

    With `is_by_priority` there are no turns and no shares: waiting sequences start by (priority, arrival), with or
    without an adapter, and running ones are preempted in the reverse order. While the first waiting sequence lacks a
    slot, no sequence of a worse priority starts with an adapter that is not resident, so that a slot drains for it.

    Turns are taken by groups, not by sequences (`WaitingQueue`): a request with many sequences, or a batch of prompts,
    counts as one. A waiting sequence whose group has at least two running sequences fewer than another one preempts the
    youngest of the largest group when places or blocks are lacking, so that its request does not wait until they end.
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
        self.failed: list[tuple[Sequence, AdapterError]] = []  # finished, because their adapter failed to activate
        self.num_steps = 0
        self.num_preemptions = 0
        self._is_base_turn = True
        num_slots = slots.max_loras if slots is not None else 0
        self._admitted = [frozenset[int]()] * num_slots  # by slot: orders of the sequences of its round

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(seq, self.num_steps)

    def schedule(self) -> list[ScheduledSequence]:
        """Return the work of the next step; running sequences come before waiting ones."""
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
        """Finish a waiting or running sequence, and free its blocks, media and slot."""
        if seq.status is Status.FINISHED:
            return
        if seq.status is Status.RUNNING:
            self._stop(seq)
        else:
            self.waiting.remove(seq)
        self._release(seq)
        seq.status = Status.FINISHED
        seq.finish_reason = reason

    def _continue(self, step: _Step, seqs: Iterable[Sequence]) -> int:
        """Schedule running sequences by priority, then by start; return how many were scheduled."""
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
        """Allocate blocks for a running sequence; preempt the worst priority, the largest group, the latest start.

        Returns:
            False if the sequence itself had to be preempted.
        """
        while not self.block_manager.can_allocate(seq, num_tokens):
            victim = max(reversed(self.running), key=lambda seq: (seq.priority, self.waiting.num_running(seq)))
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
        """Requeue a running sequence at the front, to recompute its KV from the start; it keeps its tokens."""
        self._stop(seq)
        self._release(seq)
        seq.num_computed_tokens = 0
        seq.status = Status.WAITING
        self.waiting.appendleft(seq, self.num_steps)

    def _stop(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.waiting.count_end(seq)

    def _release(self, seq: Sequence) -> None:
        self.block_manager.free(seq)
        seq.media_embeds.clear()
        if seq.slot is not None and self.slots is not None:
            self.slots.release(seq.slot)
            seq.slot = None

    def _prefill(self, step: _Step, *, is_base: bool) -> int:
        """Continue the prefills of one side, then start its waiting sequences; return how many were scheduled."""
        started = [seq for seq in self.running if seq not in step.items and (seq.adapter is None) is is_base]
        num_continued = self._continue(step, started)
        return num_continued + (self._start_base(step) if is_base else self._start_adapters(step))

    def _start_base(self, step: _Step) -> int:
        num_started = 0
        while step.is_open and (head := self.waiting.head(None)) is not None:
            is_full = len(self.running) >= self.max_num_seqs
            if is_full and not self._preempt_for_base(step) and not self._preempt_for(step, head[1]):
                break
            num_started += self._start(step, head[1])
        return num_started

    def _start_adapters(self, step: _Step) -> int:
        max_num_running = self.max_num_seqs - min(self.waiting.num_base, self._num_reserved_for_base())
        return self._start_in_order(step, self.waiting.adapter_heads(), max_num_running)

    def _start_in_order(self, step: _Step, heads: list[Entry], max_num_running: int) -> int:
        """Start waiting sequences, given the heads of their lanes, skipping those without a slot; return how many."""
        num_started = 0
        heapq.heapify(heads)
        first_skipped: QueuePosition | None = None
        is_draining = False
        while heads and step.is_open and (len(self.running) < max_num_running or self._is_owed_place(heads[0][1])):
            position, head = heapq.heappop(heads)
            is_outranked = first_skipped is not None and first_skipped.priority < position.priority
            seq = self._with_slot(head, is_draining, is_outranked)
            if seq is None:
                first_skipped = first_skipped or position
                is_draining |= self.num_steps - position.step > MAX_WAIT_STEPS
                continue
            if len(self.running) >= max_num_running and not self._preempt_for(step, seq):
                break
            num_started += self._start(step, seq)
            next_head = self.waiting.head(seq.adapter)
            if next_head is not None:
                heapq.heappush(heads, next_head)
        return num_started

    def _num_reserved_for_base(self, num_fewer: int = 0) -> int:
        """Return how many more running sequences are reserved for the base model, if it had `num_fewer` than it has."""
        num_for_adapters, num_base = max(1, self.max_num_seqs // 4), sum(seq.adapter is None for seq in self.running)
        return max(0, self.max_num_seqs - num_for_adapters - num_base + num_fewer)

    def _preempt_for_base(self, step: _Step) -> bool:
        """Preempt the youngest adapter sequence of the largest group, unless the base model already has its share."""
        victims = [seq for seq in reversed(self.running) if seq.adapter is not None]
        if not victims or self._num_reserved_for_base() == 0:
            return False
        self._preempt(step, max(victims, key=self.waiting.num_running))
        return True

    def _is_owed_place(self, seq: Sequence) -> bool:
        """Return whether some group has at least two running sequences more than the group of a waiting sequence."""
        return self.waiting.max_running > self.waiting.num_running(seq) + 1

    def _preempt_for(self, step: _Step, seq: Sequence) -> bool:
        """Preempt the youngest sequence of the largest group for a waiting sequence that is owed its place.

        No sequence of a better priority is preempted, and no base-model sequence within its share for an adapter's.
        """
        if not self._is_owed_place(seq):
            return False
        spares_base = seq.adapter is not None and not self.is_by_priority and self._num_reserved_for_base(1) > 0
        limit = self.waiting.num_running(seq) + 1
        victims = [
            running
            for running in reversed(self.running)
            if self.waiting.num_running(running) > limit
            and running.priority >= seq.priority
            and not (spares_base and running.adapter is None)
        ]
        if not victims:
            return False
        self._preempt(step, max(victims, key=self.waiting.num_running))
        return True

    def _with_slot(self, head: Sequence, is_draining: bool, is_outranked: bool) -> Sequence | None:
        """Return the sequence of a lane that may start, None if no slot is available for its adapter.

        Args:
            head: the first sequence of the lane.
            is_draining: an older sequence is overdue for a slot.
            is_outranked: a sequence of a better priority lacks a slot.
        """
        if head.adapter is None:
            return head
        assert self.slots is not None
        if not (is_draining or is_outranked):
            return head if self.slots.can_activate(head.adapter) else None
        slot = self.slots.slot_of(head.adapter.identity)
        if slot is None:
            return None
        if self._is_pinned(slot):
            return head
        return None if is_outranked else self.waiting.head_among(head.adapter, self._admitted[slot])

    def _is_pinned(self, slot: int) -> bool:
        """Return whether a pin holds a slot; draining would not free it."""
        assert self.slots is not None
        return self.slots.num_users(slot) > sum(seq.slot == slot for seq in self.running)

    def _start(self, step: _Step, seq: Sequence) -> bool:
        """Start a waiting sequence; without free blocks it keeps waiting, without its adapter it fails."""
        start = self.block_manager.match_prefix(seq)
        num_tokens = step.max_tokens(seq, start)
        while not self.block_manager.can_allocate(seq, start + num_tokens):
            if not self._preempt_for(step, seq):
                self.block_manager.free(seq)
                step.is_out_of_blocks = True
                return False
        if not self._acquire_slot(seq):
            return False
        self.block_manager.allocate(seq, start + num_tokens)
        if seq.request.num_cached_tokens is None:
            seq.request.num_cached_tokens = start
        seq.num_computed_tokens = start
        seq.status = Status.RUNNING
        self.waiting.remove(seq)
        self.running.append(seq)
        self.waiting.count_start(seq)
        step.add(seq, start, num_tokens)
        return True

    def _acquire_slot(self, seq: Sequence) -> bool:
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
            self._admitted[seq.slot] = self.waiting.first_orders(seq.adapter, self.max_num_seqs)
        return True
