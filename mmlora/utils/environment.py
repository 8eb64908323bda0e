"""Settings that stand in `MMLORA_…` environment variables alone, with errors that name the variable."""

import os
from collections.abc import Mapping

from mmlora.errors import ConfigError

TRUE_WORDS, FALSE_WORDS = ("1", "true"), ("0", "false")


def parse_bool(text: str) -> bool:
    """Read `1` or `true`, `0` or `false`, in any case.

    Raises:
        ValueError: it is another word.
    """
    if text.lower() not in TRUE_WORDS + FALSE_WORDS:
        raise ValueError(f"must be {', '.join(TRUE_WORDS)}, {' or '.join(FALSE_WORDS)}")
    return text.lower() in TRUE_WORDS


def read_bool(name: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Read a boolean; False when it is not set.

    Raises:
        ConfigError: it is set to something else.
    """
    text = environment.get(name, "")
    try:
        return parse_bool(text) if text else False
    except ValueError as error:
        raise ConfigError(f"{name}={text!r}: {error}") from None


def read_number(name: str, default: float, environment: Mapping[str, str] = os.environ) -> float:
    """Read a positive number.

    Raises:
        ConfigError: it is set to something else.
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
    """Read a text that must be set.

    Args:
        name: the variable.
        meaning: what it must hold, for the message.

    Raises:
        ConfigError: it is not set, or empty.
    """
    text = environment.get(name, "").strip()
    if not text:
        raise ConfigError(f"{name} is not set; it must hold {meaning}")
    return text
