"""Options of dataclasses as flags of the command line and as environment variables.

A flag on the command line wins over its environment variable (`--max-loras` over `MMLORA_MAX_LORAS`).
"""

import argparse
import json
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from mmlora.config import AUTO, EngineArgs
from mmlora.environment import parse_bool
from mmlora.errors import ConfigError
from mmlora.server.launch import ServerArgs
from mmlora.server.models import LoRAModule

ENV_PREFIX = "MMLORA_"


@dataclass(frozen=True)
class Flag:
    """One option: its field, how its text is read, what it is for, and whether it takes several texts."""

    name: str
    parse: Callable[[str], Any]
    help: str
    is_list: bool = False

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def env_name(self) -> str:
        return ENV_PREFIX + self.name.upper()

    def add_to(self, group: argparse._ActionsContainer) -> None:
        """Let a parser, or a group of its options, take this one."""
        text = self.help.replace("%", "%%")
        if self.parse is parse_bool:
            group.add_argument(self.option, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif self.is_list:
            read, metavar = self._read_argument, "NAME=PATH" if self.name == "lora_modules" else "VALUE"
            group.add_argument(self.option, action="extend", nargs="+", type=read, metavar=metavar, help=text)
        else:
            metavar = {int: "N", float: "X", _parse_json: "JSON", _parse_json_or_auto: "JSON|auto"}.get(
                self.parse, "VALUE"
            )
            group.add_argument(self.option, type=self._read_argument, metavar=metavar, help=text)

    def _read_argument(self, text: str) -> Any:
        try:
            return self.parse(text)
        except (ValueError, ConfigError) as error:
            message = str(error) if isinstance(error, ConfigError) else f"{text!r}: {error}"
            raise argparse.ArgumentTypeError(message) from None

    def read_value(self, value: Any) -> Any:
        """Read a value of a file, which may have a type already.

        Raises:
            ValueError, ConfigError: it is not allowed.
        """
        if self.is_list:
            entries = value if isinstance(value, list) else [value]
            return [self.parse(entry if isinstance(entry, str) else json.dumps(entry)) for entry in entries]
        if value is None or isinstance(value, list):
            raise ValueError(f"{value!r} is not allowed")
        return self.parse(value if isinstance(value, str) else json.dumps(value))

    def read_env(self, text: str) -> Any:
        """Read the environment variable.

        Raises:
            ConfigError: it cannot be read.
        """
        try:
            if self.is_list:
                return [self.parse(entry) for entry in _split_entries(text)]
            return self.parse(text)
        except (ValueError, ConfigError) as error:
            raise ConfigError(f"{self.env_name}={text!r}: {error}") from None


def _split_entries(text: str) -> list[str]:
    """Split the entries of a list at blanks that are not inside a JSON object."""
    return re.findall(r"\{[^{}]*\}|[^\s{][^\s]*|\{.*", text)


def flags_of(cls: type[EngineArgs] | type[ServerArgs]) -> list[Flag]:
    """The options of a dataclass, with the help of its docstring."""
    hints = get_type_hints(cls)
    helps = _argument_help(cls.__doc__ or "")
    names = [field.name for field in fields(cls) if field.init]
    return [
        Flag(name, _parser_of(name, hints[name]), helps.get(name, ""), Sequence in _kinds(hints[name]))
        for name in names
        if name != "model"
    ]


def _kinds(hint: Any) -> list[Any]:
    """The types that an option may have, without those of their parts."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return [get_origin(member) or member for member in members]


def _parser_of(name: str, hint: Any) -> Callable[[str], Any]:
    """How the text of an option becomes its value."""
    if name == "lora_modules":
        return LoRAModule.parse
    kinds = _kinds(hint)
    if bool in kinds:
        return parse_bool
    if any(isinstance(kind, type) and issubclass(kind, Mapping) for kind in kinds):
        return _parse_json_or_auto if str in kinds else _parse_json
    return next((kind for kind in (str, int, float) if kind in kinds), str)


def _parse_json_or_auto(text: str) -> dict[str, Any] | str:
    try:
        return AUTO if text == AUTO else _parse_json(text)
    except ValueError as error:
        raise ValueError(f"{error}; {AUTO} is allowed, too") from None


def _parse_json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
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
