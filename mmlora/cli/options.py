"""Options of `mmlora serve`: dataclass fields as flags, `MMLORA_…` environment variables and entries of a YAML file.

The command line takes precedence over the environment, and the environment over the file. Problems of all three are
collected and reported together.
"""

import argparse
import difflib
import json
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Union, get_args, get_origin

import yaml

from mmlora.cli.arguments import parse_int, parse_value
from mmlora.config import AUTO, EngineArgs
from mmlora.errors import ConfigError
from mmlora.server.args import LoRAModule, ServerArgs
from mmlora.utils.environment import parse_bool
from mmlora.utils.text import shorten
from mmlora.utils.vllm_options import SAME_VALUES, SHORT_FLAGS, VLLM_OPTIONS, remove_vllm_options

ENV_PREFIX: Final = "MMLORA_"
ASSISTANT_NAME: Final = "assistant"
DOCTOR_OPTIONS: Final = ("revision", "dtype", "device", "max_model_len", "kv_cache_memory_bytes")
SECRETS: Final = ("api_key",)


@dataclass(frozen=True)
class Flag:
    """One option, whose values come from the command line, the environment or a file.

    Attributes:
        name: of the field; `max_loras` is the flag `--max-loras` and the variable `MMLORA_MAX_LORAS`.
        help: description for `--help`, with the default.
        group: title in `--help`.
        parse: converts a string to a value, or to one entry of a list.
        metavar: placeholder of the value in `--help`.
        is_list: several values are allowed.
        is_single_allowed: a list of one value becomes that value.
        short: another spelling on the command line, such as `-tp`.
    """

    name: str
    help: str
    group: str
    parse: Callable[[str], Any]
    metavar: str
    is_list: bool = False
    is_single_allowed: bool = False
    short: str | None = None

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.name.upper()

    def add_to(self, group: argparse._ActionsContainer) -> None:
        """Add the flag to a parser or a group of its options."""
        text = self.help.replace("%", "%%")
        if self.parse is parse_bool:
            group.add_argument(self.option, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif self.is_list:
            group.add_argument(self.option, action="append", nargs="+", metavar=self.metavar, help=text)
        else:
            names = (self.option,) if self.short is None else (self.short, self.option)
            group.add_argument(*names, dest=self.name, metavar=self.metavar, help=text)

    def may_hold_model(self, argument: Any) -> bool:
        """Return whether a list on the command line may have consumed the MODEL that was meant to follow it."""
        return self.is_list and self.parse is str and any(len(values) > 1 for values in argument or ())

    def read_argument(self, argument: Any) -> Any:
        """Parse the value from argparse: a boolean, a string, or the strings of each occurrence of a list.

        Raises:
            ConfigError: naming the flag and the value.
        """
        if isinstance(argument, bool):
            return argument
        texts = [text for values in argument for text in values] if self.is_list else [argument]
        return self._parse_all(texts, self.option, texts if self.is_list else argument)

    def read_variable(self, text: str) -> Any:
        """Parse an environment variable. A list is separated by commas or is JSON; adapters are separated by spaces.

        Raises:
            ConfigError: naming the variable and the value.
        """
        texts = [text]
        if self.parse == LoRAModule.parse:
            # Spaces inside a JSON object are not separators.
            texts = re.findall(r"\{[^{}]*\}|[^\s{][^\s]*|\{.*", text)
        elif self.is_list and not text.startswith("["):
            texts = [part.strip() for part in text.split(",")]
        return self._parse_all(texts, self.variable, text)

    def read_entry(self, value: Any) -> Any:
        """Parse a value of a YAML file.

        Raises:
            ValueError, ConfigError: it is not allowed.
        """
        if value is None or (isinstance(value, list) and not self.is_list):
            raise ValueError(f"{shorten(value)} is not allowed")
        entries = value if isinstance(value, list) else [value]
        return self._collect([self._parse(entry if isinstance(entry, str) else json.dumps(entry)) for entry in entries])

    def _parse_all(self, texts: Sequence[str], source: str, value: object) -> Any:
        """Parse strings; an error names the source and shows its value."""
        try:
            if self.parse is str and self.is_list:
                texts = [entry for text in texts for entry in _parse_list(text)]
            return self._collect([self._parse(text) for text in texts])
        except (ValueError, ConfigError) as error:
            shown = "***" if self.name in SECRETS else shorten(value)
            raise ConfigError(f"{source}={shown}: {error}") from None

    def _parse(self, text: str) -> Any:
        return text if (self.name, text) in SAME_VALUES else self.parse(text)

    def _collect(self, values: list[Any]) -> Any:
        return values[0] if not self.is_list or (self.is_single_allowed and len(values) == 1) else values


def flags_of(cls: type[EngineArgs] | type[ServerArgs]) -> list[Flag]:
    """Return the options of a dataclass; their help is the docstring's `Args:` entry and the default."""
    helps = _argument_help(cls.__doc__ or "")
    groups = {name: group for group, names in cls.GROUPS.items() for name in names.split()}
    flags = []
    for field in fields(cls):
        if field.name != "model":
            text = helps.get(field.name, "").removesuffix(".") + _default_text(field.default)
            hint = str if isinstance(field.type, str) else field.type  # a string names a type of torch: not imported
            flags.append(_flag(field.name, hint, text, groups[field.name]))
    return flags


def vllm_flags() -> list[Flag]:
    """Return the options of vLLM that are ignored; `--help` does not show them."""
    return [
        Flag(
            name,
            argparse.SUPPRESS,
            "",
            parse_bool if option.is_switch else parse_value,
            "VALUE",
            short=SHORT_FLAGS.get(name),
        )
        for name, option in VLLM_OPTIONS.items()
    ]


def json_options() -> set[str]:
    """Return the options whose values may be JSON objects, in the spelling of the command line."""
    flags = [*flags_of(EngineArgs), *flags_of(ServerArgs), *vllm_flags()]
    return {flag.option for flag in flags if flag.parse in (_parse_json, _parse_json_or_auto, parse_value)}


def parse_options(
    arguments: Mapping[str, Any], environment: Mapping[str, str], unknown: Sequence[str] = ()
) -> tuple[EngineArgs, ServerArgs, list[str]]:
    """Combine command line, environment and file.

    Args:
        arguments: of the command line by field name, None where absent; `config` is the path of the file, and
            `model_option` the value of `--model`.
        environment: with the `MMLORA_…` variables.
        unknown: arguments that the parser did not recognize.

    Returns:
        The options of engine and server, and vLLM's that are ignored, with the reasons.

    Raises:
        ConfigError: with every unknown option and every value that cannot be parsed or is not allowed.
    """
    server_flags = flags_of(ServerArgs)
    flags = [*flags_of(EngineArgs), *server_flags]
    problems = list(_unknown_arguments(unknown, ["--config", *(flag.option for flag in flags)]))
    flags += vllm_flags()
    values: dict[str, Any] = {}
    if file := arguments.get("config") or environment.get(f"{ENV_PREFIX}CONFIG"):
        with _collected(problems):
            values, wrong = read_config_file(file, flags)
            problems += wrong
    named = [name for name in (arguments.get("model"), arguments.get("model_option")) if name]
    if len(set(named)) > 1:
        problems.append(f"--model {named[1]}: another MODEL is given: {named[0]}")
    model = named[0] if named else environment.get(f"{ENV_PREFIX}MODEL")
    for flag in flags:
        argument = arguments.get(flag.name)
        if not named and flag.may_hold_model(argument):
            problems.append(
                f"{flag.option}: its last value may be meant as MODEL; put MODEL first, or repeat the option"
            )
        with _collected(problems):
            if argument is not None:
                values[flag.name] = flag.read_argument(argument)
            elif flag.variable in environment:
                values[flag.name] = flag.read_variable(environment[flag.variable])
    values, ignored, refused = remove_vllm_options(values)
    problems += refused
    if model:
        values["model"] = model
    if "model" not in values:
        _add_assistant(values)
    if values.get("lora_modules"):
        values.setdefault("enable_lora", True)
    server_values = {flag.name: values.pop(flag.name) for flag in server_flags if flag.name in values}
    with _collected(problems):
        engine_args = EngineArgs(**values)
    with _collected(problems):
        server_args = ServerArgs(**server_values)
    if problems:
        raise ConfigError(*problems)
    return engine_args, server_args, ignored


def read_config_file(path: str, flags: Sequence[Flag]) -> tuple[dict[str, Any], list[str]]:
    """Read a YAML file that maps options to values: `max-loras: 4`, or `max_loras: 4`.

    Returns:
        Values by field name, and the problems of those left out.

    Raises:
        ConfigError: the file cannot be read, or is not a mapping.
    """
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"config={path!r} cannot be read: {error}") from None
    if not isinstance(content, Mapping):
        raise ConfigError(f"config={path!r} holds a {type(content).__name__}; it must map options to values")
    readers: dict[str, Callable[[Any], Any]] = {"model": str, **{flag.name: flag.read_entry for flag in flags}}
    values: dict[str, Any] = {}
    problems = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        try:
            if name in values:
                raise ConfigError("duplicate option")
            values[name] = readers[name](value)
        except KeyError:
            problems.append(_unknown_option(str(key), [flag.option.removeprefix("--") for flag in flags]))
        except (ValueError, TypeError, ConfigError) as error:
            problems.append(f"{key}: {error}")
    return values, [f"config={path!r}: {problem}" for problem in problems]


@contextmanager
def _collected(problems: list[str]) -> Iterator[None]:
    """Collect the problems of a `ConfigError` and continue."""
    try:
        yield
    except ConfigError as error:
        problems += error.problems


def _add_assistant(values: dict[str, Any]) -> None:
    """Add the bundled assistant and its adapters, except for options that are set."""
    from mmlora.assets.models import assistant_adapters, assistant_default_mm_loras, assistant_path

    values["model"] = assistant_path()
    values.setdefault("served_model_name", ASSISTANT_NAME)
    if values.setdefault("enable_lora", True):
        values.setdefault("default_mm_loras", assistant_default_mm_loras())
        values.setdefault("lora_modules", [LoRAModule("spanish-lora", assistant_adapters()["spanish-lora"])])


def _unknown_arguments(arguments: Sequence[str], known: Sequence[str]) -> Iterator[str]:
    is_value = False  # the value of an unknown option follows it
    for argument in arguments:
        if argument.startswith("-"):
            name, equals, _ = argument.partition("=")
            yield _unknown_option(name, known)
            is_value = not equals
        elif not is_value:
            yield f"{argument!r}: unexpected argument; only one MODEL is served"


def _unknown_option(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"{name}: unknown option" + (f"; did you mean {near[0]}?" if near else "")


def _flag(name: str, hint: Any, text: str, group: str) -> Flag:
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = [get_origin(member) or member for member in members]
    for member in members:
        if LoRAModule in get_args(member):
            return Flag(name, text, group, LoRAModule.parse, "NAME=PATH", is_list=True)
        if get_origin(member) is Sequence:
            return Flag(name, text, group, str, "VALUE", is_list=True, is_single_allowed=str in kinds)
    if Mapping in kinds and str in kinds:
        return Flag(name, text, group, _parse_json_or_auto, "JSON|auto")
    if Mapping in kinds:
        return Flag(name, text, group, _parse_json, "JSON")
    if bool in kinds:
        return Flag(name, text, group, parse_bool, "")
    if int in kinds:
        return Flag(name, text, group, parse_int, "N")
    if float in kinds:
        return Flag(name, text, group, _parse_float, "SECONDS" if name.endswith("_timeout") else "X")
    return Flag(name, text, group, str, "VALUE")


def _default_text(default: object) -> str:
    if isinstance(default, bool):
        return f" (default: {'on' if default else 'off'})"
    if isinstance(default, tuple):
        default = " ".join(default)
    if isinstance(default, float):
        default = f"{default:g}"
    return f" (default: {default})" if default not in (None, "") else ""


def _argument_help(doc: str) -> dict[str, str]:
    """Return the entries of a docstring's `Args:` by name."""
    section = re.search(r"^ *Args:\n(.*?)(?:\n\s*\n|\Z)", doc, re.DOTALL | re.MULTILINE)
    if section is None:  # python -OO
        return {}
    entries = re.findall(r"^ +(\w+): (.*?)(?=^ +\w+: |\Z)", section[1] + "\n", re.DOTALL | re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _parse_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("must be a number") from None


def _parse_list(text: str) -> list[str]:
    """Parse one entry, or a JSON list of entries."""
    entries = _load_json(text) if text.startswith("[") else [text]
    if not all(isinstance(entry, str) for entry in entries):
        raise ValueError("must be a list of strings")
    return list(entries)


def _parse_json_or_auto(text: str) -> Mapping[str, Any] | str:
    try:
        return AUTO if text == AUTO else _parse_json(text)
    except ValueError as error:
        raise ValueError(f"{error}; {AUTO} is also allowed") from None


def _parse_json(text: str) -> Mapping[str, Any]:
    value = _load_json(text)
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    return value


def _load_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
