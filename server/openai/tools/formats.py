"""How families of models write tool calls: the table of `--tool-call-parser`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ToolCallFormat:
    """How a family of models writes tool calls: marks, and between them JSON of one call or of a list, or XML.

    Attributes:
        name: vLLM's.
        starts: marks that begin calls.
        ends: marks that may end them.
        bare: brackets that begin calls without a mark, as the first thing in a text or after another call.
        separators: characters between calls.
        hints: texts of which a chat template of the family has at least one, and
        needs: texts of which it has all.
        has_short_ids: templates want ids of nine letters and digits.
        is_xml: a call is `<function=name>` with a `<parameter=name>` for each argument.
    """

    name: str
    starts: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    bare: str = ""
    separators: str = ""
    hints: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    has_short_ids: bool = False
    is_xml: bool = False


FORMATS = (
    ToolCallFormat("mistral", ("[TOOL_CALLS]",), hints=("[TOOL_CALLS]",), has_short_ids=True),
    ToolCallFormat(
        "phi4_mini_json",
        ("<|tool_call|>", "functools"),
        ("<|/tool_call|>",),
        hints=("<|/tool|>", "<|/tool_call|>"),
    ),
    ToolCallFormat("granite", ("<|tool_call|>", "<tool_call>"), ("</tool_call>",), hints=("<|tool_call|>",)),
    ToolCallFormat(
        "qwen3_coder",
        ("<tool_call>", "<function="),
        ("</tool_call>",),
        hints=("<tool_call>",),
        needs=("<function=", "<parameter="),
        is_xml=True,
    ),
    ToolCallFormat("hermes", ("<tool_call>",), ("</tool_call>",), hints=("<tool_call>",)),
    ToolCallFormat(
        "llama3_json",
        ("<|python_tag|>",),
        bare="{",
        separators=";",
        hints=("<|python_tag|>", '"parameters": dictionary of argument name'),
    ),
)
PARSER_NAMES = tuple(entry.name for entry in FORMATS)
REQUIRED_FORMAT = ToolCallFormat("required", bare="[")  # what a constraint makes a model write that must call a tool


def find_format(name: str, template: str) -> ToolCallFormat | None:
    """The format of a name; with `auto` the one that a chat template speaks of, None if it is none of these."""
    if name != "auto":
        return next(entry for entry in FORMATS if entry.name == name)
    is_xml = "<function=" in template  # between marks that others have, too
    return next((entry for entry in FORMATS if entry.is_xml == is_xml and _speaks_of(template, entry)), None)


def _speaks_of(template: str, entry: ToolCallFormat) -> bool:
    return all(text in template for text in entry.needs) and any(text in template for text in entry.hints)
