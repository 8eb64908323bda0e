"""`SamplingParams`: every value out of range is refused by name, and derived properties."""

import math
from dataclasses import dataclass, fields
from typing import Annotated

import pytest

from mmlora import SamplingParams
from mmlora.errors import RequestError
from mmlora.sampling_params import Bounds
from mmlora.server.bodies import validate_fields
from mmlora.server.openai.chat.protocol import ChatCompletionRequest
from mmlora.server.openai.completions.protocol import CompletionRequest
from mmlora.server.openai.protocol import ENDPOINT_FIELDS, sampling_model
from mmlora.server.openai.responses.protocol import ResponsesRequest

WRONG = [
    ("n", 0),
    ("n", 129),
    ("n", 1.0),
    ("n", True),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", 10**400),
    ("temperature", math.inf),
    ("temperature", "1"),
    ("temperature", True),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("top_k", 1.5),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("seed", 2**63),
    ("seed", -(2**63) - 1),
    ("seed", "7"),
    ("allowed_token_ids", []),
    ("allowed_token_ids", [-1]),
    ("allowed_token_ids", "12"),
    ("allowed_token_ids", [1.0]),
    ("bad_words", "word"),
    ("bad_words", [""]),
    ("bad_words", [" "]),
    ("bad_words", [5]),
    ("bad_words", ["x" * 1025]),
    ("bad_words", ["x"] * 1025),
    ("truncate_prompt_tokens", 0),
    ("truncate_prompt_tokens", -2),
    ("truncate_prompt_tokens", 1.5),
    ("output_kind", "DELTA"),
    ("output_kind", 1),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0),
    ("repetition_penalty", math.nan),
    ("logit_bias", [1]),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {1: "x"}),
    ("logit_bias", {-1: 0}),
    ("logit_bias", {1: 101}),
    ("logit_bias", {1: math.nan}),
    ("logit_bias", {1: 10**400}),
    ("stop", 5),
    ("stop", [1]),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", b"a"),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [True]),
    ("stop_token_ids", ["a"]),
    ("stop_token_ids", 5),
    ("max_tokens", 0),
    ("max_tokens", 1.5),
    ("min_tokens", -1),
    ("min_tokens", 17),
    ("logprobs", -2),
    ("logprobs", True),
    ("prompt_logprobs", -2),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda value: repr(value))
def test_a_wrong_value_is_refused_and_named(name, value):
    with pytest.raises(RequestError, match=rf"{name}") as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


RIGHT = [
    ("n", 128),
    ("temperature", 0),
    ("top_p", 1),
    ("top_k", -1),
    ("top_k", 0),
    ("min_p", 0),
    ("min_p", 1),
    ("seed", 2**63 - 1),
    ("seed", -(2**63)),
    ("presence_penalty", -2),
    ("repetition_penalty", 0.01),
    ("stop", None),
    ("stop", ()),
    ("max_tokens", None),
    ("min_tokens", 16),
    ("logprobs", 0),
    ("logprobs", -1),
    ("prompt_logprobs", 0),
]


@pytest.mark.parametrize(("name", "value"), RIGHT, ids=lambda value: repr(value))
def test_a_value_at_the_border_is_kept(name, value):
    assert getattr(SamplingParams(**{name: value}), name) == value


def test_the_message_gives_the_value_and_the_range():
    with pytest.raises(RequestError, match=r"top_p=1\.5 must be a number above 0\.0 and at most 1\.0"):
        SamplingParams(top_p=1.5)


def test_an_unknown_option_is_an_error():
    with pytest.raises(TypeError, match="beam_width"):
        SamplingParams(beam_width=4)


def test_min_tokens_above_max_tokens_is_refused_unless_max_tokens_is_open():
    with pytest.raises(RequestError, match="min_tokens=5 must not exceed max_tokens=4"):
        SamplingParams(min_tokens=5, max_tokens=4)
    assert SamplingParams(min_tokens=500, max_tokens=None).min_tokens == 500


def test_stop_strings_are_a_tuple_for_every_form():
    assert SamplingParams().stop_strings == ()
    assert SamplingParams(stop="ab").stop_strings == ("ab",)
    assert SamplingParams(stop=["ab", "c"]).stop_strings == ("ab", "c")


def test_logit_bias_takes_the_string_keys_of_json():
    assert SamplingParams(logit_bias={"12": 3}).logit_bias == {12: 3.0}


@pytest.mark.parametrize(("temperature", "is_greedy"), [(0, True), (1e-6, True), (1e-4, False), (1, False)])
def test_temperature_zero_is_greedy(temperature, is_greedy):
    assert SamplingParams(temperature=temperature).is_greedy is is_greedy


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_any_penalty_counts_as_one(name):
    assert not SamplingParams().has_penalties
    assert SamplingParams(**{name: 0.5}).has_penalties


@pytest.mark.parametrize("model", [ChatCompletionRequest, CompletionRequest, ResponsesRequest])
def test_request_models_have_every_option(model):
    assert {field.name for field in fields(SamplingParams)} - ENDPOINT_FIELDS <= set(model.model_fields)


def test_a_new_option_is_declared_once():
    """A field of the dataclass has its bounds checked and becomes a field of the request models."""

    @dataclass
    class WithTypicalP(SamplingParams):
        typical_p: Annotated[float, Bounds(0.0, 1.0, excludes_low=True)] = 1.0

    with pytest.raises(RequestError, match=r"typical_p=2\.0 must be a number above 0\.0 and at most 1\.0"):
        WithTypicalP(typical_p=2.0)
    model = sampling_model(WithTypicalP)
    assert validate_fields(model, {"typical_p": 0.5}).typical_p == 0.5
    assert validate_fields(model, {}).typical_p is None
    with pytest.raises(RequestError, match="typical_p: Input should be a valid number"):
        validate_fields(model, {"typical_p": []})


def test_stop_strings_need_text():
    assert SamplingParams(detokenize=False, stop=[], stop_token_ids=[1]).stop_strings == ()
    with pytest.raises(RequestError, match="stop='x' needs detokenize=True") as caught:
        SamplingParams(detokenize=False, stop="x")
    assert caught.value.param == "stop" and isinstance(caught.value, ValueError)
