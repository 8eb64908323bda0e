"""The command `mmlora` with its subcommands `serve`, `models`, `doctor` and `inspect`.

The flags of `serve` are generated from `EngineArgs` and `ServerArgs`. Commands import modules that need torch only when
they run, so that `--help` does not wait for it.
"""

import argparse
import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NoReturn

from mmlora.cli.arguments import normalize
from mmlora.cli.options import DOCTOR_OPTIONS, Flag, flags_of, json_options, parse_options, vllm_flags
from mmlora.config import EngineArgs
from mmlora.errors import AdapterError, ConfigError, MMLoRAError
from mmlora.server.args import ServerArgs
from mmlora.utils.text import one_line, print_text
from mmlora.utils.vllm_options import ignored_line, remove_vllm_options

logger = logging.getLogger(__name__)


class _Parser(argparse.ArgumentParser):
    """Argument parser that reports an error in one line, without the usage page."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program name; by default `sys.argv[1:]`.

    Returns:
        Exit code: 0 on success, 1 if an inspected adapter would be refused, 2 if the options, the model or an adapter
        cannot be used, 130 on Ctrl-C.
    """
    parser = _build_parser()
    try:
        arguments = normalize(sys.argv[1:] if argv is None else argv, json_options())
    except ConfigError as error:
        parser.error(str(error))
    parsed, unknown = parser.parse_known_args(arguments)
    options = vars(parsed)
    command, run = options.pop("command"), options.pop("run")
    if run is _serve:
        options["unknown"] = unknown  # reported together with all other problems
    elif unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    else:
        from mmlora.server.observability.log_format import TEXT_FORMAT

        logging.basicConfig(format=TEXT_FORMAT, level=logging.WARNING)
    try:
        return run(**options)  # type: ignore[no-any-return]
    except MMLoRAError as error:
        for problem in error.problems if isinstance(error, ConfigError) else [str(error)]:
            print(f"mmlora {command}: error: {one_line(problem)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _serve(unknown: Sequence[str], **arguments: Any) -> int:
    engine_args, server_args, ignored = parse_options(arguments, os.environ, unknown)
    from mmlora.server.launch import serve
    from mmlora.server.observability.log_format import configure_logging

    configure_logging(server_args.log_format, server_args.uvicorn_log_level)
    if ignored:
        logger.warning("%s", ignored_line(ignored))
    serve(engine_args, server_args)
    return 0


def _models(is_json: bool) -> int:
    """Print the table of supported model families."""
    from mmlora.cli.model_table import as_text, model_rows

    rows = model_rows()
    print_text(json.dumps([asdict(row) for row in rows], indent=2) if is_json else as_text(rows))
    return 0


def _doctor(model: str | None, is_json: bool, **options: Any) -> int:
    """Print a report on a model without reading its weights."""
    from mmlora.assets.models import assistant_path
    from mmlora.cli.doctor import diagnose
    from mmlora.utils.library_errors import LIBRARY_ERRORS

    by_name = {flag.name: flag for flag in flags_of(EngineArgs)}
    given = {name: by_name[name].read_argument(value) for name, value in options.items() if value is not None}
    args = EngineArgs(model or assistant_path(), **remove_vllm_options(given)[0])
    try:
        found = diagnose(args)
        print_text(json.dumps(asdict(found), indent=2) if is_json else found.as_text())
    except MMLoRAError:
        raise
    except (*LIBRARY_ERRORS, MemoryError) as error:  # raised by libraries on malformed files
        raise ConfigError(f"model {args.model!r} cannot be inspected: {type(error).__name__}: {error}") from error
    return 2 if found.problem is not None else 0


def _inspect(adapter: str, model: str | None, is_json: bool) -> int:
    """Print a report on an adapter for a model without reading the model's weights."""
    from mmlora.assets.models import assistant_path
    from mmlora.cli.doctor import examine_adapter

    path = model or assistant_path()
    try:
        found = examine_adapter(adapter, path)
        print_text(json.dumps(asdict(found), indent=2) if is_json else found.as_text())
    except MMLoRAError:
        raise
    except (RuntimeError, ValueError, OverflowError, MemoryError) as error:  # raised by libraries on malformed files
        reason = f"{type(error).__name__}: {error}"
        raise AdapterError(f"adapter {adapter!r} cannot be inspected for model {path!r}: {reason}") from error
    return 1 if found.refusals else 0


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "mmlora",
        description="Serve one base model with many LoRA adapters; adapters for audio and images are applied "
        "automatically.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")

    def add(name: str, run: Callable[..., int], text: str, description: str | None = None) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=description or text, allow_abbrev=False)
        command.set_defaults(run=run)
        if run is not _serve:
            command.add_argument("--json", action="store_true", dest="is_json", help="print JSON")
        return command

    add("models", _models, "list supported model families and how each was verified")
    doctor = add(
        "doctor",
        _doctor,
        "check whether a model is supported, without reading its weights",
        "Report whether a model is supported, with its modalities, LoRA targets, bundled adapters and memory use, "
        "without reading its weights. The exit code is 2 if it cannot be served.",
    )
    doctor.add_argument(
        "model", nargs="?", metavar="MODEL", help="directory or Hub id; by default the bundled assistant"
    )
    for flag in (flag for flag in flags_of(EngineArgs) if flag.name in DOCTOR_OPTIONS):
        flag.add_to(doctor)
    inspect = add(
        "inspect",
        _inspect,
        "check whether an adapter fits a model, without reading the model's weights",
        "Report which modules of a model an adapter changes, or why it would be refused. The exit code is 1 if it "
        "would be refused.",
    )
    inspect.add_argument("adapter", metavar="ADAPTER", help="directory or Hub id of a PEFT adapter")
    inspect.add_argument("--model", metavar="MODEL", help="directory or Hub id; by default the bundled assistant")
    _add_serve_options(add("serve", _serve, "serve a model over an OpenAI-compatible HTTP API"))
    return parser


def _add_serve_options(command: argparse.ArgumentParser) -> None:
    command.usage = "mmlora serve [MODEL] [OPTION ...]"
    command.formatter_class = functools.partial(argparse.HelpFormatter, max_help_position=34)
    command.description = (
        "Serve a model over an OpenAI-compatible HTTP API. Every option can also be set in the environment "
        "(MMLORA_MAX_LORAS for --max-loras) or in a YAML file (--config). The command line takes precedence over the "
        "environment, and the environment over the file."
    )
    command.add_argument(
        "model", nargs="?", metavar="MODEL", help="directory or Hub id; by default the bundled assistant"
    )
    command.add_argument("--model", dest="model_option", metavar="MODEL", help="the same as MODEL")
    command.add_argument("--config", metavar="FILE", help="YAML file of options, such as `max-loras: 4`")
    groups: dict[str, list[Flag]] = {title: [] for cls in (ServerArgs, EngineArgs) for title in cls.GROUPS}
    for flag in (*flags_of(EngineArgs), *flags_of(ServerArgs)):
        groups.setdefault(flag.group, []).append(flag)
    for title, flags in groups.items():
        group = command.add_argument_group(title)
        for flag in flags:
            flag.add_to(group)
    for flag in vllm_flags():
        flag.add_to(command)
