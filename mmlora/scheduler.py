"""`Scheduler`: which sequences run in the next step, and how many tokens of each."""

from collections import deque
from dataclasses import dataclass

from mmlora.block_manager import BlockManager
from mmlora.errors import AdapterError, MMLoRAError
from mmlora.lora.slots import LoRASlots
from mmlora.sequence import Sequence, Status

MAX_SKIPS = 32


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


class Scheduler:
    """Continuous batching with chunked prefill, preemption by recompute and an adapter cap.

    A step holds at most `max_num_seqs` sequences, `max_num_batched_tokens` tokens and as many distinct adapters as
    there are slots. A sequence whose adapter finds no slot is passed over; once it was passed over `MAX_SKIPS` times,
    no other adapter is admitted before it. Sequences without adapter are never held up by that.
    """

    def __init__(
        self, block_manager: BlockManager, slots: LoRASlots | None, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        self.block_manager = block_manager
        self.slots = slots
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.failed: list[tuple[Sequence, AdapterError]] = []  # ended: their adapter could not be activated
        self.num_preemptions = 0

    @property
    def has_unfinished(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(seq)

    def schedule(self) -> list[ScheduledSequence]:
        """Choose the next step's work; running sequences come before waiting ones."""
        scheduled = self._schedule_running()
        budget = self.max_num_batched_tokens - sum(item.num_tokens for item in scheduled)
        return scheduled + self._schedule_waiting(budget)

    def finish(self, seq: Sequence, reason: str) -> None:
        """End a sequence wherever it is, and free what it holds."""
        if seq.status is Status.FINISHED:
            return
        if seq.status is Status.RUNNING:
            self.running.remove(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)
        self._release(seq)
        seq.status = Status.FINISHED
        seq.finish_reason = reason

    def _schedule_running(self) -> list[ScheduledSequence]:
        scheduled: list[ScheduledSequence] = []
        budget = self.max_num_batched_tokens
        index = 0
        while index < len(self.running) and budget > 0:
            seq = self.running[index]
            num_tokens = min(len(seq.token_ids) - seq.num_computed_tokens, budget)
            if not self._make_room(seq, seq.num_computed_tokens + num_tokens):
                break  # the sequence itself was preempted; it was the last one
            scheduled.append(ScheduledSequence(seq, seq.num_computed_tokens, num_tokens))
            budget -= num_tokens
            index += 1
        return scheduled

    def _make_room(self, seq: Sequence, num_tokens: int) -> bool:
        while not self.block_manager.can_allocate(seq, num_tokens):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        self.block_manager.allocate(seq, num_tokens)
        return True

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._release(seq)
        seq.num_computed_tokens = 0
        seq.status = Status.WAITING
        self.waiting.appendleft(seq)
        self.num_preemptions += 1

    def _release(self, seq: Sequence) -> None:
        self.block_manager.free(seq)
        seq.media_embeds.clear()
        if seq.slot is not None and self.slots is not None:
            self.slots.release(seq.slot)
            seq.slot = None

    def _schedule_waiting(self, budget: int) -> list[ScheduledSequence]:
        scheduled: list[ScheduledSequence] = []
        skipped: list[Sequence] = []
        has_overdue = False
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting.popleft()
            if seq.adapter is not None and (has_overdue or not self._has_slot(seq)):
                has_overdue |= seq.num_skips >= MAX_SKIPS
                skipped.append(seq)
                continue
            item = self._admit(seq, budget)
            if item is None and seq.status is Status.WAITING:
                self.waiting.appendleft(seq)
                break
            if item is None:
                continue
            scheduled.append(item)
            budget -= item.num_tokens
        if scheduled:
            for seq in skipped:
                seq.num_skips += 1
        self.waiting.extendleft(reversed(skipped))
        return scheduled

    def _has_slot(self, seq: Sequence) -> bool:
        assert self.slots is not None and seq.adapter is not None
        return self.slots.can_activate(seq.adapter)

    def _admit(self, seq: Sequence, budget: int) -> ScheduledSequence | None:
        """Start a waiting sequence; without room it keeps waiting, and without its adapter it fails."""
        start = self.block_manager.match_prefix(seq)
        num_tokens = min(len(seq.token_ids) - start, budget)
        if not self.block_manager.can_allocate(seq, start + num_tokens):
            self.block_manager.free(seq)
            return None
        if not self._take_slot(seq):
            return None
        self.block_manager.allocate(seq, start + num_tokens)
        if seq.request.num_cached_tokens is None:
            seq.request.num_cached_tokens = start
        seq.num_computed_tokens = start
        seq.num_skips = 0
        seq.status = Status.RUNNING
        self.running.append(seq)
        return ScheduledSequence(seq, start, num_tokens)

    def _take_slot(self, seq: Sequence) -> bool:
        if seq.adapter is None or self.slots is None:
            return True
        try:
            seq.slot = self.slots.activate(seq.adapter)
        except (MMLoRAError, RuntimeError) as error:  # out of device memory, a module that cannot be wrapped
            self.finish(seq, "error")
            self.failed.append((seq, AdapterError(f"adapter {seq.adapter.name!r} could not be activated: {error}")))
            return False
        self.slots.retain(seq.slot)
        return True
