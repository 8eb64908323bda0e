"""instructor: a typed response in each of its modes for OpenAI-compatible servers, whole and in parts."""

from __future__ import annotations

from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel
from samples import BASE_URL, MODEL, QUESTION


class Shape(BaseModel, extra="forbid"):  # a small model would invent further fields
    color: Literal["red", "green", "blue"]
    is_big: bool


MODES = (
    instructor.Mode.TOOLS,
    instructor.Mode.TOOLS_STRICT,
    instructor.Mode.JSON_SCHEMA,
    instructor.Mode.RESPONSES_TOOLS,
)
for mode in MODES:
    client = instructor.from_openai(OpenAI(base_url=BASE_URL, api_key="none", max_retries=0), mode=mode)
    tokens = {"max_output_tokens" if mode is instructor.Mode.RESPONSES_TOOLS else "max_tokens": 512}
    shape = client.create(
        model=MODEL, messages=[{"role": "user", "content": QUESTION}], response_model=Shape, max_retries=3, **tokens
    )
    assert isinstance(shape, Shape), (mode, shape)
client = instructor.from_openai(OpenAI(base_url=BASE_URL, api_key="none"), mode=instructor.Mode.TOOLS)
parts = client.create_partial(
    model=MODEL, messages=[{"role": "user", "content": QUESTION}], response_model=Shape, max_tokens=512
)
assert list(parts)[-1].color in ("red", "green", "blue")
