"""Settings read only from `MMLORA_…` environment variables, with errors that name the variable."""

import os
from collections.abc import Mapping

from mmlora.errors import ConfigError

TRUE_WORDS, FALSE_WORDS = ("1", "true"), ("0", "false")


def parse_bool(text: str) -> bool:
    """Parse `1` or `true`, `0` or `false`, case-insensitively.

    Raises:
        ValueError: it is none of these.
    """
    if text.lower() not in TRUE_WORDS + FALSE_WORDS:
        raise ValueError(f"must be {', '.join(TRUE_WORDS)}, {' or '.join(FALSE_WORDS)}")
    return text.lower() in TRUE_WORDS


def read_bool(name: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Return a boolean variable; False if it is not set.

    Raises:
        ConfigError: it is not a boolean.
    """
    text = environment.get(name, "")
    try:
        return parse_bool(text) if text else False
    except ValueError as error:
        raise ConfigError(f"{name}={text!r}: {error}") from None


def read_number(name: str, default: float, environment: Mapping[str, str] = os.environ) -> float:
    """Return a variable that is a positive number; `default` if it is not set.

    Raises:
        ConfigError: it is not a positive number.
    """
    text = environment.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"{name}={text!r}: must be a positive number")
    return value


def read_required(name: str, meaning: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return a variable that must be set.

    Args:
        name: the variable.
        meaning: description of its value, for the error message.

    Raises:
        ConfigError: it is not set, or empty.
    """
    text = environment.get(name, "").strip()
    if not text:
        raise ConfigError(f"{name} is not set; it must be {meaning}")
    return text
