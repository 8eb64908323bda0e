"""Regular expressions of adapter files: matched within a time limit, and tables of many of them."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Generic, TypeVar

import regex

from mmlora.errors import AdapterMismatch
from mmlora.utils.text import shorten

MATCH_TIMEOUT_S: Final = 1.0  # patterns come from adapter files, and some backtrack forever

PLAIN: Final = re.compile(r"[\w.-]+")  # valid, and without other special characters than dots
T = TypeVar("T")


def match(pattern: "str | regex.Pattern[str]", name: str, *, is_whole: bool = True) -> "regex.Match[str] | None":
    """Match a pattern with a name, or with its start if not `is_whole`.

    Raises:
        AdapterMismatch: matching exceeds the time limit.
    """
    compiled = regex.compile(pattern)
    matches = compiled.fullmatch if is_whole else compiled.match
    try:
        return matches(name, timeout=MATCH_TIMEOUT_S)
    except TimeoutError:
        shown = shorten(compiled.pattern)
        raise AdapterMismatch(f"the pattern {shown} takes more than {MATCH_TIMEOUT_S:g} s on {name!r}") from None


class PatternTable(Generic[T]):
    """Values by regular expression on the end of a module name; the first match is used.

    PEFT may write one pattern per module, such as its name, in which only dots are special. Those are looked up, so
    that the time does not grow with the square of the number of modules.

    Args:
        values: by pattern.
    """

    def __init__(self, values: Mapping[str, T]) -> None:
        self._values = list(values.values())
        self._indices = {pattern: index for index, pattern in enumerate(values)}
        # Indices of plain patterns, by their length, the places of their dots and their text.
        self._plain: dict[int, dict[tuple[int, ...], dict[str, int]]] = defaultdict(lambda: defaultdict(dict))
        self._others: list[tuple[int, regex.Pattern[str]]] = []
        for pattern, index in self._indices.items():
            if PLAIN.fullmatch(pattern):
                dots = tuple(place for place, character in enumerate(pattern) if character == ".")
                self._plain[len(pattern)][dots][pattern] = index
            else:
                self._others.append((index, regex.compile(rf"(?:.*\.)?(?:{pattern})")))

    def find(self, names: Sequence[str], default: T) -> T:
        """Return the value of the first pattern that matches the first name with any match, else the default.

        Raises:
            AdapterMismatch: matching exceeds the time limit.
        """
        for name in names:
            first = min(self._lookups(name), default=len(self._values))
            for index, pattern in self._others:
                if index > first:
                    break
                if match(pattern, name):
                    first = index
                    break
            if first < len(self._values):
                return self._values[first]
        return default

    def _lookups(self, name: str) -> Iterator[int]:
        """Yield the indices of the patterns that equal the name, and of the plain ones that match its end."""
        if name in self._indices:
            yield self._indices[name]
        starts = [0, *(place + 1 for place, character in enumerate(name) if character == ".")]
        for end in (name[start:] for start in starts):
            for dots, patterns in self._plain.get(len(end), {}).items():
                characters = [*end]
                for place in dots:
                    characters[place] = "."
                index = patterns.get("".join(characters))
                if index is not None:
                    yield index
