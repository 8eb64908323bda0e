"""The constraint of an output that is either tool calls in the model's own format or an answer in a given form."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mmlora.errors import ConstraintError
from mmlora.server.openai.tools.blocks import kinds_of
from mmlora.server.openai.tools.formats import ToolCallFormat
from mmlora.structured_outputs import ANY_OBJECT, MAX_CONSTRAINT_CHARS, StructuredOutputsParams, find_target

Tool = Mapping[str, Any]  # OpenAI's
MAX_REFS = 8  # from reference to reference
BLANKS = r"BLANKS: /[ \t\r\n]{1,40}/"
TEXT = 'text[suffix="</parameter>"]: /(?s:.*)/'


def calls_or_answer(
    format: ToolCallFormat,
    tools: Mapping[str, Tool],
    answer: StructuredOutputsParams,
    mark: Callable[[str], str],
    *,
    is_parallel: bool,
) -> StructuredOutputsParams:
    """Return the constraint of calls of these tools, or an answer.

    Args:
        format: how the model writes calls.
        tools: the tools that may be called, by name; at least one.
        answer: the constraint of the answer.
        mark: returns the Lark expression of a marker.
        is_parallel: several calls are allowed.

    Raises:
        ConstraintError: the schemas of the tools are too large.
    """
    rules = _Rules(format, tools, mark, is_parallel)
    separator = "".join(f'"{char}" ' for char in format.separators) + "BLANKS?"
    calls = f"call ({separator} call)*" if is_parallel else "call"
    lines = ["start: @answer | calls", f"calls: {calls}", f"call: {rules.call()}", BLANKS]
    parts = {"answer": answer, **rules.parts}
    return StructuredOutputsParams(grammar="\n".join([*lines, *rules.lines]), parts=parts, name=answer.name)


def call_schema(name: str, tool: Tool, index: int, key: str = "arguments") -> dict[str, Any]:
    """Return the JSON schema of a call; the `$id` keeps local references of the tool's schema valid."""
    return {
        "type": "object",
        "properties": {"name": {"const": name}, key: {**parameters_of(tool), "$id": f"tool:///{index}"}},
        "required": ["name", key],
        "additionalProperties": False,
    }


def call_list(tools: Mapping[str, Tool], *, is_parallel: bool) -> StructuredOutputsParams:
    """Return the constraint of a list of calls in JSON."""
    calls = [call_schema(name, tool, index) for index, (name, tool) in enumerate(tools.items())]
    limit = {} if is_parallel else {"maxItems": 1}
    schema = {"type": "array", "items": {"anyOf": calls}, "minItems": 1, **limit}
    return StructuredOutputsParams(json=lenient(schema, *tools.values()), name="tools")


def parameters_of(tool: Tool) -> Mapping[str, Any]:
    """Return the JSON schema of a tool's arguments, which are always an object."""
    return {**ANY_OBJECT, **(tool["function"].get("parameters") or {})}


def lenient(schema: Mapping[str, Any], *tools: Tool) -> Mapping[str, Any]:
    """Mark a schema so that unsupported keywords are ignored, unless all tools are strict."""
    is_strict = all(tool["function"].get("strict") is True for tool in tools)
    return {**schema, "x-guidance": {"lenient": not is_strict}}


class _Rules:
    """Lark rules of a call.

    Attributes:
        lines: further rules that the call refers to.
        parts: JSON schemas that it refers to.
    """

    def __init__(
        self, format: ToolCallFormat, tools: Mapping[str, Tool], mark: Callable[[str], str], is_parallel: bool
    ) -> None:
        self.lines: list[str] = []
        self.parts: dict[str, StructuredOutputsParams] = {}
        self._format = format
        self._tools = tools
        self._is_parallel = is_parallel
        self._start = f"({' | '.join(map(mark, format.starts))}) BLANKS?"
        self._end = f"BLANKS? {mark(format.ends[0])}" if format.ends else ""
        self._mark = mark
        self._num_chars = 0  # of rules and parts

    def call(self) -> str:
        """Return the expression of one call or, where calls are a list, of all."""
        return {"object": self._object, "list": self._list, "named": self._named, "xml": self._xml}[
            self._format.syntax
        ]()

    def _object(self) -> str:
        schemas = [
            (tool, call_schema(name, tool, index, self._format.arguments_key))
            for index, (name, tool) in enumerate(self._tools.items())
        ]
        calls = " | ".join(self._part(lenient(schema, tool)) for tool, schema in schemas)
        start = f"({self._start})?" if self._format.bare else self._start
        return f"{start} ({calls}) {self._end}"

    def _list(self) -> str:
        self.parts["calls"] = call_list(self._tools, is_parallel=self._is_parallel)
        end = f"({self._end})?" if self._end else ""
        return f"{self._start} @calls {end}"

    def _named(self) -> str:
        """Mistral's older models write a list, newer ones the name before the arguments."""
        arguments_mark = self._mark("[ARGS]")
        calls = [
            f"{json.dumps(name)} {arguments_mark}? BLANKS? {self._part(lenient(parameters_of(tool), tool))}"
            for name, tool in self._tools.items()
        ]
        return f"{self._start} ({' | '.join(calls)}) | {self._list()}"

    def _xml(self) -> str:
        self.lines.append(TEXT)
        calls = " | ".join(
            f'{json.dumps(f"<function={name}>")} BLANKS? {" ".join(self._parameters(tool))} "</function>"'
            for name, tool in self._tools.items()
        )
        start = f"{self._mark(self._format.starts[0])} BLANKS?"
        return f"{start} ({calls}) {self._end}"

    def _parameters(self, tool: Tool) -> Iterator[str]:
        """Yield the expression of each parameter, in the order of the schema."""
        schema = parameters_of(tool)
        properties, required = schema.get("properties"), schema.get("required")
        names = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
        if not isinstance(properties, Mapping):
            if schema.get("additionalProperties") is not False:
                yield '("<parameter=" /[^<>\\n]{1,64}/ ">\\n" text BLANKS?)*'
            return
        for name, value in properties.items():
            parameter = f"{json.dumps(f'<parameter={name}>')} {self._value(value, schema, tool)} BLANKS?"
            self._count(parameter)
            yield parameter if name in names else f"({parameter})?"

    def _value(self, schema: Any, root: Mapping[str, Any], tool: Tool) -> str:
        """Return the expression of a value with its closing tag: text, one of several texts, or JSON."""
        kinds = kinds_of(schema, root)
        for _ in range(MAX_REFS):
            if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
                break
            target = find_target(root, schema["$ref"])
            if not isinstance(target, Mapping):
                break
            schema = target
        options = schema.get("enum", [schema["const"]] if "const" in schema else None) if kinds else None
        if "string" in kinds and isinstance(options, list):
            texts = [json.dumps(option if isinstance(option, str) else json.dumps(option)) for option in options]
            return f'"\\n" ({" | ".join(texts)}) "\\n</parameter>"'
        if not kinds or "string" in kinds:
            return '"\\n" text'
        definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
        return f'"\\n" {self._part(lenient({**definitions, **schema}, tool))} "\\n"? "</parameter>"'

    def _part(self, schema: Mapping[str, Any]) -> str:
        self._count(json.dumps(schema))
        name = f"part{len(self.parts)}"
        self.parts[name] = StructuredOutputsParams(json=schema, name="tools")
        return f"@{name}"

    def _count(self, text: str) -> None:
        """Refuse the tools as soon as they are too large: references let many parameters repeat one large schema."""
        self._num_chars += len(text)
        if self._num_chars > MAX_CONSTRAINT_CHARS:
            message = f"tools: their JSON schemas need a grammar of more than {MAX_CONSTRAINT_CHARS} characters"
            raise ConstraintError(message, "tools")
