"""`mmlora.engine.sampler`: each option against an independent computation in plain Python."""

import math
from collections import Counter

import pytest
import torch

from mmlora import SamplingParams
from mmlora.engine.sampler import sample, token_probabilities, top_logprobs
from mmlora.errors import MMLoRAError, RequestError
from tests.engine.sequences import SpellingTokenizer, make_sequence

LOGITS = [2.0, -1.0, 0.5, 3.0, 1.0, -2.0, 2.5, 0.0]
GREEDY = SamplingParams(temperature=0)


def softmax(scores):
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    return [weight / sum(weights) for weight in weights]


def keep(probs, is_kept):
    kept = [p if k else 0.0 for p, k in zip(probs, is_kept, strict=True)]
    return [p / sum(kept) for p in kept]


def expected_probabilities(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Apply temperature, min-p, top-k and top-p, in this order, by their definitions."""
    probs = softmax([score / temperature for score in logits])
    probs = keep(probs, [p >= min_p * max(probs) for p in probs])
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    if top_k > 0:
        probs = keep(probs, [i in order[:top_k] for i in range(len(probs))])
    if top_p < 1:
        nucleus, total = [], 0.0
        for i in order:
            nucleus.append(i)
            total += probs[i]
            if total >= top_p:
                break
        probs = keep(probs, [i in nucleus for i in range(len(probs))])
    return probs


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 5.0},
        {"top_k": 1},
        {"top_k": 3},
        {"top_k": 100},
        {"top_k": -1},
        {"top_p": 0.01},
        {"top_p": 0.5},
        {"top_p": 0.9},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "min_p": 0.1},
        {"top_p": 0.6, "min_p": 0.5},
    ],
    ids=str,
)
def test_the_distribution_is_the_one_that_the_options_define(options):
    probs = token_probabilities(torch.tensor(LOGITS), SamplingParams(**options))
    torch.testing.assert_close(probs, torch.tensor(expected_probabilities(LOGITS, **options)))


def next_token(logits, stop_ids=frozenset(), **sequence):
    return sample(torch.tensor([logits]), [make_sequence(**sequence)], stop_ids)[0]


def test_greedy_takes_the_most_likely_token():
    assert next_token(LOGITS, params=GREEDY) == 3


def test_logit_bias_is_added():
    bias = {0: 1.5, 3: -0.6}
    assert next_token(LOGITS, params=SamplingParams(temperature=0, logit_bias=bias)) == 0
    assert next_token(LOGITS, params=SamplingParams(temperature=0, logit_bias={5: 100})) == 5


def test_only_allowed_tokens_are_sampled():
    assert next_token(LOGITS, params=SamplingParams(temperature=0, allowed_token_ids=[0, 1])) in (0, 1)
    best = max((0, 1, 5), key=lambda token: LOGITS[token])
    assert next_token(LOGITS, params=SamplingParams(temperature=0, allowed_token_ids=[0, 1, 5, 5])) == best
    for seed in range(20):
        assert next_token(LOGITS, params=SamplingParams(temperature=9, allowed_token_ids=[5, 0]), seed=seed) in (0, 5)
    stuck = SamplingParams(temperature=0, allowed_token_ids=[2], min_tokens=1, stop_token_ids=[2])
    assert "allowed_token_ids" in str(next_token(LOGITS, params=stuck))


@pytest.mark.parametrize(
    ("output", "is_banned"),
    [((), False), ((1,), False), ((1, 2), True), ((0, 1, 2), True), ((1, 2, 0), False), ((2, 2), False)],
    ids=str,
)
def test_the_last_token_of_a_bad_word_is_not_sampled(output, is_banned):
    sequence = {"prompt": [1, 2], "output": output, "bad_words": ((1, 2, 3),)}  # the prompt does not count
    token = next_token(LOGITS, params=GREEDY, **sequence)
    assert (token != 3) is is_banned
    assert next_token(LOGITS, params=GREEDY, **{**sequence, "bad_words": ((3,),)}) != 3


def penalized(logits, prompt, output, presence=0.0, frequency=0.0, repetition=1.0):
    scores = list(logits)
    for token in set(prompt) | set(output):
        if token < len(scores):
            scores[token] = scores[token] / repetition if scores[token] > 0 else scores[token] * repetition
    for token, count in Counter(output).items():
        scores[token] -= frequency * count + presence
    return scores


@pytest.mark.parametrize(
    ("presence", "frequency", "repetition"),
    [(1.5, 0, 1), (0, 0.4, 1), (0, 0, 1.7), (0, 0, 0.5), (0.5, 0.3, 1.3), (-1, -0.5, 1)],
)
@pytest.mark.parametrize("output", [(), (3,), (3, 3, 6), (1, 5, 3, 1)], ids=str)
def test_penalties_change_the_logits_as_defined(presence, frequency, repetition, output):
    prompt = (0, 5, 900)  # 900: a placeholder outside the vocabulary
    params = SamplingParams(
        temperature=1, seed=3, presence_penalty=presence, frequency_penalty=frequency, repetition_penalty=repetition
    )
    row = torch.tensor([LOGITS])
    sample(row, [make_sequence(prompt, params=params, output=output)], frozenset())
    expected = penalized(LOGITS, prompt, output, presence, frequency, repetition)
    torch.testing.assert_close(row[0], torch.tensor(expected))


def test_min_tokens_masks_every_way_to_stop_until_it_is_reached():
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[6])
    stop_ids = frozenset({3})
    assert next_token(LOGITS, stop_ids, params=params) == 0  # neither 3 nor 6
    assert next_token(LOGITS, stop_ids, params=params, output=[1]) == 0
    assert next_token(LOGITS, stop_ids, params=params, output=[1, 1]) == 3


def test_min_tokens_without_any_stop_token_changes_nothing():
    assert next_token(LOGITS, params=SamplingParams(temperature=0, min_tokens=2)) == 3


def draw(seqs, num_steps=30):
    tokens = [[] for _ in seqs]
    for _ in range(num_steps):
        for row, token in zip(tokens, sample(torch.tensor([LOGITS] * len(seqs)), seqs, frozenset()), strict=True):
            row.append(token)
    return tokens


def test_a_seeded_sequence_does_not_depend_on_the_batch():
    def seeded():
        return make_sequence(params=SamplingParams(seed=11))

    alone = draw([seeded()])[0]
    others = [make_sequence(seed=5), make_sequence(params=GREEDY), make_sequence(params=SamplingParams(seed=12))]
    together = draw([others[0], seeded(), *others[1:]])
    assert together[1] == alone
    assert together[2] == [3] * 30
    assert together[0] != alone and together[3] != alone and len(set(alone)) > 2


def test_random_tokens_have_the_frequencies_of_the_distribution():
    options = {"temperature": 0.9, "top_k": 5, "min_p": 0.1}
    seq = make_sequence(params=SamplingParams(seed=0, **options))
    counts = Counter(draw([seq], 4000)[0])
    for token, p in enumerate(expected_probabilities(LOGITS, **options)):
        sigma = math.sqrt(4000 * p * (1 - p))
        assert abs(counts[token] - 4000 * p) <= 4 * sigma + 1e-6


def test_top_logprobs_are_ranked_and_hold_the_chosen_token():
    logprobs = torch.tensor(LOGITS).log_softmax(-1)
    top = top_logprobs(logprobs, 5, 2, SpellingTokenizer())
    expected = [math.log(p) for p in softmax(LOGITS)]
    assert {token: entry.rank for token, entry in top.items()} == {3: 1, 6: 2, 5: 8}
    for token, entry in top.items():
        assert entry.logprob == pytest.approx(expected[token], abs=1e-5)
    assert [entry.decoded_token for entry in top.values()] == ["d", "g", "f"]


@pytest.mark.parametrize(("num_top", "count"), [(0, 1), (1, 1), (3, 3), (100, 8), (-1, 8)])
def test_the_requested_number_of_logprobs_is_returned(num_top, count):
    assert len(top_logprobs(torch.tensor(LOGITS).log_softmax(-1), 3, num_top, SpellingTokenizer())) == count


@pytest.mark.parametrize("options", [{"top_p": 1e-46}, {"top_p": 1e-300}, {"temperature": 1e-4}], ids=str)
def test_extreme_options_leave_a_distribution(options):
    huge = torch.tensor([1e36, -1e36, 3e35])
    assert token_probabilities(huge, SamplingParams(**options)).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_a_row_without_a_finite_maximum_fails_alone(bad, temperature):
    params = SamplingParams(temperature=temperature, seed=1)
    seqs = [make_sequence(params=params) for _ in range(3)]
    alone = sample(torch.tensor([LOGITS]), [make_sequence(params=params)], frozenset())
    first, failed, last = sample(torch.tensor([LOGITS, [0.0, bad] + [0.0] * 6, LOGITS]), seqs, frozenset())
    assert [first] == [last] == alone
    assert isinstance(failed, MMLoRAError) and not isinstance(failed, RequestError)


@pytest.mark.parametrize(
    "options",
    [{"repetition_penalty": 1e-40}, {"min_tokens": 2, "stop_token_ids": list(range(8))}],
    ids=["penalty", "all-blocked"],
)
def test_options_that_leave_no_token_are_a_request_error(options):
    seqs = [make_sequence(params=SamplingParams(temperature=0, **options)), make_sequence(params=GREEDY)]
    failed, other = sample(torch.tensor([LOGITS, LOGITS]), seqs, frozenset())
    assert isinstance(failed, RequestError) and "repetition_penalty" in str(failed)
    assert other == 3


def test_stop_ids_outside_the_logits_are_ignored():
    assert next_token(LOGITS, frozenset({3, 99}), params=SamplingParams(temperature=0, min_tokens=1)) == 6
