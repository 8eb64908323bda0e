"""Cases that schemathesis makes of the server's OpenAPI document: no 5xx, and no answer that it does not describe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from tests.server.admin import run_updatable

MAX_EXAMPLES = 150
CHECKS = (
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
)


@pytest.fixture(scope="module")
def schema(tiny_phi4: Path, adapters: dict[str, str]) -> Iterator[Any]:
    with run_updatable(tiny_phi4, adapters) as server:
        yield schemathesis.openapi.from_url(f"{server.address}/openapi.json")


def test_cases_of_the_document(schema: Any, capsys: pytest.CaptureFixture[str]) -> None:
    statuses: Counter[tuple[str, int]] = Counter()
    for result in schema.get_all_operations():
        operation = result.ok()

        @hypothesis.settings(
            max_examples=MAX_EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy())
        def check(case: Any) -> None:
            response = case.call(timeout=60)
            statuses[case.operation.label, response.status_code] += 1
            case.validate_response(response, checks=list(CHECKS))

        check()
    with capsys.disabled():
        print(f"\nschemathesis: {sum(statuses.values())} cases: {dict(statuses)}")
