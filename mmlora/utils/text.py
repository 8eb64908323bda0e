"""Plain values as text: shortened for error messages, escaped for a terminal, sizes in binary units; printed."""

import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeGuard

_JSON_TYPES: Final[dict[type | tuple[type, ...], str]] = {
    type(None): "null",
    bool: "a boolean",
    (int, float): "a number",
    str: "a string",
    (list, tuple): "a list",
    Mapping: "an object",
}


def is_finite_number(value: object) -> TypeGuard[int | float]:
    """Return whether a value is an int or float, but not a bool, that fits into a finite float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False


def describe_type(value: object) -> str:
    """Name the type of a value as JSON does, such as `an object`; other types have their Python name."""
    for types, name in _JSON_TYPES.items():
        if isinstance(value, types):
            return name
    return f"a {type(value).__name__}"


def shorten(value: Any, show: Callable[[Any], str] = repr, max_chars: int = 80) -> str:
    """Return a value as text for an error message: `show(value)`, cut to `max_chars` characters.

    Of a long string or bytes only the beginning is passed to `show`, so that the cost does not grow with the input.
    """
    text = show(value[: max_chars + 1] if isinstance(value, str | bytes) else value)
    return text if len(text) <= max_chars else text[: max_chars - 3] + "..."


def size_text(num_bytes: int) -> str:
    """Format a number of bytes with a binary unit, such as `1.5 GiB`."""
    units = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
    return next((f"{num_bytes / unit:.1f} {name}" for unit, name in units if num_bytes >= unit), f"{num_bytes} bytes")


def printable(text: str) -> str:
    """Escape control characters, line breaks and lone surrogates, so that text cannot forge lines or move a cursor."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def one_line(text: str) -> str:
    """Join the lines of a message into one and escape it."""
    return printable(" ".join(line.strip() for line in text.splitlines()))


def as_utf8(text: str) -> str:
    """Replace lone surrogates, which a file name that is not UTF-8 decodes to and no UTF-8 output can encode."""
    return text.encode("utf-8", "replace").decode()


def print_text(text: str, *, errors: str = "strict") -> bool:
    """Print text and return whether that was possible: its reader may have gone, or the disk may be full.

    After a failure, nothing more is printed.

    Args:
        text: printed with a line break.
        errors: what to do about characters that the encoding of standard output lacks, as for `str.encode`.

    Raises:
        UnicodeEncodeError: there are such characters, and `errors` is `strict`.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, errors).decode(encoding), flush=True)
        return True
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # what is still in the buffer is written at exit, which must not fail
        os.close(nowhere)
        return False
