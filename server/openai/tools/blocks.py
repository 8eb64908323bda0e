"""Blocks of generated text that may be tool calls, in JSON or XML: find the end of a block and read its calls."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

from mmlora.structured_outputs import find_target

MAX_HEAD = 256  # characters between a marker and the start of a call
MAX_SCHEMA_PARTS = 64  # alternatives and references examined in one schema
_KINDS = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
Tools = Mapping[str, Mapping[str, Any]]  # OpenAI's, by name
Call = tuple[str, str]  # name, and arguments as JSON


class Block(ABC):
    """A possible call in a growing text that begins at its marker.

    Attributes:
        head: length of the marker.
        end: end of the calls; None while unknown.
        is_broken: there is no call here.
    """

    def __init__(self, head: int) -> None:
        self.head = head
        self.end: int | None = None
        self.is_broken = False
        self._start: int | None = None  # of the JSON, or of the function's name
        self._position = 0  # the text before it was scanned

    def scan(self, text: str) -> None:
        """Continue scanning `text`, which has grown since the last call."""
        if self._start is None:
            self._find_start(text)
        if self._start is not None and self.end is None:
            self._position = max(self._position, self._start)
            self._find_end(text)

    @abstractmethod
    def calls(self, text: str, tools: Tools) -> list[Call]:
        """Read the calls.

        Raises:
            ValueError, RecursionError: the block has anything but calls of offered tools.
        """

    @abstractmethod
    def _find_start(self, text: str) -> None:
        """Set `_start` as soon as it is known, or `is_broken`."""

    @abstractmethod
    def _find_end(self, text: str) -> None:
        """Set `end` if the text has it, and otherwise `_position`."""


class JSONBlock(Block):
    """One call or a list of calls in JSON. Newer Mistral models write the tool's name before the arguments."""

    _HEAD = re.compile(r"\s*(?:([\w./-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*)?")
    _MARK = re.compile(r'\\.|["\[\]{}]', re.DOTALL)

    def __init__(self, head: int) -> None:
        super().__init__(head)
        self._name: str | None = None  # of the tool, if it precedes the JSON
        self._depth = 0
        self._in_string = False

    def calls(self, text: str, tools: Tools) -> list[Call]:
        """See `Block.calls`."""
        value = json.loads(text[self._start : self.end], parse_constant=_refuse_constant)
        if self._name is not None:
            value = {"name": self._name, "arguments": value}
        return [_call(entry, tools) for entry in (value if isinstance(value, list) else [value])]

    def _find_start(self, text: str) -> None:
        head = self._HEAD.match(text, self.head)
        assert head is not None  # it may be empty
        name, rest = head[1], text[head.end() :]
        if rest == "" or (name is not None and any(mark.startswith(rest) for mark in ("[CALL_ID]", "[ARGS]"))):
            self.is_broken = len(text) > self.head + MAX_HEAD
            return
        self._name, self._start = name, head.end()
        is_far = self._start > self.head + MAX_HEAD
        self.is_broken = is_far or rest[0] not in ("[{" if name is None else "{")

    def _find_end(self, text: str) -> None:
        last = self._position
        for match in self._MARK.finditer(text, self._position):
            last = match.end()
            if match[0] == '"':
                self._in_string = not self._in_string
            elif not self._in_string and match[0] in "[{":
                self._depth += 1
            elif not self._in_string and match[0] in "]}":
                self._depth -= 1
                if self._depth == 0:
                    self.end = last
                    return
        # A backslash escapes the next character, which may not have arrived yet.
        self._position = max(last, len(text) - text.endswith("\\"))


class XMLBlock(Block):
    """A call as Qwen3-Coder writes it: `<function=name>`, each `<parameter=name>` with its value, `</function>`."""

    _START, _END = "<function=", "</function>"
    _PARAMETER = re.compile(r"\s*<parameter=([^<>\n]+)>(?:\r?\n)?")
    _MARK = re.compile(r"(?:\r?\n)?</parameter>|<parameter=")

    def calls(self, text: str, tools: Tools) -> list[Call]:
        """Read the call. Values are JSON if the tool's schema says so, and strings otherwise."""
        assert self.end is not None
        name, mark, rest = text[self._start : self.end - len(self._END)].partition(">")
        name = name.strip()
        if not mark or name not in tools:
            raise ValueError("no call of an offered tool")
        parameters = tools[name]["function"].get("parameters") or {}
        properties = parameters.get("properties")
        schemas = properties if isinstance(properties, Mapping) else {}
        arguments, position, length = {}, 0, len(rest.rstrip())
        while position < length:
            head = self._PARAMETER.match(rest, position)
            if head is None:
                raise ValueError("no parameter")
            value, position = self._read_value(rest, head.end())
            arguments[head[1]] = _value(value, kinds_of(schemas.get(head[1]), parameters))
        return [(name, _dump(arguments))]

    def _read_value(self, text: str, start: int) -> tuple[str, int]:
        """Return a value and where it ends: at its closing tag or, without one, at the next parameter or the end."""
        mark = self._MARK.search(text, start)
        if mark is None:
            return text[start:].rstrip(), len(text)
        if mark[0] == "<parameter=":
            return text[start : mark.start()].rstrip(), mark.start()
        return text[start : mark.start()], mark.end()

    def _find_start(self, text: str) -> None:
        """Find the function's name; `<function=` may itself be the marker."""
        rest = text if text.startswith(self._START) else text[self.head :].lstrip()
        if rest.startswith(self._START):
            self._start = len(text) - len(rest) + len(self._START)
            self.is_broken = self._start > self.head + MAX_HEAD
        else:
            self.is_broken = not self._START.startswith(rest) or len(text) > self.head + MAX_HEAD

    def _find_end(self, text: str) -> None:
        found = text.find(self._END, self._position)
        self._position = len(text) - len(self._END)
        if found >= 0:
            self.end = found + len(self._END)


def _value(text: str, kinds: Collection[str]) -> Any:
    """Return a parameter's value with a type that its schema allows, or else as a string."""
    if "string" in kinds:
        return None if text == "null" and "null" in kinds else text
    if "boolean" in kinds and text.lower() in ("true", "false"):  # also Python's spelling
        return text.lower() == "true"
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        _dump(value)
    except (ValueError, RecursionError):
        return text
    kind = kind_of(value)
    return value if kind in kinds or (kind == "integer" and "number" in kinds) else text


def _call(entry: Any, tools: Tools) -> Call:
    """Read one call in JSON.

    Raises:
        ValueError: it is not a call of an offered tool.
    """
    entry = entry.get("function", entry) if isinstance(entry, dict) else {}
    entry = entry if isinstance(entry, dict) else {"name": entry}
    name, arguments = entry.get("name"), entry.get("arguments", entry.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments, parse_constant=_refuse_constant)
    if not isinstance(name, str) or name not in tools or not isinstance(arguments, dict):
        raise ValueError("no call of an offered tool")
    return name, _dump(arguments)


def _dump(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    text.encode()  # raises for a lone surrogate
    return text


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def kind_of(value: Any) -> str:
    """Return the JSON schema type of a JSON value."""
    return _KINDS.get(type(value), "null")


def kinds_of(schema: Any, root: Mapping[str, Any]) -> frozenset[str]:
    """Return the JSON types that a schema allows; empty if it does not restrict them.

    Args:
        schema: schema of a value; anything else counts as unrestricted.
        root: schema to which local references (`#/…`) are relative.
    """
    found: set[str] = set()
    parts = [schema]  # the schema, its alternatives and their references, each once
    for part in parts:
        if not isinstance(part, Mapping):
            continue
        more: list[Any] = []
        if (named := part.get("type")) is not None:
            names = named[:MAX_SCHEMA_PARTS] if isinstance(named, list) else [named]
            found.update(kind for kind in names if isinstance(kind, str))
        elif "const" in part:
            found.add(kind_of(part["const"]))
        elif isinstance(part.get("enum"), list):
            found.update(map(kind_of, part["enum"]))
        else:
            more = [one for key in ("anyOf", "oneOf", "allOf") for one in _list(part.get(key))[:MAX_SCHEMA_PARTS]]
            more += [find_target(root, part["$ref"])] if isinstance(part.get("$ref"), str) else []
        known = {id(one) for one in parts}
        parts += [one for one in more if id(one) not in known][: MAX_SCHEMA_PARTS - len(parts)]
    return frozenset(found)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
