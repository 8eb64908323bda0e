"""`Scheduler` by priority, lower first; see `tests.engine.test_scheduler` for `step`."""

import random

import pytest

from mmlora import SamplingParams
from mmlora.engine.sequence import Status
from tests.engine.sequences import make_adapter, make_sequence
from tests.engine.test_scheduler import make_scheduler, run_to_end, step

A, B, C = ADAPTERS = [make_adapter(name, uid) for uid, name in enumerate("ABC", 1)]


def by_priority(**options):
    scheduler = make_scheduler(**options)
    scheduler.is_by_priority = True
    return scheduler


def add(scheduler, priority, *, length=3, adapter=None, max_tokens=4):
    params = SamplingParams(max_tokens=max_tokens)
    seq = make_sequence(range(length), params=params, adapter=adapter, priority=priority)
    scheduler.add(seq)
    return seq


def run_and_list_starts(scheduler):
    starts = []
    while scheduler.waiting or scheduler.running:
        before = set(scheduler.running)
        items = step(scheduler)
        starts += [seq for seq in items if seq not in before]
    return starts


def test_sequences_start_by_priority_then_arrival_regardless_of_adapters():
    scheduler = by_priority(max_num_seqs=1, max_loras=2)
    jobs = [(2, A), (1, None), (0, B), (1, A), (-7, None), (0, None), (0, B)]
    seqs = [add(scheduler, priority, adapter=adapter) for priority, adapter in jobs]
    assert list(scheduler.waiting) == [seqs[index] for index in (4, 2, 5, 6, 1, 3, 0)]
    assert run_and_list_starts(scheduler) == list(dict.fromkeys(seqs[index] for index in (4, 2, 5, 6, 1, 3, 0)))


def test_the_youngest_of_the_worst_priority_is_preempted():
    scheduler = by_priority(num_blocks=6)
    worst = [add(scheduler, 5, length=7, max_tokens=8) for _ in range(2)]
    step(scheduler)
    best = add(scheduler, 0, length=7, max_tokens=8)
    for _ in range(2):
        step(scheduler)
    assert [seq.status for seq in (*worst, best)] == [Status.RUNNING, Status.WAITING, Status.RUNNING]
    run_to_end(scheduler)


def test_a_slot_drains_at_once_for_a_better_priority():
    scheduler = by_priority(max_loras=1)
    running = add(scheduler, 5, adapter=A, max_tokens=10)
    step(scheduler)
    urgent, late, base = add(scheduler, 0, adapter=B), add(scheduler, 5, adapter=A), add(scheduler, 9)
    while running.status is Status.RUNNING:
        assert late not in step(scheduler)
    assert base.status is not Status.WAITING, "it needs no slot"
    assert urgent in step(scheduler)
    run_to_end(scheduler)


def test_a_pinned_slot_does_not_drain():
    scheduler = by_priority(max_loras=2)
    scheduler.slots.retain(scheduler.slots.activate(A))
    add(scheduler, 5, adapter=B, max_tokens=9)
    step(scheduler)
    urgent, pinned = add(scheduler, 0, adapter=C), add(scheduler, 5, adapter=A)
    assert pinned in step(scheduler) and urgent.status is Status.WAITING


def test_among_equal_priorities_an_overdue_adapter_gets_its_slot():
    scheduler = by_priority(max_loras=1, max_num_seqs=4)
    add(scheduler, 1, adapter=A, max_tokens=20)
    overdue, num_steps = add(scheduler, 1, adapter=B), 0
    while overdue.status is Status.WAITING:
        if len(scheduler.waiting) < 5:
            add(scheduler, 1, adapter=A, max_tokens=10)
        step(scheduler)
        num_steps += 1
        assert num_steps < 200
    run_to_end(scheduler)


def check_order(scheduler, places, started):
    """Check that a sequence starts before a better-ranked one only if that lacks a slot, and without a new slot."""
    rank = {seq: (seq.priority, places[seq]) for seq in places}
    lacking = [rank[seq] for seq in scheduler.waiting if seq.adapter and not scheduler.slots.can_activate(seq.adapter)]
    for seq in started:
        for other in scheduler.waiting:
            if rank[other] < rank[seq]:
                assert other.adapter is not None and min(lacking) <= rank[other]
                assert other.priority == seq.priority or seq.adapter is None


@pytest.mark.parametrize("seed", range(12))
def test_random_arrivals_start_in_order_and_all_finish(seed, monkeypatch):
    rng = random.Random(seed)
    scheduler = by_priority(
        num_blocks=rng.choice([10, 16, 64]),
        max_loras=rng.choice([1, 2]),
        max_num_seqs=rng.choice([1, 3, 8]),
        budget=rng.choice([8, 20, 64]),
        prefix_caching=rng.random() < 0.5,
    )
    seqs, places = [], {}
    schedule, preempt = scheduler.schedule, scheduler._preempt

    def checked_schedule():
        before = set(scheduler.running)
        items = schedule()
        check_order(scheduler, places, [seq for seq in scheduler.running if seq not in before])
        return items

    def checked_preempt(in_step, victim):
        places[victim] = -1 - scheduler.num_preemptions  # at the front of its priority
        assert victim.priority == max(seq.priority for seq in scheduler.running)
        younger = scheduler.running[scheduler.running.index(victim) + 1 :]
        assert all(seq.priority < victim.priority for seq in younger)
        preempt(in_step, victim)

    monkeypatch.setattr(scheduler, "schedule", checked_schedule)
    monkeypatch.setattr(scheduler, "_preempt", checked_preempt)
    for _ in range(150):
        while rng.random() < 0.4:
            adapter, length = rng.choice([None, None, *ADAPTERS]), rng.randint(1, 24)
            seqs.append(
                add(scheduler, rng.randint(-1, 2), length=length, adapter=adapter, max_tokens=rng.randint(1, 12))
            )
            places[seqs[-1]] = len(seqs)
        if scheduler.running and rng.random() < 0.05:
            scheduler.finish(rng.choice(scheduler.running), "abort")
        step(scheduler)
    run_to_end(scheduler)
    assert all(seq.status is Status.FINISHED for seq in seqs)


def test_all_sequences_finish_under_preemption_across_priorities():
    scheduler = by_priority(num_blocks=8, max_loras=2, prefix_caching=True)
    for index in range(40):
        add(scheduler, index % 3, length=5 + index % 9, adapter=(None, A, B, C)[index % 4], max_tokens=12)
        step(scheduler)
    run_to_end(scheduler)
    assert scheduler.num_preemptions > 10
