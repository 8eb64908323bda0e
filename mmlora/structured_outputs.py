"""Structured outputs: completions that follow a JSON schema, a regular expression, a choice or a grammar.

`StructuredOutputsParams` is the constraint of a request. `ConstraintCompiler` compiles it with llguidance, outside the
engine thread, to a `Matcher`, which is copied for each completion. The sampler masks the tokens that a matcher does not
allow.
"""

import json
import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, NoReturn
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from mmlora.errors import ConstraintError
from mmlora.utils.text import is_finite_number, shorten

logger = logging.getLogger(__name__)

MAX_CONSTRAINT_CHARS = 131_072  # of a schema, an expression, a grammar, or all choices together
MAX_DEPTH = 64  # of a schema
# llguidance follows references recursively. A stack overflow would end the process; it happens at more than three times
# these limits.
MAX_REF_DEPTH = 1000  # levels of a schema and of everything it refers to, added up
MAX_COLONS = 1000  # in a grammar, whose rules have one or two each
MAX_MULTIPLE = 20_000  # number of states of the automaton for "multipleOf"
MAX_INDEX_DIGITS = 9  # of an index in a reference
MAX_LEXER_STATES = 50_000  # per matcher, about 2 kB each
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
# Without a limit, a model may repeat line breaks until max_tokens.
JSON_OPTIONS: Any = {"whitespace_pattern": r"[ \t\n\r]{1,40}"}


@dataclass(frozen=True)
class ReasoningMarks:
    """Markers of the reasoning at the start of an output.

    Attributes:
        start, end: text or special tokens.
        starts_open: outputs may begin inside the reasoning, without the first marker.
    """

    start: str
    end: str
    starts_open: bool = False

    def is_open(self, prompt: str) -> bool:
        """Return whether an output of this prompt begins inside the reasoning."""
        return prompt.rstrip().endswith(self.start) or (self.starts_open and not self.is_closed(prompt))

    def is_closed(self, prompt: str) -> bool:
        """Return whether this prompt ends after the reasoning, so that its outputs should have none."""
        return prompt.rstrip().endswith(self.end)


@dataclass(frozen=True)
class StructuredOutputsParams:
    """Constraint on a completion; exactly one of the first five fields is set.

    Args:
        json: a JSON schema, as JSON text or parsed.
        regex: a regular expression that matches the whole completion, without look-around and back-references.
        choice: texts, one of which is the completion.
        grammar: in Lark's syntax or in GBNF (`root ::= …`).
        json_object: True for any JSON object.
        parts: constraints that `grammar`, in Lark's syntax, refers to as `@name`.
        reasoning: markers of the reasoning; the constraint applies after it.
        name: the request field, for errors.

    Raises:
        ConstraintError: none or several are set, or one has the wrong type or is too large.
    """

    json: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    parts: Mapping[str, "StructuredOutputsParams"] | None = None
    reasoning: ReasoningMarks | None = None
    name: str = "structured_outputs"

    def __post_init__(self) -> None:
        given = self._given()
        if len(given) != 1:
            received = " and ".join(given) or "none"
            self.refuse(f"exactly one of {', '.join(CONSTRAINT_FIELDS)} must be given; received {received}")
        for name in ("regex", "grammar"):
            if not isinstance(getattr(self, name), str | None):
                self.refuse(f"{name} is a {type(getattr(self, name)).__name__}; it must be text")
        if not isinstance(self.json, str | Mapping | bool | None):
            self.refuse(f"json is a {type(self.json).__name__}; it must be a JSON schema")
        choice = self.choice
        if choice is not None and not (_is_list(choice) and choice and all(isinstance(c, str) and c for c in choice)):
            self.refuse("choice must be a list of at least one text, none of them empty")
        size = sum(len(part) for part in (self.regex, self.grammar, *(choice or ())) if part is not None)
        if size > MAX_CONSTRAINT_CHARS:
            self.refuse(f"{given[0]} has {size} characters; the limit is {MAX_CONSTRAINT_CHARS}")

    def _given(self) -> list[str]:
        values = {name: getattr(self, name) for name in CONSTRAINT_FIELDS}
        return [name for name, value in values.items() if value is not None and (name, value) != ("json_object", False)]

    def refuse(self, reason: str) -> NoReturn:
        """Raise the error that names the field.

        Raises:
            ConstraintError: always.
        """
        raise ConstraintError(f"{self.name}: {reason}", self.name)


CONSTRAINT_FIELDS = ("json", "regex", "choice", "grammar", "json_object")


class Matcher:
    """State of a constraint in one completion: which tokens may come next.

    Attributes:
        is_complete: only end-of-text can follow.
        error: why matching failed, for example because the constraint is too complex; None without a failure.

    Args:
        matcher: llguidance's matcher at the start of a completion.
        stop_ids: end-of-text tokens.
    """

    def __init__(self, matcher: Any, stop_ids: Collection[int]) -> None:
        self._matcher = matcher
        self.error: str | None = None
        is_end = np.zeros(8 * len(matcher.compute_bitmask()), np.bool_)  # one bit per token, padded
        is_end[list(stop_ids)] = True
        self._end_mask = np.packbits(is_end, bitorder="little")
        self._look_ahead()

    def copy(self) -> "Matcher":
        """Return an independent copy in the same state."""
        other = copy(self)
        other._matcher = self._matcher.deep_copy()
        return other

    def advance(self, token_id: int) -> None:
        """Consume the next token of the output, which `allowed` permitted; updates `is_complete` and `error`."""
        try:
            self._matcher.consume_token(token_id)
            self._look_ahead()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of Rust code is not an Exception and would end the engine
            logger.exception("a constraint failed")
            self.error = type(error).__name__

    def allowed(self, vocab_size: int, *, can_end: bool) -> NDArray[np.bool_]:
        """Return which tokens may come next.

        Args:
            vocab_size: rows of logits; tokens beyond the tokenizer's vocabulary are not allowed.
            can_end: allow end-of-text tokens where the completion may end.

        Returns:
            `[vocab_size]` bool.
        """
        mask = self._mask if can_end else self._mask & ~self._end_mask
        return np.unpackbits(mask, count=vocab_size, bitorder="little").view(np.bool_)

    def _look_ahead(self) -> None:
        self._mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self.error = _reason(self._matcher) if self._matcher.is_error() else None
        can_go_on = bool((self._mask & ~self._end_mask).any())
        self.is_complete = self.error is None and not can_go_on and self._matcher.is_accepting()
        if self.error is None and not can_go_on and not self.is_complete:
            self.error = "no token of the vocabulary is allowed here"


class ConstraintCompiler:
    """Compiles constraints for one tokenizer. Thread-safe.

    Args:
        tokenizer: of the model.
        stop_ids: end-of-text tokens.
    """

    def __init__(self, tokenizer: Any, stop_ids: frozenset[int]) -> None:
        self._hf_tokenizer = tokenizer
        self._stop_ids = stop_ids

    def compile(self, params: StructuredOutputsParams, prompt: str = "") -> Matcher:
        """Compile a constraint; usually takes milliseconds, up to seconds for the largest allowed ones.

        Args:
            params: the constraint.
            prompt: the prompt's text, which may end inside the reasoning.

        Raises:
            ConstraintError: it is malformed, too complex, unsatisfiable, or allows only an empty completion.
        """
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError:
            params.refuse("the package llguidance is not installed")
        try:
            tokenizer = self._tokenizer
        except (ValueError, TypeError) as error:
            params.refuse(f"constraints cannot read the tokenizer of this model: {error}")
        limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        grammars = _grammars(params)
        if params.reasoning is not None and not params.reasoning.is_closed(prompt):
            grammars[0]["name"] = "output"
            is_open = params.reasoning.is_open(prompt)
            grammars.insert(0, {"lark_grammar": _after_reasoning(params.reasoning, is_open, self._added_tokens)})
        matcher = LLMatcher(tokenizer, json.dumps({"grammars": grammars}), log_level=0, limits=limits)
        if matcher.is_error():
            params.refuse(_reason(matcher))
        start = Matcher(matcher, self._stop_ids)
        if start.error is not None or start.is_complete:
            params.refuse(start.error or "only an empty completion is allowed")
        return start

    @cached_property
    def _added_tokens(self) -> dict[str, tuple[int, bool]]:
        return added_tokens(self._hf_tokenizer)

    @cached_property
    def _tokenizer(self) -> Any:
        """llguidance's tokenizer, created on first use."""
        from llguidance.hf import from_tokenizer

        return from_tokenizer(self._hf_tokenizer, eos_token=sorted(self._stop_ids))


def added_tokens(tokenizer: Any) -> dict[str, tuple[int, bool]]:
    """Return the id of each added token of a tokenizer by its text, and whether it is special."""
    found = getattr(tokenizer, "added_tokens_decoder", {})
    return {added.content: (token, bool(added.special)) for token, added in found.items()}


def token_or_text(added: Mapping[str, tuple[int, bool]], text: str) -> str:
    """Return the Lark expression of a marker, which may be an added token: a literal would not match that.

    Args:
        added: see `added_tokens`.
        text: the marker.
    """
    return f"({json.dumps(text)} | <[{added[text][0]}]>)" if text in added else json.dumps(text)


def _after_reasoning(marks: ReasoningMarks, is_open: bool, added: Mapping[str, tuple[int, bool]]) -> str:
    """Return the grammar of reasoning, which is optional unless it is open, and then `@output`."""
    end, rules = added.get(marks.end), [r"BLANKS: /[ \t\r\n]{1,40}/"]
    if end is None:
        thought = "thought"
        rules.append(f"thought[suffix={json.dumps(marks.end)}]: /(?s:.*)/")
    else:
        # Text in a grammar does not match added tokens, of which only the special ones are no text.
        others = ",".join(str(token) for token, is_special in added.values() if not is_special and token != end[0])
        thought = f"(/(?s:.+)/{f' | <[{others}]>' if others else ''})* <[{end[0]}]>"
    start = token_or_text(added, marks.start)
    thinking = f"{start}? BLANKS? {thought} BLANKS?" if is_open else f"({start} {thought} BLANKS?)?"
    return "\n".join([f"start: {thinking} @output", *rules])


def _grammars(params: StructuredOutputsParams) -> list[dict[str, Any]]:
    """Return a constraint and its parts as grammars of llguidance; the first is where the output starts."""
    parts = params.parts or {}
    return [_grammar(params), *({**_grammar(part), "name": name} for name, part in parts.items())]


def _grammar(params: StructuredOutputsParams) -> dict[str, Any]:
    """Return a constraint without its parts as a grammar of llguidance."""
    from llguidance import LLMatcher, grammar_from, regex_to_lark

    if params.regex is not None:
        # As in JSON schemas, \d is 0 to 9 and not the digits of all scripts.
        return {"lark_grammar": f"start: /{regex_to_lark(params.regex, use_ascii='d')}/"}
    if params.choice is not None:
        # A single terminal: the parser fails with more than 2,000 alternatives of a rule.
        return {"lark_grammar": "start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, params.choice))}
    if params.parts is not None:
        return {"lark_grammar": params.grammar}
    if params.grammar is not None:
        if "%json" in params.grammar:
            params.refuse("grammar contains %json; use the json field for a JSON schema")
        num_colons = params.grammar.count(":")
        if num_colons > MAX_COLONS:
            params.refuse(f"grammar has {num_colons} colons, one or two for each rule; the limit is {MAX_COLONS}")
        try:
            return {"lark_grammar": str(grammar_from("grammar", params.grammar))}
        except (ValueError, RecursionError) as error:
            params.refuse(shorten(str(error), str, 400))
    schema = _checked_schema(params, ANY_OBJECT if params.json is None else params.json)
    grammar = json.loads(LLMatcher.grammar_from_json_schema(schema, defaults=JSON_OPTIONS))["grammars"][0]
    return {"json_schema": grammar["json_schema"]}


def _reason(matcher: Any) -> str:
    """Return why a matcher of llguidance failed."""
    text = str(matcher.get_error()).partition("<non-verbose/>")[0].strip()
    return "it allows no text at all" if text.startswith("NoExtension") else shorten(text, str, 400)


def _checked_schema(params: StructuredOutputsParams, schema: Any) -> str:
    """Return a schema as text after checking the limits that bound the time and stack of the compiler."""
    try:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        schema = {} if schema is True else schema
        text = json.dumps(schema, allow_nan=False)
    except RecursionError:
        _refuse_nesting(params)
    except (TypeError, ValueError) as error:
        params.refuse(f"the JSON schema is not valid JSON: {str(error).partition('; use sys.')[0]}")
    if not isinstance(schema, Mapping):
        params.refuse(f"the JSON schema is {shorten(text, str)}; it must be an object, or true")
    if len(text) > MAX_CONSTRAINT_CHARS:
        params.refuse(f"the JSON schema has {len(text)} characters; the limit is {MAX_CONSTRAINT_CHARS}")
    try:
        _check_multiples(params, schema)
        depth = _ref_depth(schema)
    except RecursionError:
        _refuse_nesting(params)
    if depth > MAX_REF_DEPTH:
        params.refuse(f"the JSON schema and its references have {depth} levels in all; the limit is {MAX_REF_DEPTH}")
    return text


def _refuse_nesting(params: StructuredOutputsParams) -> NoReturn:
    params.refuse(f"the JSON schema is nested too deeply; the limit is {MAX_DEPTH} levels")


def _check_multiples(params: StructuredOutputsParams, schema: Mapping[str, Any]) -> None:
    """Limit the least common multiple of all values of `multipleOf`.

    Raises:
        ConstraintError: it is too large.
        RecursionError: the schema is nested too deeply.
    """
    multiple = 1
    for value in _values(schema, "multipleOf", 0):
        if is_finite_number(value):
            multiple = math.lcm(multiple, Fraction(str(value)).numerator)
        if multiple > MAX_MULTIPLE:  # now: further values would make it huge
            received = f"the least common multiple of all values of multipleOf, such as {shorten(value)}"
            params.refuse(f"{received}, exceeds the limit of {MAX_MULTIPLE}")


def _ref_depth(schema: Mapping[str, Any]) -> int:
    """Return the depths of a schema and of each target of a reference, added up: an upper bound of any path."""
    refs = {ref for ref in _values(schema, "$ref", 0) if isinstance(ref, str)}
    targets = (find_target(schema, ref) for ref in refs)
    depths: dict[int, int] = {}
    depth = _find_depths(schema, depths)
    return depth + sum(depth if target is None else depths[id(target)] for target in targets)


def _find_depths(node: Any, depths: dict[int, int]) -> int:
    """Return the depth of a node, and add it and those of all nodes in it to `depths`, by `id`."""
    children = node.values() if isinstance(node, Mapping) else node if _is_list(node) else ()
    depths[id(node)] = depth = 1 + max((_find_depths(child, depths) for child in children), default=0)
    return depth


def find_target(schema: Any, ref: str) -> Any | None:
    """Return the target of a local reference in a JSON schema (`#` and a JSON pointer); None if there is none."""
    if not ref.startswith("#"):
        return None
    node = schema
    for key in ref.split("/")[1:]:
        key = unquote(key).replace("~1", "/").replace("~0", "~")
        if isinstance(node, Mapping) and key in node:
            node = node[key]
        elif _is_list(node) and key.isdecimal() and len(key) <= MAX_INDEX_DIGITS and int(key) < len(node):
            node = node[int(key)]
        else:
            return None
    return node


def _values(node: Any, key: str, depth: int) -> Iterator[Any]:
    """Yield the values of a key at every depth.

    Raises:
        RecursionError: the depth exceeds `MAX_DEPTH`.
    """
    if depth > MAX_DEPTH:
        raise RecursionError
    for child in node.values() if isinstance(node, Mapping) else node if _is_list(node) else ():
        yield from _values(child, key, depth + 1)
    if isinstance(node, Mapping) and key in node:
        yield node[key]


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)
