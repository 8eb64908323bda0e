"""A pytest plugin that writes the results of the equality tests per family to `mmlora/models/parity.json`.

Use it with `pytest -p tests.models.parity`. A family whose test failed is recorded as failing; a family that was not
tested keeps its record.
"""

import json
from collections.abc import Generator
from importlib.metadata import version
from typing import Any

import pytest

from mmlora.cli.model_table import PARITY_FILE
from mmlora.lora.adapter import PARTS
from mmlora.models.families import FAMILIES as SERVED
from tests import equality

PACKAGES = ("transformers", "torch", "peft")

_failed: set[str] = set()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Record the family of a failed test, from its parameter `family` or its fixture `Checkpoint`.

    A parameter `model_type+variant` names one of several checkpoints of a family.
    """
    report = yield
    if report.failed:
        callspec = getattr(item, "callspec", None)
        _failed.add(str(callspec.params.get("family", "")).partition("+")[0] if callspec is not None else "")
        values = getattr(item, "funcargs", {}).values()
        _failed.update(value.model_type for value in values if isinstance(value, equality.Checkpoint))
    return report


def pytest_sessionfinish() -> None:
    """Write the records."""
    known = json.loads(PARITY_FILE.read_text()) if PARITY_FILE.exists() else {}
    records = updated(known, equality.FAMILIES, _failed)
    PARITY_FILE.write_text(json.dumps(records, indent=1) + "\n")


def updated(known: dict[str, Any], found: dict[str, equality.Statistics], failed: set[str]) -> dict[str, Any]:
    """Return old records replaced by new ones, in the order of the families' table."""
    versions = {package: version(package) for package in PACKAGES}
    measured = {
        model_type: {
            "num_outputs": statistics.num_outputs,
            "num_logit_rows": statistics.num_logit_rows,
            "max_logit_difference": float(f"{statistics.max_logit_error:.1e}"),
            "num_near_ties": statistics.num_near_ties,
            "parts": [part for part in PARTS if part in statistics.parts],
            **versions,
        }
        for model_type, statistics in found.items()
    }
    failing = {model_type: {"is_failing": True, **versions} for model_type in failed}
    records = {**known, **measured, **failing}
    return {model_type: records[model_type] for model_type in SERVED if model_type in records}
