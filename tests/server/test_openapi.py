"""Schemathesis cases of the OpenAPI document: no 5xx, and only responses that the document describes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks

from mmlora.server.api import build_app
from mmlora.server.launch import load_served_models
from tests.server.conftest import ServerFactory
from tests.server.lora.admin import BASE_NAMES, run_updatable

NUM_CASES = 2000
MAX_TOKENS = 8
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
FORMS = ("/v1/audio/transcriptions", "/v1/audio/translations")
GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/responses", *FORMS)
LIMITS = {"/v1/responses": "max_output_tokens"}  # the field that limits the output; elsewhere it is `max_tokens`


@pytest.fixture(scope="module")
def schema(tiny_phi4: Path, adapters: dict[str, str]) -> Iterator[Any]:
    with run_updatable(tiny_phi4, adapters) as server:
        yield schemathesis.openapi.from_url(f"{server.address}/openapi.json")


def test_generated_cases_conform_to_the_openapi_document(
    schema: Any, wav: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    operations = [result.ok() for result in schema.get_all_operations()]
    statuses: Counter[tuple[str, str, int]] = Counter()
    for operation in operations:
        has_body = operation.method == "post"
        # Schemathesis cannot always invalidate a form with a file; `test_transcriptions.py` covers this.
        is_spoilt = has_body and operation.path not in FORMS
        for mode in [GenerationMode.POSITIVE, GenerationMode.NEGATIVE] if is_spoilt else [GenerationMode.POSITIVE]:
            check_operation(operation, mode, NUM_CASES // 15 if has_body else 20, wav, statuses)
    with capsys.disabled():
        print(f"\nschemathesis, {statuses.total()} cases: {dict(statuses)}")
    assert statuses.total() >= NUM_CASES
    for path in GENERATING:
        assert statuses["POSITIVE", path, 200] > 5, f"nothing was generated at {path}"


def test_a_route_without_declarations_is_described(start_server: ServerFactory) -> None:
    server = start_server()
    app = build_app(server.llm, load_served_models(server.llm))

    @app.get("/new")
    async def new() -> None: ...

    operations = [result.ok() for result in schemathesis.openapi.from_dict(app.openapi()).get_all_operations()]
    (added,) = [operation for operation in operations if operation.path == "/new"]
    assert len(operations) > 10 and set(added.responses.status_codes) == {"200", "4XX", "5XX"}


def check_operation(operation: Any, mode: GenerationMode, num_cases: int, wav: bytes, statuses: Counter[Any]) -> None:
    has_fields = operation.path in GENERATING and mode is GenerationMode.POSITIVE

    @hypothesis.settings(
        max_examples=num_cases,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(operation.as_strategy(generation_mode=mode), strategies.integers(0, 2**30))
    def check(case: Any, dice: int) -> None:
        if has_fields:
            make_answerable(case, dice, wav)
        response = case.call(timeout=60)
        statuses[mode.name, operation.path, response.status_code] += 1
        more = [checks.negative_data_rejection] if mode is GenerationMode.NEGATIVE else []
        case.validate_response(response, checks=[*CHECKS, *more])

    check()


def make_answerable(case: Any, dice: int, wav: bytes) -> None:
    """Request a served model and few tokens, and drop some fields: random sets of fields rarely fit together."""
    body = case.body
    for index, name in enumerate(list(body)):
        if name not in ("messages", "prompt", "input") and (dice >> index) % 8:
            del body[name]
    body["model"] = BASE_NAMES[dice % len(BASE_NAMES)]
    body[LIMITS.get(case.operation.path, "max_tokens")] = 1 + dice % MAX_TOKENS
    body.pop("lora", None)
    if "messages" in body and dice % 4:
        body["messages"] = [{"role": "user", "content": str(dice)}]
    if case.operation.path == "/v1/completions" and dice % 4:
        body["prompt"] = str(dice)
    if case.operation.path in FORMS:
        body["file"] = wav
