"""Parsing of JSON bodies: the number of values is bounded before anything is parsed."""

from __future__ import annotations

import pytest

from mmlora.errors import RequestError
from mmlora.server.bodies import MAX_VALUES, read_json


def nested(num_values: int, *, num_chars: int) -> bytes:
    """Return a list of numbers and a string of some length; it has `num_values` commas and brackets."""
    numbers = ",".join("1" for _ in range(num_values - 1))
    return f'["{"x" * num_chars}",{numbers}]'.encode()


@pytest.mark.parametrize("num_chars", [0, 1, 2**18, 3_000_001])
def test_a_body_with_the_maximum_number_of_values_is_parsed(num_chars: int) -> None:
    body = nested(MAX_VALUES, num_chars=num_chars)
    assert len(read_json(body, "body")) == MAX_VALUES
    with pytest.raises(RequestError, match=f"^body has {MAX_VALUES + 1} commas and brackets; at most {MAX_VALUES} are"):
        read_json(nested(MAX_VALUES + 1, num_chars=num_chars), "body")


@pytest.mark.parametrize("character", [",", "[", "{"])
def test_characters_in_all_parts_of_a_body_count(character: str) -> None:
    text = character * (MAX_VALUES // 2)
    body = f'"{text}{"x" * 2**20}{text}{character}"'
    with pytest.raises(RequestError, match=f"^field has {MAX_VALUES + 1} commas"):
        read_json(body, "field")
    assert read_json(body.replace(character, "x", 1), "field").endswith(character)
