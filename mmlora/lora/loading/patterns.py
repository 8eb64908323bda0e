"""Regular expressions of adapter configurations: as Python's `re` reads them, matched within a time limit.

They come with adapters, whoever made those; some expressions take longer than anybody waits.
"""

import re

import regex

from mmlora.errors import AdapterMismatch
from mmlora.utils.text import shorten

MAX_PATTERN_CHARS = 100_000
MATCH_TIMEOUT_S = 1.0


def check_pattern(pattern: str, key: str) -> str:
    """Return a pattern that is a valid regular expression, alone and behind a parent's name.

    Args:
        pattern: the expression.
        key: of the configuration, for the message.

    Raises:
        AdapterMismatch: it is none, or too long.
    """
    if len(pattern) > MAX_PATTERN_CHARS:
        raise AdapterMismatch(f"{key} has a pattern of {len(pattern)} characters; allowed are {MAX_PATTERN_CHARS}")
    try:
        for composed in (pattern, rf"(?:.*\.)?(?:{pattern})"):
            re.compile(composed)
            regex.compile(composed)
    except (re.error, regex.error, OverflowError, RecursionError, ValueError) as error:
        raise AdapterMismatch(f"{key} has {shorten(pattern)}, no valid regular expression: {error}") from None
    return pattern


def matches(pattern: str, name: str) -> bool:
    """Tell whether an expression matches the whole of a name.

    Raises:
        AdapterMismatch: it takes too long.
    """
    return _match(pattern, name, is_whole=True) is not None


def first_group(pattern: str, name: str) -> str | None:
    """Return the last group of an expression that matches the beginning of a name, None when it does not match.

    Raises:
        AdapterMismatch: it takes too long.
    """
    found = _match(pattern, name, is_whole=False)
    return None if found is None else str(found.group(found.lastindex or 1))


def _match(pattern: str, name: str, *, is_whole: bool) -> "regex.Match[str] | None":
    match = regex.fullmatch if is_whole else regex.match
    try:
        return match(pattern, name, timeout=MATCH_TIMEOUT_S)
    except TimeoutError:
        raise AdapterMismatch(
            f"the pattern {shorten(pattern)} takes more than {MATCH_TIMEOUT_S:g} s on {name!r}"
        ) from None
