"""The command `mmlora`: `mmlora serve [MODEL]` and `mmlora inspect ADAPTER`.

Flags of `serve` are generated from `EngineArgs` and `ServerArgs`, so that the command line and Python never drift
apart. A flag on the command line wins over its environment variable (`--max-loras` over `MMLORA_MAX_LORAS`).
"""

import argparse
import json
import logging
import os
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from mmlora.config import EngineArgs
from mmlora.environment import parse_bool
from mmlora.errors import AdapterError, ConfigError, MMLoRAError
from mmlora.families import get_key_mapping, get_towers
from mmlora.lora.files import read_adapter, resolve_adapter_path
from mmlora.lora.inspection import inspect_adapter
from mmlora.lora.module_index import ModuleIndex
from mmlora.model_loader import CONFIG_FILES, load_config, load_meta_model, resolve_model_path
from mmlora.server.launch import ServerArgs, serve
from mmlora.server.models import LoRAModule

ENV_PREFIX = "MMLORA_"
ASSISTANT_NAME = "assistant"


@dataclass(frozen=True)
class _Flag:
    """One option: its field, how its text is read, and what it is for."""

    name: str
    parse: Callable[[str], Any]
    help: str

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def env_name(self) -> str:
        return ENV_PREFIX + self.name.upper()


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; by default the process's own.

    Returns:
        The exit code: 0, 1 when an inspected adapter would be refused, or 2 when the options, the model or an adapter
        cannot be used.
    """
    arguments = [_with_dashes(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    parser = _build_parser()
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    try:
        return _inspect(**options) if command == "inspect" else _serve(options)
    except MMLoRAError as error:
        print(f"mmlora {command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _serve(options: Mapping[str, Any]) -> int:
    serve(*parse_options(options, os.environ))
    return 0


def _inspect(adapter: str, model: str | None, is_json: bool) -> int:
    """Print what an adapter would do to a model; weights of the model are never read."""
    from mmlora.assets.models import assistant_path

    path = model or assistant_path()
    try:
        files = read_adapter(resolve_adapter_path(adapter))
        folder = resolve_model_path(path, None, CONFIG_FILES)
        net = load_meta_model(load_config(folder))
        towers = get_towers(net)
        part_of = towers.part_of if towers is not None else None
        found = inspect_adapter(files, ModuleIndex(net, part_of, get_key_mapping(folder)))
        print(json.dumps(found.as_dict(), indent=2) if is_json else found.as_text())
    except (RuntimeError, ValueError, OverflowError, MemoryError) as error:  # of libraries that read strange files
        reason = f"{type(error).__name__}: {error}"
        raise AdapterError(f"adapter {adapter!r} cannot be inspected for model {path!r}: {reason}") from error
    return 1 if found.refusals else 0


def parse_options(options: Mapping[str, Any], environment: Mapping[str, str]) -> tuple[EngineArgs, ServerArgs]:
    """Join command line and environment.

    Args:
        options: what the command line set, by field name.
        environment: `MMLORA_…` variables that fill what it left open.

    Raises:
        ConfigError: a value cannot be read, or does not fit.
    """
    found: dict[str, Any] = {}
    for flag in (*_flags(EngineArgs), *_flags(ServerArgs)):
        if options.get(flag.name) is not None:
            found[flag.name] = options[flag.name]
        elif flag.env_name in environment:
            found[flag.name] = _read_env(flag, environment[flag.env_name])
    model = options.get("model") or environment.get(f"{ENV_PREFIX}MODEL")
    if model:
        found["model"] = model
    if "model" not in found:
        _add_assistant(found)
    server_names = {flag.name for flag in _flags(ServerArgs)}
    engine = {name: value for name, value in found.items() if name not in server_names}
    server = {name: value for name, value in found.items() if name in server_names}
    return EngineArgs.from_kwargs(**engine), ServerArgs(**server)


def _add_assistant(found: dict[str, Any]) -> None:
    """Fill in the bundled assistant with its adapters, except what the user set."""
    from mmlora.assets.models import assistant_adapters, assistant_default_mm_loras, assistant_path

    found["model"] = assistant_path()
    found.setdefault("served_model_name", ASSISTANT_NAME)
    if found.setdefault("enable_lora", True):
        found.setdefault("default_mm_loras", assistant_default_mm_loras())
        found.setdefault("lora_modules", [LoRAModule("spanish-lora", assistant_adapters()["spanish-lora"])])


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser("mmlora", description="One base model, many LoRA adapters, the right one applied by itself.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")
    inspect = commands.add_parser(
        "inspect",
        help="tell what an adapter would do to a model, without reading the model's weights",
        description="Tell what an adapter changes in a model, and why it would be refused: then the exit code is 1.",
        allow_abbrev=False,
    )
    inspect.add_argument("adapter", metavar="ADAPTER", help="directory or Hub id of a PEFT adapter")
    inspect.add_argument("--model", metavar="MODEL", help="directory or Hub id; by default the bundled assistant")
    inspect.add_argument("--json", action="store_true", dest="is_json", help="print JSON")
    command = commands.add_parser(
        "serve",
        help="serve a model over OpenAI's HTTP API",
        description="Serve a model over OpenAI's HTTP API. Every option is also read from the environment: "
        "--max-loras from MMLORA_MAX_LORAS, and so on; the command line wins.",
        allow_abbrev=False,
    )
    command.add_argument(
        "model", nargs="?", metavar="MODEL", help="directory or Hub id; without it the bundled assistant is served"
    )
    for title, cls in (("server", ServerArgs), ("engine", EngineArgs)):
        group = command.add_argument_group(title)
        for flag in _flags(cls):
            _add_flag(group, flag)
    return parser


def _add_flag(group: argparse._ArgumentGroup, flag: _Flag) -> None:
    text = flag.help.replace("%", "%%")
    if flag.parse is parse_bool:
        group.add_argument(flag.option, action=argparse.BooleanOptionalAction, default=None, help=text)
    elif flag.name == "lora_modules":
        read = _for_argparse(flag)
        group.add_argument(flag.option, action="extend", nargs="+", type=read, metavar="NAME=PATH", help=text)
    else:
        metavar = {int: "N", float: "X", _parse_json: "JSON"}.get(flag.parse, "VALUE")
        group.add_argument(flag.option, type=_for_argparse(flag), metavar=metavar, help=text)


def _for_argparse(flag: _Flag) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return flag.parse(text)
        except (ValueError, ConfigError) as error:
            message = str(error) if isinstance(error, ConfigError) else f"{text!r}: {error}"
            raise argparse.ArgumentTypeError(message) from None

    return read


def _read_env(flag: _Flag, text: str) -> Any:
    try:
        if flag.name == "lora_modules":
            return [flag.parse(entry) for entry in _split_entries(text)]
        return flag.parse(text)
    except (ValueError, ConfigError) as error:
        raise ConfigError(f"{flag.env_name}={text!r}: {error}") from None


def _split_entries(text: str) -> list[str]:
    """Split `--lora-modules` entries at blanks that are not inside a JSON object."""
    return re.findall(r"\{[^{}]*\}|[^\s{][^\s]*|\{.*", text)


def _flags(cls: type[EngineArgs] | type[ServerArgs]) -> list[_Flag]:
    """The options of a dataclass, with the help of its docstring."""
    hints = get_type_hints(cls)
    helps = _argument_help(cls.__doc__ or "")
    names = [field.name for field in fields(cls) if field.init]
    return [_Flag(name, _parser_of(name, hints[name]), helps.get(name, "")) for name in names if name != "model"]


def _parser_of(name: str, hint: Any) -> Callable[[str], Any]:
    """How the text of an option becomes its value."""
    if name == "lora_modules":
        return LoRAModule.parse
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = [get_origin(member) or member for member in members]
    if bool in kinds:
        return parse_bool
    if any(isinstance(kind, type) and issubclass(kind, Mapping) for kind in kinds):
        return _parse_json
    return next((kind for kind in (str, int, float) if kind in kinds), str)


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


def _with_dashes(argument: str) -> str:
    """`--max_loras` is `--max-loras`; values are left alone."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


if __name__ == "__main__":
    sys.exit(main())
