"""`SamplingParams`: how one request's tokens are chosen, validated when it is made."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from mmlora.errors import RequestError
from mmlora.structured_outputs import StructuredOutputsParams
from mmlora.utils.text import is_finite_number, shorten

MAX_STOPS, MAX_STOP_CHARS = 64, 1024  # each token of the answer is searched for all of them
MAX_STOP_TOKENS = 1024  # each token of the answer is compared with all of them


@dataclass
class SamplingParams:
    """Sampling options of one request; names and meanings follow the OpenAI API and vLLM.

    Args:
        n: number of answers.
        temperature: 0 is greedy.
        top_p: keep the smallest set of tokens whose probability reaches it.
        top_k: keep the k likeliest tokens; 0 or -1 keeps all.
        min_p: drop tokens below this fraction of the likeliest token's probability.
        seed: makes the request repeatable; answer i of n uses `seed + i`.
        presence_penalty: subtracted once from tokens already generated.
        frequency_penalty: subtracted per occurrence among generated tokens.
        repetition_penalty: divides (or multiplies, below 0) the logits of tokens in prompt or answer.
        logit_bias: token id to a value added to its logit, -100 to 100.
        stop: strings that end the answer; they are cut off unless `include_stop_str_in_output`.
        stop_token_ids: tokens that end the answer; their text is left out unless `include_stop_str_in_output`.
        max_tokens: longest answer; None runs to the model's length limit.
        min_tokens: no end-of-text and no stop token before this many.
        ignore_eos: do not end at end-of-text.
        logprobs: report the k likeliest tokens at each step; -1 for the whole vocabulary.
        prompt_logprobs: the same for the prompt's tokens.
        skip_special_tokens: leave special tokens out of the text.
        structured_outputs: what the answer must look like.

    Raises:
        RequestError: a value is out of range; the message names it and what is allowed.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        self._check_integers()
        self._check_numbers()
        self._check_stops()
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            kind = type(self.structured_outputs).__name__
            raise RequestError(f"structured_outputs is a {kind}; it must be a StructuredOutputsParams or None")
        if self.logit_bias is not None:
            self.logit_bias = self._parse_logit_bias(self.logit_bias)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < 1e-5

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on the tokens so far."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def _check_integers(self) -> None:
        self._integer("n", 1, 128)
        self._integer("top_k", -1)
        self._integer("min_tokens", 0)
        for name, low in (("max_tokens", 1), ("logprobs", -1), ("prompt_logprobs", -1)):
            if getattr(self, name) is not None:
                self._integer(name, low)
        if self.seed is not None:
            self._integer("seed", -(2**63), 2**63 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            shown = shorten(self.min_tokens)
            raise RequestError(f"min_tokens={shown} must not exceed max_tokens={shorten(self.max_tokens)}")

    def _check_numbers(self) -> None:
        self._number("temperature", 0.0, 100.0)
        self._number("top_p", 0.0, 1.0, open_low=True)
        self._number("min_p", 0.0, 1.0)
        self._number("presence_penalty", -2.0, 2.0)
        self._number("frequency_penalty", -2.0, 2.0)
        self._number("repetition_penalty", 0.0, 100.0, open_low=True)

    def _check_stops(self) -> None:
        if not isinstance(self.stop, str | None) and (
            not isinstance(self.stop, Sequence) or not all(isinstance(s, str) for s in self.stop)
        ):
            raise RequestError(f"stop={shorten(self.stop)} must be a string or a list of strings")
        if any(not s for s in self.stop_strings):
            raise RequestError("stop holds an empty string; every stop string needs at least one character")
        if len(self.stop_strings) > MAX_STOPS or any(len(s) > MAX_STOP_CHARS for s in self.stop_strings):
            raise RequestError(
                f"stop holds {len(self.stop_strings)} strings of up to {max(map(len, self.stop_strings))} characters; "
                f"allowed are {MAX_STOPS} of up to {MAX_STOP_CHARS}"
            )
        ids = self.stop_token_ids
        if isinstance(ids, Collection) and len(ids) > MAX_STOP_TOKENS:
            raise RequestError(f"stop_token_ids holds {len(ids)} tokens; allowed are {MAX_STOP_TOKENS}")
        if ids is not None and not (isinstance(ids, Collection) and all(_is_token_id(i) for i in ids)):
            raise RequestError(f"stop_token_ids={shorten(ids)} must be a list of token ids")

    def _integer(self, name: str, low: int, high: int | None = None) -> None:
        value = getattr(self, name)
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
            raise RequestError(f"{name}={shorten(value)} must be an integer, {allowed}")

    def _number(self, name: str, low: float, high: float, *, open_low: bool = False) -> None:
        value = getattr(self, name)
        if not is_finite_number(value) or value > high or value < low or (open_low and value == low):
            allowed = f"above {low} and at most {high}" if open_low else f"from {low} to {high}"
            raise RequestError(f"{name}={shorten(value)} must be a number {allowed}")

    @staticmethod
    def _parse_logit_bias(bias: Mapping[int, float]) -> dict[int, float]:
        try:
            parsed = {int(token): float(value) for token, value in bias.items()}
        except (AttributeError, TypeError, ValueError, OverflowError):
            raise RequestError(f"logit_bias={shorten(bias)} must map token ids to numbers") from None
        for token, value in parsed.items():
            if token < 0 or not -100 <= value <= 100:
                raise RequestError(
                    f"logit_bias[{shorten(token)}]={value!r} must map a token id to a value from -100 to 100"
                )
        return parsed


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
