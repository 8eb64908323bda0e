"""`Scheduler` and its `WaitingQueue`; `step` below replaces the model."""

import random

import pytest
from torch import nn

from mmlora import SamplingParams
from mmlora.engine.block_manager import BlockManager
from mmlora.engine.scheduler import MAX_WAIT_STEPS, Scheduler
from mmlora.engine.sequence import Status
from mmlora.engine.waiting_queue import QueuePosition, WaitingQueue
from mmlora.errors import AdapterError
from mmlora.lora.layers.slots import LoRASlots
from tests.engine.sequences import make_adapter, make_group, make_sequence

A, B, C = (make_adapter(name, uid) for uid, name in enumerate("ABC", 1))


def make_scheduler(*, num_blocks=64, max_loras=1, max_num_seqs=8, budget=64, prefix_caching=False):
    blocks = BlockManager(num_blocks, 4, enable_prefix_caching=prefix_caching)
    return Scheduler(blocks, LoRASlots(nn.Module(), max_loras, "cpu"), max_num_seqs, budget)


def add(scheduler, length=3, adapter=None, max_tokens=4, **params):
    params = SamplingParams(max_tokens=max_tokens, **params)
    seq = make_sequence(range(1000 * len(scheduler.waiting), 1000 * len(scheduler.waiting) + length), params=params)
    seq = make_sequence(seq.token_ids, params=params, adapter=adapter)
    scheduler.add(seq)
    return seq


def step(scheduler):
    """Schedule, check the invariants, and append a token to each sequence as the model would."""
    items = scheduler.schedule()
    assert sum(item.num_tokens for item in items) <= scheduler.max_num_batched_tokens
    assert len(items) <= len(scheduler.running) <= scheduler.max_num_seqs
    assert len({id(item.seq) for item in items}) == len(items)
    adapters = {item.seq.adapter.identity for item in items if item.seq.adapter}
    assert len(adapters) <= scheduler.slots.max_loras
    for item in items:
        assert item.num_tokens > 0 and item.start == item.seq.num_computed_tokens
        assert (item.seq.slot is None) == (item.seq.adapter is None)
        assert len(item.seq.block_table) * scheduler.block_manager.block_size >= item.end
        item.seq.num_computed_tokens = item.end
        scheduler.block_manager.mark_computed(item.seq)
        if item.is_sampled:
            item.seq.token_ids.append(7)
            if item.seq.num_output_tokens == item.seq.params.max_tokens:
                scheduler.finish(item.seq, "length")
    return {item.seq: item.num_tokens for item in items}


def run_to_end(scheduler, max_steps=2000):
    for num_steps in range(max_steps):
        if not (scheduler.waiting or scheduler.running):
            assert scheduler.block_manager.num_free_blocks == scheduler.block_manager.num_blocks
            assert all(scheduler.slots.num_users(slot) == 0 for slot in range(scheduler.slots.max_loras))
            return num_steps
        step(scheduler)
    raise AssertionError(f"unfinished after {max_steps} steps")


def test_prompts_share_a_step_up_to_the_token_budget():
    scheduler = make_scheduler(budget=10)
    first, second, third = (add(scheduler, 4) for _ in range(3))
    assert step(scheduler) == {first: 4, second: 4, third: 2}
    assert step(scheduler) == {first: 1, second: 1, third: 2}
    run_to_end(scheduler)


def test_a_long_prompt_is_prefilled_in_chunks_together_with_decodes():
    scheduler = make_scheduler(budget=8)
    short = add(scheduler, 3, max_tokens=9)
    long = add(scheduler, 20)
    assert [step(scheduler) for _ in range(4)] == [
        {short: 3, long: 5},
        {short: 1, long: 7},
        {short: 1, long: 7},
        {short: 1, long: 1},
    ]
    assert long.num_output_tokens == 1
    run_to_end(scheduler)


def test_at_most_max_num_seqs_run_and_the_next_starts_when_one_ends():
    scheduler = make_scheduler(max_num_seqs=2)
    first, second, third = add(scheduler, max_tokens=2), add(scheduler, max_tokens=4), add(scheduler)
    assert set(step(scheduler)) == {first, second}
    step(scheduler)
    assert set(step(scheduler)) == {second, third}
    run_to_end(scheduler)


def test_the_last_to_start_is_preempted_and_recomputed():
    scheduler = make_scheduler(num_blocks=4)
    first, second = add(scheduler, 7, max_tokens=8), add(scheduler, 7, max_tokens=8)
    step(scheduler)
    step(scheduler)
    assert step(scheduler) == {first: 1}
    assert scheduler.num_preemptions == 1
    assert (second.status, second.num_computed_tokens, second.block_table) == (Status.WAITING, 0, [])
    assert second.num_output_tokens == 2, "its tokens are kept"
    while first.status is Status.RUNNING:
        step(scheduler)
    assert step(scheduler) == {second: 9}
    run_to_end(scheduler)


def test_a_preempted_sequence_starts_before_waiting_ones():
    scheduler = make_scheduler(num_blocks=4)
    first, second = add(scheduler, 7, max_tokens=8), add(scheduler, 7, max_tokens=8)
    third = add(scheduler, 7, max_tokens=8)
    for _ in range(3):
        step(scheduler)
    assert list(scheduler.waiting) == [second, third]
    scheduler.finish(first, "abort")
    assert second in step(scheduler)
    run_to_end(scheduler)


def test_all_sequences_finish_under_constant_preemption():
    scheduler = make_scheduler(num_blocks=8, max_loras=2, prefix_caching=True)
    for index in range(20):
        add(scheduler, 5 + index % 9, (None, A, B, C)[index % 4], max_tokens=12)
    run_to_end(scheduler)
    assert scheduler.num_preemptions > 10


def test_all_sequences_finish_when_long_prompts_preempt_scheduled_decodes():
    scheduler = make_scheduler(num_blocks=16, max_loras=2, max_num_seqs=6, budget=9)
    for index in range(60):
        add(scheduler, (3, 40)[index % 3 == 0], (None, A, B)[index % 7 % 3], max_tokens=5 + index % 11)
    run_to_end(scheduler)
    assert scheduler.num_preemptions > 10


def test_at_most_max_loras_adapters_run():
    scheduler = make_scheduler(max_loras=2)
    first, second, third, again = (add(scheduler, adapter=adapter) for adapter in (A, B, C, A))
    assert set(step(scheduler)) == {first, second, again}
    assert first.slot == again.slot != second.slot
    run_to_end(scheduler)
    assert third.status is Status.FINISHED


def test_base_requests_take_no_slot_and_overtake_a_waiting_adapter():
    scheduler = make_scheduler(max_loras=1)
    holder, waiting, base = add(scheduler, adapter=A), add(scheduler, adapter=B), add(scheduler)
    assert set(step(scheduler)) == {holder, base}
    assert list(scheduler.waiting) == [waiting]
    run_to_end(scheduler)


def test_skipping_keeps_the_order_of_the_queue():
    scheduler = make_scheduler(max_loras=1)
    add(scheduler, adapter=A)
    skipped = [add(scheduler, adapter=adapter) for adapter in (B, C, B)]
    step(scheduler)
    assert list(scheduler.waiting) == skipped


def test_a_busy_adapter_is_drained_for_an_overdue_one():
    scheduler = make_scheduler(max_loras=1, max_num_seqs=4)
    add(scheduler, adapter=A, max_tokens=20)
    overdue = add(scheduler, adapter=B)
    num_steps = 0
    while overdue.status is Status.WAITING and num_steps < 500:
        while len(scheduler.waiting) < 5:
            add(scheduler, adapter=A, max_tokens=10 + 7 * len(scheduler.waiting))
        step(scheduler)
        num_steps += 1
    assert MAX_WAIT_STEPS < num_steps <= MAX_WAIT_STEPS + 10 + 7 * 5, "only what ran when it became overdue"
    run_to_end(scheduler)


def wait(scheduler, num_steps=MAX_WAIT_STEPS):
    for _ in range(num_steps):
        step(scheduler)


def test_younger_adapters_overtake_one_that_is_not_overdue():
    scheduler = make_scheduler(max_loras=1)
    add(scheduler, adapter=A, max_tokens=90)
    wait(scheduler, 40)
    add(scheduler, adapter=B)
    wait(scheduler, MAX_WAIT_STEPS - 1)
    younger = add(scheduler, adapter=A)
    assert younger in step(scheduler)
    late = add(scheduler, adapter=A)
    assert late not in step(scheduler)
    run_to_end(scheduler)


def test_the_first_free_slot_goes_to_the_overdue_adapter_and_draining_ends():
    scheduler = make_scheduler(max_loras=2)
    long, short = add(scheduler, adapter=A, max_tokens=60), add(scheduler, adapter=B, max_tokens=40)
    overdue = add(scheduler, adapter=C)
    wait(scheduler)
    younger = [add(scheduler, adapter=adapter) for adapter in (A, B)]
    while short.status is Status.RUNNING:
        assert not set(younger) & set(step(scheduler))
    assert set(step(scheduler)) == {long, overdue, younger[0]}, "B has no slot, and A stops draining"
    run_to_end(scheduler)


def test_an_overdue_adapter_never_blocks_the_base():
    scheduler = make_scheduler(max_loras=1)
    holder = add(scheduler, adapter=A, max_tokens=50)
    add(scheduler, adapter=B)
    wait(scheduler)
    base, same_adapter = add(scheduler), add(scheduler, adapter=A)
    assert set(step(scheduler)) == {holder, base}, "only the base overtakes it"
    assert same_adapter.status is Status.WAITING
    run_to_end(scheduler)


def test_all_waiting_sequences_of_an_adapter_join_its_round_despite_long_prompts():
    scheduler = make_scheduler(max_loras=1, budget=20, num_blocks=256)
    add(scheduler, adapter=A, max_tokens=80)
    waiting = [add(scheduler, 16, adapter=adapter, max_tokens=9) for adapter in (B, C, B, B)]
    wait(scheduler, 81)
    late = add(scheduler, adapter=B)
    wait(scheduler, 3)
    assert [seq.status for seq in waiting] == [Status.RUNNING, Status.WAITING, Status.RUNNING, Status.RUNNING]
    assert late.status is Status.WAITING, "C is overdue"
    run_to_end(scheduler)


def test_a_round_admits_at_most_max_num_seqs_sequences():
    scheduler = make_scheduler(max_loras=1, max_num_seqs=2)
    add(scheduler, adapter=A, max_tokens=40)
    jobs = ((B, 4), (C, 4), (B, 20), (B, 4))
    first, overdue, second, third = (add(scheduler, adapter=adapter, max_tokens=count) for adapter, count in jobs)
    wait(scheduler, 41)
    assert [first.status, second.status] == [Status.RUNNING] * 2
    while overdue.status is Status.WAITING:
        assert third.status is Status.WAITING
        step(scheduler)
    assert (first.status, second.status, third.status) == (Status.FINISHED, Status.FINISHED, Status.WAITING)
    run_to_end(scheduler)


def test_a_preempted_sequence_continues_before_an_overdue_adapter():
    scheduler = make_scheduler(num_blocks=8, max_loras=1)
    first, second = add(scheduler, 7, adapter=A, max_tokens=12), add(scheduler, 7, adapter=A, max_tokens=12)
    overdue = add(scheduler, adapter=B)
    while scheduler.num_preemptions == 0:
        step(scheduler)
    assert second.status is Status.WAITING
    scheduler.num_steps += MAX_WAIT_STEPS
    scheduler.finish(first, "abort")
    assert set(step(scheduler)) == {second}
    assert overdue.status is Status.WAITING
    run_to_end(scheduler)


def test_a_step_examines_one_waiting_sequence_per_adapter(monkeypatch):
    scheduler = make_scheduler(max_loras=1)
    add(scheduler, adapter=A, max_tokens=60)
    step(scheduler)
    for index in range(1000):
        add(scheduler, adapter=(B, C)[index % 2])
    can_activate, asked = scheduler.slots.can_activate, []
    monkeypatch.setattr(scheduler.slots, "can_activate", lambda adapter: asked.append(adapter) or can_activate(adapter))
    wait(scheduler, 10)
    assert asked == [B, C] * 10


def test_decodes_do_not_wait_for_a_long_prompt():
    scheduler = make_scheduler(budget=8)
    decoding = add(scheduler, 3, max_tokens=20)
    long = add(scheduler, 40, adapter=A)
    step(scheduler)
    late = add(scheduler, 3, max_tokens=20)
    while late.num_output_tokens == 0:
        step(scheduler)
    while long.num_output_tokens == 0:
        assert {decoding, late} <= set(step(scheduler))
    run_to_end(scheduler)


@pytest.mark.parametrize(("long_adapter", "short_adapter"), [(A, None), (None, A)], ids=["adapter", "base"])
def test_long_prompts_of_one_side_do_not_delay_the_other(long_adapter, short_adapter):
    scheduler = make_scheduler(budget=8, num_blocks=256)
    for _ in range(3):
        add(scheduler, 80, adapter=long_adapter)
    step(scheduler)
    short = add(scheduler, 3, adapter=short_adapter, max_tokens=2)
    step(scheduler), step(scheduler)
    assert short.num_output_tokens >= 1
    run_to_end(scheduler)


def test_base_sequences_preempt_the_youngest_adapter_sequences_up_to_three_quarters():
    scheduler = make_scheduler(max_num_seqs=4)
    tuned = [add(scheduler, adapter=A, max_tokens=20) for _ in range(6)]
    step(scheduler)
    base = [add(scheduler, max_tokens=20) for _ in range(4)]
    assert set(step(scheduler)) == {tuned[0], *base[:3]}
    assert list(scheduler.waiting) == [*tuned[1:], base[3]]
    wait(scheduler, 5)
    assert scheduler.num_preemptions == 3, "the last quarter is kept for adapters"
    run_to_end(scheduler)


def test_a_preempted_sequence_returns_its_tokens_to_the_budget():
    scheduler = make_scheduler(max_num_seqs=4, budget=5)
    for _ in range(4):
        add(scheduler, 1, adapter=A)
    step(scheduler)
    base = add(scheduler, 3)
    assert step(scheduler)[base] == 2
    run_to_end(scheduler)


def test_adapter_sequences_do_not_take_places_reserved_for_waiting_base_sequences():
    scheduler = make_scheduler(max_num_seqs=4, budget=8)
    blocker = add(scheduler, 30, max_tokens=1)  # its prompt takes the whole budget of the first steps
    base = add(scheduler, 3, max_tokens=20)
    tuned = [add(scheduler, 2, adapter=A, max_tokens=30) for _ in range(8)]
    while blocker.status is not Status.FINISHED or base.status is Status.WAITING:
        step(scheduler)
        assert sum(seq.status is Status.RUNNING for seq in tuned) <= 3
    assert scheduler.num_preemptions == 0
    run_to_end(scheduler)


@pytest.mark.parametrize("max_num_seqs", [1, 2])
@pytest.mark.parametrize(("many", "one"), [(A, None), (None, A)], ids=["adapters", "base"])
def test_neither_side_starves_when_the_other_saturates(max_num_seqs, many, one):
    scheduler = make_scheduler(max_num_seqs=max_num_seqs)
    for _ in range(30):
        add(scheduler, adapter=many, max_tokens=2)
    step(scheduler)
    rare = add(scheduler, adapter=one)
    wait(scheduler, 4)
    assert rare.status is not Status.WAITING
    run_to_end(scheduler)


@pytest.mark.parametrize(("large_adapter", "small_adapter"), [(A, None), (None, A)], ids=["adapter", "base"])
def test_small_prompts_do_not_starve_a_large_one_of_blocks(large_adapter, small_adapter):
    scheduler = make_scheduler(num_blocks=8)
    for _ in range(5):
        add(scheduler, 4, adapter=small_adapter, max_tokens=3)
    step(scheduler)
    large = add(scheduler, 28, adapter=large_adapter)
    for _ in range(20):
        add(scheduler, 4, adapter=small_adapter, max_tokens=3)
        step(scheduler)
    assert large.status is not Status.WAITING
    run_to_end(scheduler)


def test_finishing_is_idempotent_in_every_status():
    scheduler = make_scheduler(max_loras=1)
    running, waiting, late = add(scheduler, adapter=A), add(scheduler, adapter=B), make_sequence()
    step(scheduler)
    for seq in (running, waiting, late):
        scheduler.finish(seq, "abort")
        scheduler.finish(seq, "stop")
        assert (seq.status, seq.finish_reason, seq.block_table) == (Status.FINISHED, "abort", [])
    assert run_to_end(scheduler) == 0


def test_an_adapter_that_cannot_be_activated_fails_alone(monkeypatch):
    scheduler = make_scheduler(max_loras=2)
    broken, good = add(scheduler, adapter=A), add(scheduler, adapter=B)
    activate = scheduler.slots.activate

    def fail(adapter):
        if adapter is A:
            raise RuntimeError("out of memory")
        return activate(adapter)

    monkeypatch.setattr(scheduler.slots, "activate", fail)
    assert set(step(scheduler)) == {good}
    ((seq, error),) = scheduler.failed
    assert seq is broken and broken.finish_reason == "error"
    assert isinstance(error, AdapterError) and "'A' could not be activated: out of memory" in str(error)
    run_to_end(scheduler)


@pytest.mark.parametrize("num_cached", [8])
def test_a_cached_prefix_is_not_computed_again(num_cached):
    scheduler = make_scheduler(prefix_caching=True)
    first = make_sequence(range(10))
    scheduler.add(first)
    step(scheduler)
    second = make_sequence([*range(9), 99])
    scheduler.add(second)
    assert step(scheduler)[second] == 10 - num_cached
    assert second.request.num_cached_tokens == num_cached


def test_an_adapter_in_a_pinned_slot_is_not_held_back():
    """The slot cannot drain, so holding its sequences back would be useless."""
    scheduler = make_scheduler(max_loras=2)
    scheduler.slots.retain(scheduler.slots.activate(A))
    add(scheduler, adapter=B, max_tokens=400)
    step(scheduler)
    overdue = add(scheduler, adapter=C)
    for _ in range(MAX_WAIT_STEPS + 1):
        step(scheduler)
    pinned = add(scheduler, adapter=A)
    assert pinned in step(scheduler) and overdue.status is Status.WAITING


@pytest.mark.parametrize("error", [MemoryError("no memory"), ValueError("odd"), KeyError("gone")])
def test_any_error_of_an_activation_is_reported(monkeypatch, error):
    scheduler = make_scheduler()
    failing = add(scheduler, adapter=A)

    def fail(*_):
        raise error

    monkeypatch.setattr(scheduler.slots, "_load", fail)
    assert step(scheduler) == {}
    ((failed, named),) = scheduler.failed
    assert failed is failing and isinstance(named, AdapterError) and "'A'" in str(named)


def test_the_queue_is_first_in_first_out_with_requeued_sequences_in_front():
    queue = WaitingQueue()
    back = [make_sequence(adapter=adapter) for adapter in (A, None, B, A)]
    front = [make_sequence(adapter=adapter) for adapter in (B, A)]
    for seq in back:
        queue.append(seq, step=3)
    for seq in front:
        queue.appendleft(seq, step=5)
    assert list(queue) == [*reversed(front), *back] and len(queue) == 6 and queue.num_base == 1
    assert queue.head(None) == (QueuePosition(2, 3), back[1])
    assert sorted(queue.adapter_heads()) == [(QueuePosition(-2, 5), front[1]), (QueuePosition(-1, 5), front[0])]
    assert [queue.first_orders(A, count) for count in (1, 2, 3, 9)] == [{-2}, {-2, 1}, {-2, 1, 4}, {-2, 1, 4}]


def test_removing_a_sequence():
    queue = WaitingQueue()
    seqs = [make_sequence(adapter=adapter) for adapter in (A, B, A, None, A)]
    for seq in seqs:
        queue.append(seq, 0)
    queue.remove(seqs[2])
    queue.remove(seqs[2])
    queue.remove(make_sequence(adapter=B))
    assert list(queue) == [seqs[0], seqs[1], seqs[3], seqs[4]]
    for seq in seqs:
        queue.remove(seq)
    assert not queue and queue.head(A) is None and queue.head(None) is None and queue.adapter_heads() == []


def test_random_changes_match_a_list():
    rng, queue, model = random.Random(0), WaitingQueue(), []
    for step in range(2000):
        if model and rng.random() < 0.45:
            queue.remove(model.pop(rng.randrange(len(model))))
            continue
        seq = make_sequence(adapter=rng.choice([A, B, None]))
        is_front = rng.random() < 0.2
        (queue.appendleft if is_front else queue.append)(seq, step)
        model.insert(0 if is_front else len(model), seq)
        for adapter in (A, B, None):
            lane = [other for other in model if other.adapter is adapter]
            head = queue.head(adapter)
            assert (head[1] if head else None) is (lane[0] if lane else None)
    assert list(queue) == model and len(queue) == len(model)


def test_groups_take_turns_in_the_queue():
    queue = WaitingQueue()
    big, small = make_group(n=3), make_group(n=1)
    for seq in [*big, *small]:
        queue.append(seq, 0)
    assert queue.head(None)[1] is big[0]
    queue.remove(big[0])
    queue.count_start(big[0])
    assert queue.head(None)[1] is small[0]
    queue.remove(small[0])
    queue.count_start(small[0])
    assert queue.head(None)[1] is big[1]
    queue.count_start(big[1])
    queue.count_end(big[0])
    queue.count_end(big[1])
    assert (queue.num_running(big[0]), queue.num_running(small[0]), queue.max_running) == (0, 1, 1)


def test_the_queue_of_groups_matches_a_list():
    rng, queue, waiting, running, turns = random.Random(1), WaitingQueue(), [], [], {}
    requests, now, orders = [make_sequence(adapter=rng.choice([A, B, None])) for _ in range(8)], 0, {}
    for step in range(3000):
        action = rng.random()
        if action < 0.5:
            seq = make_sequence(group=rng.choice(["x", "y", None]), adapter=rng.choice([A, None]))
            if rng.random() < 0.5:
                seq.request = rng.choice(requests).request
            is_front = rng.random() < 0.2
            (queue.appendleft if is_front else queue.append)(seq, step)
            waiting.insert(0 if is_front else len(waiting), seq)
            now += 1
            orders[seq] = -now if is_front else now
        elif action < 0.8 and waiting:
            seq = waiting.pop(rng.randrange(len(waiting)))
            queue.remove(seq)
            if rng.random() < 0.8:
                queue.count_start(seq)
                running.append(seq)
                now += 1
                turns[seq.group] = now
        elif running:
            queue.count_end(running.pop(rng.randrange(len(running))))
        groups = [seq.group for seq in running]
        for group in set(turns) - set(groups) - {seq.group for seq in waiting}:
            del turns[group]
        assert queue.max_running == max(map(groups.count, groups), default=0)
        assert queue._last_turns.keys() == turns.keys()

        def rank(seq, groups=groups):
            order = orders[seq]
            return groups.count(seq.group), order if order < 0 else max(order, turns.get(seq.group, 0)), order

        for adapter in (A, B, None):
            lane = [seq for seq in waiting if seq.adapter is adapter]
            head, first = queue.head(adapter), min(lane, key=rank, default=None)
            assert (head[1] if head else None) is first
            if head is not None:
                assert head[0].num_running == groups.count(first.group)
        assert queue.num_base == sum(seq.adapter is None for seq in waiting) and list(queue) == waiting
