"""`SamplingParams`: the sampling options of one request, and the only list of them.

The HTTP request models, the defaults of a model and the Python API all read the fields of this dataclass.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from types import NoneType
from typing import Annotated, NoReturn, TypeGuard, get_args, get_origin, get_type_hints

from mmlora.errors import RequestError
from mmlora.structured_outputs import StructuredOutputsParams
from mmlora.utils.text import shorten

MAX_STOPS, MAX_STOP_CHARS = 64, 1024  # the output is searched for all of them after each token
MAX_BAD_WORDS = 1024  # each step compares the end of the output with all of them
MAX_STOP_TOKENS = 1024  # each sampled token is compared with all of them


@dataclass(frozen=True)
class Bounds:
    """Range of a numeric field.

    Attributes:
        low: smallest allowed value, or the limit above which values must be if `excludes_low`.
        high: largest allowed value; None for no limit.
        excludes_low: `low` itself is not allowed.
    """

    low: float
    high: float | None = None
    excludes_low: bool = False

    def __str__(self) -> str:
        if self.high is None:
            return f"at least {self.low}"
        return f"above {self.low} and at most {self.high}" if self.excludes_low else f"from {self.low} to {self.high}"

    def contains(self, value: float) -> bool:
        """Return whether a value is in the range; NaN never is."""
        is_high_enough = value > self.low if self.excludes_low else value >= self.low
        return is_high_enough and (self.high is None or value <= self.high)


class RequestOutputKind(Enum):
    """What the outputs of a request hold: everything so far, only what is new, or everything, once at the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class SamplingParams:
    """Sampling options of one request; names and meanings follow the OpenAI API and vLLM.

    To add an option, add a field with its `Bounds` and a line below, and read it in the sampler.

    Args:
        n: number of completions.
        temperature: 0 is greedy.
        top_p: keep the smallest set of tokens whose probabilities sum to at least this.
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        min_p: drop tokens whose probability is below this fraction of the most likely token's.
        seed: makes the request reproducible; completion i of n uses `seed + i`.
        presence_penalty: subtracted once from the logits of tokens already generated.
        frequency_penalty: subtracted once per occurrence among generated tokens.
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or completion.
        logit_bias: maps token ids to values added to their logits, -100 to 100.
        stop: strings that end the completion; they are cut off unless `include_stop_str_in_output`.
        stop_token_ids: tokens that end the completion; their text is left out unless `include_stop_str_in_output`.
        include_stop_str_in_output: keep the stop string or the text of the stop token.
        max_tokens: maximum number of tokens in a completion; None for the model's length limit.
        min_tokens: neither end-of-text nor stop tokens are sampled before this many tokens.
        ignore_eos: continue after end-of-text.
        logprobs: report the k most likely tokens at each step; -1 for the whole vocabulary.
        prompt_logprobs: the same for the prompt's tokens.
        allowed_token_ids: the only tokens that may be sampled; end-of-text is among them only if it is listed.
        bad_words: words that may not be generated, at the start of the text or after a space.
        truncate_prompt_tokens: keep the last k tokens of the prompt, counted before placeholders are expanded; -1 keeps
            what leaves room for `max_tokens`.
        detokenize: whether completions have text; without it, stop strings are not possible.
        output_kind: what outputs hold; None for deltas from `AsyncLLM` and everything so far from `LLMEngine.step`.
            `LLM` always returns everything.
        skip_special_tokens: leave special tokens out of the text.
        kept_special_token_ids: special tokens that stay in the text all the same, such as the markers of tool calls.
        structured_outputs: constraint on the completion's form.

    Raises:
        RequestError: a value is out of range; `param` is the field, the message has the value and what is allowed.
    """

    n: Annotated[int, Bounds(1, 128)] = 1
    temperature: Annotated[float, Bounds(0.0, 100.0)] = 1.0
    top_p: Annotated[float, Bounds(0.0, 1.0, excludes_low=True)] = 1.0
    top_k: Annotated[int, Bounds(-1)] = 0
    min_p: Annotated[float, Bounds(0.0, 1.0)] = 0.0
    seed: Annotated[int | None, Bounds(-(2**63), 2**63 - 1)] = None
    presence_penalty: Annotated[float, Bounds(-2.0, 2.0)] = 0.0
    frequency_penalty: Annotated[float, Bounds(-2.0, 2.0)] = 0.0
    repetition_penalty: Annotated[float, Bounds(0.0, 100.0, excludes_low=True)] = 1.0
    logit_bias: Mapping[int, float] | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    max_tokens: Annotated[int | None, Bounds(1)] = 16
    min_tokens: Annotated[int, Bounds(0)] = 0
    ignore_eos: bool = False
    logprobs: Annotated[int | None, Bounds(-1)] = None
    prompt_logprobs: Annotated[int | None, Bounds(-1)] = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    truncate_prompt_tokens: Annotated[int | None, Bounds(-1)] = None
    detokenize: bool = True
    output_kind: RequestOutputKind | None = None
    skip_special_tokens: bool = True
    kept_special_token_ids: Sequence[int] | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        for name, (types, bounds) in _numeric_fields(type(self)).items():  # type: ignore[arg-type]  # hashable
            self._check_number(name, types, bounds)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            received = f"min_tokens={shorten(self.min_tokens)}"
            self._refuse("min_tokens", f"{received} must not exceed max_tokens={shorten(self.max_tokens)}")
        self._check_stop_strings()
        self._check_token_ids("stop_token_ids")
        self._check_token_ids("kept_special_token_ids")
        self._check_token_ids("allowed_token_ids")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            self._refuse("allowed_token_ids", "allowed_token_ids is empty; at least one token is needed")
        self._check_bad_words()
        if self.truncate_prompt_tokens == 0:
            self._refuse("truncate_prompt_tokens", "truncate_prompt_tokens=0 must be -1, or at least 1")
        if not self.detokenize and self.stop_strings:
            self._refuse("stop", f"stop={shorten(self.stop)} needs detokenize=True")
        if not isinstance(self.output_kind, RequestOutputKind | None):
            received = f"output_kind={shorten(self.output_kind)}"
            self._refuse("output_kind", f"{received} must be a RequestOutputKind or None")
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            received = f"structured_outputs is a {type(self.structured_outputs).__name__}"
            self._refuse("structured_outputs", f"{received}; it must be a StructuredOutputsParams or None")
        if self.logit_bias is not None:
            self.logit_bias = self._parse_logit_bias(self.logit_bias)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always chosen."""
        return self.temperature < 1e-5

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on earlier tokens."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def _check_number(self, name: str, types: tuple[type, ...], bounds: Bounds) -> None:
        value = getattr(self, name)
        if value is None and NoneType in types:
            return
        allowed = (int, float) if float in types else (int,)
        if not isinstance(value, allowed) or isinstance(value, bool) or not bounds.contains(value):
            kind = "a number" if float in types else "an integer,"
            self._refuse(name, f"{name}={shorten(value)} must be {kind} {bounds}")

    def _check_stop_strings(self) -> None:
        if not isinstance(self.stop, str | None) and (
            not isinstance(self.stop, Sequence) or not all(isinstance(s, str) for s in self.stop)
        ):
            self._refuse("stop", f"stop={shorten(self.stop)} must be a string or a list of strings")
        if any(not s for s in self.stop_strings):
            self._refuse("stop", "stop contains an empty string; every stop string needs at least one character")
        if len(self.stop_strings) > MAX_STOPS or any(len(s) > MAX_STOP_CHARS for s in self.stop_strings):
            longest = max(map(len, self.stop_strings))
            received = f"stop has {len(self.stop_strings)} strings of up to {longest} characters"
            self._refuse("stop", f"{received}; the limit is {MAX_STOPS} of up to {MAX_STOP_CHARS}")

    def _check_bad_words(self) -> None:
        words = self.bad_words if self.bad_words is not None else ()
        if isinstance(words, str) or not isinstance(words, Sequence) or not all(isinstance(w, str) for w in words):
            self._refuse("bad_words", f"bad_words={shorten(words)} must be a list of strings")
        if any(not word.strip() for word in words):
            self._refuse("bad_words", "bad_words contains an empty string; every word needs at least one character")
        if len(words) > MAX_BAD_WORDS or any(len(word) > MAX_STOP_CHARS for word in words):
            received = f"bad_words has {len(words)} words of up to {max(map(len, words))} characters"
            self._refuse("bad_words", f"{received}; the limit is {MAX_BAD_WORDS} of up to {MAX_STOP_CHARS}")

    def _check_token_ids(self, name: str) -> None:
        ids = getattr(self, name)
        if isinstance(ids, Collection) and len(ids) > MAX_STOP_TOKENS:
            self._refuse(name, f"{name} has {len(ids)} tokens; the limit is {MAX_STOP_TOKENS}")
        if ids is not None and not (isinstance(ids, Collection) and all(_is_integer(i) and i >= 0 for i in ids)):
            self._refuse(name, f"{name}={shorten(ids)} must be a list of token ids")

    def _parse_logit_bias(self, bias: Mapping[int, float]) -> dict[int, float]:
        try:
            parsed = {int(token): float(value) for token, value in bias.items()}
        except (AttributeError, TypeError, ValueError, OverflowError):
            self._refuse("logit_bias", f"logit_bias={shorten(bias)} must map token ids to numbers")
        for token, value in parsed.items():
            if token < 0 or not -100 <= value <= 100:
                received = f"logit_bias[{shorten(token)}]={value!r}"
                self._refuse("logit_bias", f"{received} must map a token id to a value from -100 to 100")
        return parsed

    @staticmethod
    def _refuse(name: str, message: str) -> NoReturn:
        raise RequestError(message, name) from None


@cache
def _numeric_fields(kind: type[SamplingParams]) -> dict[str, tuple[tuple[type, ...], Bounds]]:
    """Return the types and bounds of each field that has bounds."""
    hints = get_type_hints(kind, include_extras=True)
    annotated = {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Annotated}
    return {name: (get_args(number) or (number,), bounds) for name, (number, bounds) in annotated.items()}


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
