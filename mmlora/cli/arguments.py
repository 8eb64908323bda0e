"""Arguments as vLLM's users write them: underscores in flags, dotted flags for JSON, and integers with a unit."""

import json
import re
from collections.abc import Collection, Sequence
from decimal import Decimal
from typing import Any, Final

from mmlora.errors import ConfigError
from mmlora.utils.text import shorten

INTEGER: Final = re.compile(r"(\d+(?:\.\d+)?)([kmgtKMGT])")
EXPONENTS: Final = {"k": 1, "m": 2, "g": 3, "t": 4}


def parse_int(text: str) -> int:
    """Parse an integer: `4096`, `4k` and `25.6k` with decimal units, `4K` with binary ones.

    Raises:
        ValueError: it is not an integer.
    """
    match = INTEGER.fullmatch(text.strip())
    try:
        if match is None:
            return int(text)
        number, unit = match.groups()
        base = 1000 if unit.islower() else 1024
        value = Decimal(number) * base ** EXPONENTS[unit.lower()]
    except ValueError:
        value = Decimal("NaN")
    if value != value.to_integral_value() or (match is not None and match[2].isupper() and "." in match[1]):
        raise ValueError("must be an integer, optionally with a unit: 4k and 25.6k are 4000 and 25600, 4K is 4096")
    return int(value)


def parse_value(text: str) -> Any:
    """Parse an untyped value: JSON, or `none` for None, or else the text."""
    if text.lower() == "none":
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def normalize(arguments: Sequence[str], json_options: Collection[str]) -> list[str]:
    """Return arguments with dashes in flags, and with the dotted flags of each option as one flag with a JSON object.

    `--limit-mm-per-prompt.image 2` becomes `--limit-mm-per-prompt {"image": 2}`, and `--a.b+ x` appends to a list.

    Args:
        arguments: without the program name.
        json_options: options that are JSON objects, such as `--limit-mm-per-prompt`.

    Raises:
        ConfigError: a dotted flag has no value, or its option is given as a whole, too.
    """
    found: list[str] = []
    objects: dict[str, dict[str, Any]] = {}
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        option, dot, path = name.partition(".")
        if name.startswith("--"):
            option = option.replace("_", "-")
        if not dot or option not in json_options:
            found.append(option + dot + path + equals + value)
            continue
        text = value if equals else next(rest, None)
        if text is None:
            raise ConfigError(f"{name}: a value must follow")
        _insert(objects.setdefault(option, {}), path, text, name)
    for option in objects.keys() & {argument.partition("=")[0] for argument in found}:
        raise ConfigError(f"{option}: give one JSON object or dotted flags, not both")
    return found + [f"{option}={json.dumps(value)}" for option, value in objects.items()]


def _insert(target: dict[str, Any], path: str, text: str, name: str) -> None:
    """Set the value of a dotted path, or append to its list."""
    *parents, key = path.removesuffix("+").split(".")
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise ConfigError(f"{name}={shorten(text)}: {parent!r} has another value already")
    if not path.endswith("+"):
        target[key] = parse_value(text)
        return
    values = target.setdefault(key, [])
    if not isinstance(values, list):
        raise ConfigError(f"{name}={shorten(text)}: {key!r} has another value already")
    values += [parse_value(part) for part in text.split(",")]
