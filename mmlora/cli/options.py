"""Options of dataclasses as flags of the command line and as environment variables.

A flag on the command line wins over its environment variable (`--max-loras` over `MMLORA_MAX_LORAS`).
"""

import argparse
import difflib
import json
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from mmlora.config import AUTO, EngineArgs
from mmlora.errors import ConfigError
from mmlora.server.args import ServerArgs
from mmlora.server.lora.served_models import LoRAModule
from mmlora.utils.environment import parse_bool

ENV_PREFIX = "MMLORA_"


@dataclass(frozen=True)
class Flag:
    """One option: its field, how its text is read, and what it is for.

    Attributes:
        is_list: it takes several values, each read by `parse`.
        takes_one: a single value of a list stands for itself.
    """

    name: str
    parse: Callable[[str], Any]
    help: str
    group: str = "other"
    is_list: bool = False
    takes_one: bool = False

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def env_name(self) -> str:
        return ENV_PREFIX + self.name.upper()

    def add_to(self, group: argparse._ActionsContainer) -> None:
        """Let a parser, or a group of its options, take this one; `read_argument` reads what it takes."""
        text = self.help.replace("%", "%%")
        if self.parse is parse_bool:
            group.add_argument(self.option, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif self.is_list:
            metavar = "NAME=PATH" if self.parse == LoRAModule.parse else "VALUE"
            group.add_argument(self.option, action="append", nargs="+", metavar=metavar, help=text)
        else:
            group.add_argument(self.option, metavar=self._metavar, help=text)

    @property
    def _metavar(self) -> str:
        if self.name.endswith("_timeout"):
            return "SECONDS"
        kinds: dict[Callable[[str], Any], str] = {
            _parse_int: "N",
            _parse_float: "X",
            _parse_json: "JSON",
            _parse_json_or_auto: "JSON|auto",
        }
        return kinds.get(self.parse, "VALUE")

    def read_argument(self, value: Any) -> Any:
        """Read what stood on the command line: a boolean, a text, or the texts of each time that a list was given.

        Raises:
            ConfigError: it cannot be read.
        """
        if isinstance(value, bool):
            return value
        texts = [text for given in value for text in given] if self.is_list else value
        return self._read(self.option, texts, lambda: self._read_entries(texts))

    def may_hold_model(self, value: Any) -> bool:
        """Whether a list on the command line may have taken the MODEL that was meant to follow it."""
        return self.is_list and self.parse is str and any(len(given) > 1 for given in value or ())

    def read_env(self, text: str) -> Any:
        """Read the environment variable; several values are parted by commas, adapters by blanks, or a JSON list.

        Raises:
            ConfigError: it cannot be read.
        """

        def split() -> str | list[str]:
            if not self.is_list or text.startswith("["):
                return text
            return (
                _split_entries(text) if self.parse == LoRAModule.parse else [part.strip() for part in text.split(",")]
            )

        return self._read(self.env_name, text, lambda: self._read_entries(split()))

    def read_value(self, value: Any) -> Any:
        """Read a value of a file, which may have a type already.

        Raises:
            ValueError, ConfigError: it is not allowed.
        """
        if self.is_list:
            entries = value if isinstance(value, list) else [value]
            return self._joined(
                [self.parse(entry if isinstance(entry, str) else json.dumps(entry)) for entry in entries]
            )
        if value is None or isinstance(value, list):
            raise ValueError(f"{value!r} is not allowed")
        return self.parse(value if isinstance(value, str) else json.dumps(value))

    def _read(self, source: str, value: object, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except (ValueError, ConfigError) as error:
            raise ConfigError(f"{source}={value!r}: {error}") from None

    def _read_entries(self, value: str | list[str]) -> Any:
        if not self.is_list:
            assert isinstance(value, str)
            return self.parse(value)
        texts = [value] if isinstance(value, str) else value
        is_plain = self.parse is str
        entries = [entry for text in texts for entry in (_parse_list(text) if is_plain else [text])]
        return self._joined([self.parse(entry) for entry in entries])

    def _joined(self, entries: list[Any]) -> Any:
        return entries[0] if self.takes_one and len(entries) == 1 else entries


def _split_entries(text: str) -> list[str]:
    """Split `--lora-modules` entries at blanks that are not inside a JSON object."""
    return re.findall(r"\{[^{}]*\}|[^\s{][^\s]*|\{.*", text)


def flags_of(cls: type[EngineArgs] | type[ServerArgs]) -> list[Flag]:
    """The options of a dataclass, with the help of its docstring and their defaults."""
    hints = get_type_hints(cls)
    helps = _argument_help(cls.__doc__ or "")
    groups = {name: group for group, names in cls.GROUPS.items() for name in names.split()}
    options = [field for field in fields(cls) if field.init and field.name != "model"]
    texts = {
        field.name: helps.get(field.name, "").removesuffix(".") + _default_text(field.default) for field in options
    }
    return [_flag(name, hints[name], text, groups.get(name, "other")) for name, text in texts.items()]


def _default_text(default: object) -> str:
    """Tell a default; one that is unset is told in the docstring, where that is not plain."""
    if isinstance(default, bool):
        return f" (default: {'on' if default else 'off'})"
    if isinstance(default, tuple):
        default = " ".join(default)
    if isinstance(default, float):
        default = f"{default:g}"
    return f" (default: {default})" if default not in (None, "") else ""


def unknown_options(arguments: Sequence[str], known: Sequence[str]) -> Iterator[str]:
    """What is wrong with arguments that no option took.

    Args:
        arguments: in their order; the value of an unknown option follows it.
        known: options, one of which may have been meant.
    """
    is_value = False
    for argument in arguments:
        if argument.startswith("-"):
            name, equals, _ = argument.partition("=")
            yield no_such_option(name, known)
            is_value = not equals
        elif not is_value:
            yield f"{argument!r}: there is no place for it; one MODEL is served"


def no_such_option(name: str, known: Sequence[str]) -> str:
    """Say that there is no option of a name, and which one may have been meant."""
    near = difflib.get_close_matches(name, known, 1)
    return f"{name}: there is no such option" + (f"; did you mean {near[0]}?" if near else "")


def _flag(name: str, hint: Any, text: str, group: str) -> Flag:
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = [get_origin(member) or member for member in members]
    for member in members:
        if get_origin(member) is Sequence:
            parse = LoRAModule.parse if LoRAModule in get_args(member) else str
            return Flag(name, parse, text, group, is_list=True, takes_one=str in kinds)
    return Flag(name, _parser_of(kinds), text, group)


def _parser_of(kinds: Sequence[type]) -> Callable[[str], Any]:
    """How the text of an option becomes a value of one of these types."""
    if bool in kinds:
        return parse_bool
    if any(isinstance(kind, type) and issubclass(kind, Mapping) for kind in kinds):
        return _parse_json_or_auto if str in kinds else _parse_json
    parsers: dict[type, Callable[[str], Any]] = {str: str, int: _parse_int, float: _parse_float}
    return next((parse for kind, parse in parsers.items() if kind in kinds), str)


def _parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("must be a whole number") from None


def _parse_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("must be a number") from None


def _parse_list(text: str) -> list[str]:
    """One entry, or a JSON list of them."""
    if not text.startswith("["):
        return [text]
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not all(isinstance(entry, str) for entry in entries):
        raise ValueError("must be a list of strings")
    return list(entries)


def _parse_json_or_auto(text: str) -> dict[str, Any] | str:
    try:
        return AUTO if text == AUTO else _parse_json(text)
    except ValueError as error:
        raise ValueError(f"{error}; {AUTO} is allowed, too") from None


def _parse_json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    return value


def _argument_help(doc: str) -> dict[str, str]:
    """The `Args:` of a docstring by name."""
    section = re.search(r"^ *Args:\n(.*?)(?:\n\s*\n|\Z)", doc, re.DOTALL | re.MULTILINE)
    if section is None:
        return {}
    entries = re.findall(r"^ +(\w+): (.*?)(?=^ +\w+: |\Z)", section[1] + "\n", re.DOTALL | re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}
