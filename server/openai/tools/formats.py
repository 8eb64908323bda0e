"""`ToolCallFormat`: the tool call formats of model families, as listed by `--tool-call-parser`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ToolCallFormat:
    """Tool call format of a model family: markers around JSON (one call or a list of calls) or XML.

    Attributes:
        name: vLLM's name of the parser.
        starts: markers before calls.
        ends: optional markers after calls.
        bare: brackets that start calls without a marker, at the start of the output or after another call.
        inner: markers inside calls.
        separators: characters between calls.
        hints: a chat template of the family contains at least one of these strings.
        needs: it contains all of these strings.
        has_short_ids: its templates require call ids of nine letters and digits.
        syntax: what a start marker precedes: `object` (one call in JSON), `list` (a list of calls), `named` (the name
            and then the arguments, or a list) or `xml` (`<function=name>` with a `<parameter=name>` for each argument).
        arguments_key: field of the arguments in calls in JSON.
    """

    name: str
    starts: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    bare: str = ""
    separators: str = ""
    hints: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    has_short_ids: bool = False
    syntax: str = "object"
    arguments_key: str = "arguments"

    @property
    def is_xml(self) -> bool:
        """Whether calls are written in XML."""
        return self.syntax == "xml"

    @property
    def marks(self) -> tuple[str, ...]:
        """All markers."""
        return (*self.starts, *self.ends, *self.inner)


FORMATS = (
    ToolCallFormat(
        "mistral",
        ("[TOOL_CALLS]",),
        inner=("[CALL_ID]", "[ARGS]"),
        hints=("[TOOL_CALLS]",),
        has_short_ids=True,
        syntax="named",
    ),
    ToolCallFormat(
        "phi4_mini_json",
        ("<|tool_call|>", "functools"),
        ("<|/tool_call|>",),
        hints=("<|/tool|>", "<|/tool_call|>"),
        syntax="list",
    ),
    ToolCallFormat(
        "granite",
        ("<|tool_call|>", "<tool_call>"),
        ("</tool_call>",),
        hints=("<|tool_call|>",),
        syntax="list",
    ),
    ToolCallFormat(
        "qwen3_coder",
        ("<tool_call>", "<function="),
        ("</tool_call>",),
        hints=("<tool_call>",),
        needs=("<function=", "<parameter="),
        syntax="xml",
    ),
    ToolCallFormat("hermes", ("<tool_call>",), ("</tool_call>",), hints=("<tool_call>",)),
    ToolCallFormat(
        "llama3_json",
        ("<|python_tag|>",),
        bare="{",
        separators=";",
        arguments_key="parameters",
        hints=("<|python_tag|>", '"parameters": dictionary of argument name'),
    ),
)
PARSER_NAMES = tuple(entry.name for entry in FORMATS)


def find_format(name: str, template: str) -> ToolCallFormat | None:
    """Return the format of a name; with `auto`, the format that a chat template uses, None if it is unknown."""
    if name != "auto":
        return next(entry for entry in FORMATS if entry.name == name)
    is_xml = "<function=" in template  # its markers are those of other formats, too
    return next((entry for entry in FORMATS if entry.is_xml == is_xml and _matches(template, entry)), None)


def _matches(template: str, entry: ToolCallFormat) -> bool:
    return all(text in template for text in entry.needs) and any(text in template for text in entry.hints)
