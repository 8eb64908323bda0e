"""A server, and what it prints, when nobody reads standard output or it cannot print the text."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import wait_for
from tests.server_process import END_S

CODE = (
    "from mmlora.utils.text import print_text; "
    "first = print_text('café ' * 50_000, errors='backslashreplace'); "
    "print(first, print_text('x'), file=open('r', 'w'))"
)


@pytest.mark.parametrize(
    ("line", "results"),
    [
        ("{command} | cat > out", "True True"),
        ("{command} | true", "False True"),  # the second text goes nowhere
        ("{command} > /dev/full", "False True"),
        ("{command} >&-", "True True"),
        ("export PYTHONIOENCODING=ascii; {command} > out", "True True"),
    ],
)
def test_printing_without_a_reader_fails_once_and_silently(tmp_path: Path, line: str, results: str) -> None:
    line = line.format(command=f'(sleep 0.3; {sys.executable} -c "{CODE}"; echo $? > code)')
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=END_S)
    assert done.stderr == "" and (tmp_path / "code").read_text() == "0\n"
    assert (tmp_path / "r").read_text() == f"{results}\n"
    if (tmp_path / "out").exists():
        accent = "\\xe9" if "ascii" in line else "é"
        assert (tmp_path / "out").read_text() == f"caf{accent} " * 50_000 + "\nx\n"


def is_ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/ready", timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def test_a_server_whose_output_nobody_reads_starts_serves_and_ends(tiny_phi4: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = f"--port {port} --served-model-name tiny --device cpu --max-model-len 64"
    serve = f"exec {sys.executable} -m mmlora.cli serve {tiny_phi4} {options}"
    line = f"(sh -c 'echo $$ > pid; {serve}'; echo $? > code) 2>&1 | true"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    address, code = f"http://127.0.0.1:{port}", tmp_path / "code"
    with subprocess.Popen(["sh", "-c", line], cwd=tmp_path, env=environment):
        wait_for(lambda: is_ready(address) or code.exists())
        body = {"prompt": "hi", "max_tokens": 1}
        assert httpx.post(f"{address}/v1/completions", json=body, timeout=60).status_code == 200
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    assert code.read_text() == "0\n"
