"""A soak test of two minutes; `python -m tests.soak` runs a longer one."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest

from tests.soak.run import soak


# httpcore leaves the socket of a request that is cancelled while it connects to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning", "ignore:unclosed transport:ResourceWarning")
def test_two_minutes_with_64_clients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = soak(tmp_path, 120, 64)
    gc.collect()
    with capsys.disabled():
        print(f"\nsoak: {json.dumps(report.as_dict())}")
    assert report.problems == []
    assert all(report.changes.values()) and report.counts["malformed"] > 50 and report.counts["aborted"] > 50
    assert report.slope_mib_per_min < 20  # a leak per request would cost more, with thousands of requests a minute
