"""Options of the server in a YAML file: the flags, without their dashes, and `model`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mmlora.cli.options import Flag, no_such_option
from mmlora.errors import ConfigError


def read_config_file(path: str, flags: Sequence[Flag]) -> tuple[dict[str, Any], list[str]]:
    """Read a file of options.

    Args:
        path: of a YAML file that maps options to values: `max-loras: 4`, or `max_loras: 4`.
        flags: the options that there are, `model` apart.

    Returns:
        Values by field name, and all that is wrong with others.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"config={path!r} cannot be read: {error}") from None
    if not isinstance(content, Mapping):
        raise ConfigError(f"config={path!r} holds a {type(content).__name__}; it must map options to values")
    by_name = {flag.name: flag for flag in flags}
    found: dict[str, Any] = {}
    problems = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        try:
            if name in found:
                raise ConfigError("it stands twice")
            found[name] = str(value) if name == "model" else by_name[name].read_value(value)
        except KeyError:
            problems.append(no_such_option(str(key), [flag.option.removeprefix("--") for flag in flags]))
        except (ValueError, TypeError, ConfigError) as error:
            problems.append(f"{key}: {error}")
    return found, [f"config={path!r}: {problem}" for problem in problems]
