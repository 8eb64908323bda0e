"""`WaitingQueue`: first come, first served in a lane, and no lane hides another."""

import random

from mmlora.engine.scheduler import Place, WaitingQueue
from tests.engine.sequences import make_adapter, make_sequence

A, B = make_adapter("A", 1), make_adapter("B", 2)


def test_sequences_stand_in_the_order_in_which_they_came_those_put_back_first():
    queue = WaitingQueue()
    back = [make_sequence(adapter=adapter) for adapter in (A, None, B, A)]
    front = [make_sequence(adapter=adapter) for adapter in (B, A)]
    for seq in back:
        queue.append(seq, step=3)
    for seq in front:
        queue.appendleft(seq, step=5)
    assert list(queue) == [*reversed(front), *back] and len(queue) == 6 and queue.num_base == 1
    assert queue.head(None) == (Place(2, 3), back[1])
    assert sorted(queue.adapter_heads()) == [(Place(-2, 5), front[1]), (Place(-1, 5), front[0])]
    assert [queue.last_order(A, count) for count in (1, 2, 3, 9)] == [-2, 1, 4, 4]


def test_a_removed_sequence_leaves_no_trace():
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


def test_random_changes_agree_with_a_list():
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
