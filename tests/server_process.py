"""Start servers in subprocesses, as users do."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

START_S, END_S = 120, 60


@dataclass(frozen=True)
class ServerProcess:
    """A ready server in a subprocess; `line` is its line "mmlora is ready: …"."""

    process: subprocess.Popen[str]
    line: str

    @property
    def address(self) -> str:
        """URL of the server, without `/v1`."""
        return self.line.split()[3].removesuffix("/v1")

    def stop(self, sig: signal.Signals) -> tuple[int, str]:
        """Send a signal and wait; return the exit code and the standard error, if that is a pipe."""
        self.process.send_signal(sig)
        _, errors = self.process.communicate(timeout=END_S)
        return self.process.returncode, errors or ""


@contextmanager
def run_process(*arguments: str, stderr: int = subprocess.DEVNULL, **environment: str) -> Iterator[ServerProcess]:
    """Run a Python command that starts a server, until the block ends."""
    with subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    ) as process:
        assert process.stdout is not None
        try:
            assert select.select([process.stdout], [], [], START_S)[0], "the server is not ready"
            line = process.stdout.readline()
            assert line.startswith("mmlora is ready: "), line or f"exit code {process.wait()}"
            yield ServerProcess(process, line)
            if process.returncode is None:
                process.terminate()
                process.wait(END_S)
        finally:
            process.kill()


@contextmanager
def run_serve(*arguments: str, stderr: int = subprocess.DEVNULL, **environment: str) -> Iterator[ServerProcess]:
    """Run `mmlora serve` on a free port until the block ends."""
    with run_process("-m", "mmlora.cli", "serve", *arguments, "--port", "0", stderr=stderr, **environment) as server:
        yield server
