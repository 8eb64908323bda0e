"""Count the project's files in which one text chat and one audio chat over HTTP run code, and their thread-pool hops.

The server runs in this process with the bundled assistant. Profilers are set before any thread starts. Each chat is
sent once as a warm-up and then recorded, with `max_tokens=1`. All threads count. A pool hop is a call of
`ThreadPoolExecutor.submit` during the chat.

    .venv/bin/python benchmarks/files_touched.py [--list]
"""

import argparse
import base64
import json
import os
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("mmlora", "server", "processors", "towers", "kernels", "assets")
TIMEOUT_S = 120.0


class Recorder:
    """Records in which project files code runs while it is on.

    Attributes:
        files: relative to the root.
        num_moves: calls into another file than that of the previous call of the thread.
        num_hops: tasks submitted to a thread pool.
    """

    def __init__(self) -> None:
        self.is_on = False
        self.clear()
        self._last = threading.local()

    def clear(self) -> None:
        """Reset all counts."""
        self.files: set[str] = set()
        self.num_moves = 0
        self.num_hops = 0

    def install(self) -> None:
        """Profile this thread and all later ones, and count tasks of thread pools."""
        submit: Callable[..., Future[Any]] = ThreadPoolExecutor.submit

        def counted(pool: ThreadPoolExecutor, /, *args: Any, **kwargs: Any) -> Future[Any]:
            self.num_hops += self.is_on
            return submit(pool, *args, **kwargs)

        ThreadPoolExecutor.submit = counted  # type: ignore[method-assign, assignment]
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)

    def _profile(self, frame: FrameType, event: str, _: object) -> None:
        if event != "call" or not self.is_on:
            return
        file = project_file(frame.f_code.co_filename)
        if file is not None:
            self.files.add(file)
            self.num_moves += getattr(self._last, "file", file) != file
            self._last.file = file


@cache
def project_file(name: str) -> str | None:
    """Return a file's path relative to the root; None for files outside the project."""
    path = Path(os.path.realpath(name))
    if not path.is_relative_to(ROOT):
        return None
    relative = path.relative_to(ROOT)
    return relative.as_posix() if relative.parts[0] in FOLDERS else None


def messages(modality: str) -> list[dict[str, Any]]:
    """Return the messages of a chat of one modality, `text` or `audio`."""
    if modality == "text":
        return [{"role": "user", "content": "what is two plus three?"}]
    data = base64.b64encode((ROOT / "assets" / "samples" / "two_plus_three.flac").read_bytes()).decode()
    return [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": data, "format": "flac"}}]}]


def ask(url: str, modality: str) -> None:
    """Send one chat and check its response."""
    body = {"model": "assistant", "messages": messages(modality), "max_tokens": 1}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        assert json.load(response)["usage"]["completion_tokens"] == 1


def wait_until_ready(url: str) -> None:
    """Wait until the server is ready.

    Raises:
        TimeoutError: it is not ready within `TIMEOUT_S`.
    """
    end_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end_s:
        try:
            urllib.request.urlopen(f"{url}/ready", timeout=TIMEOUT_S).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"the server was not ready within {TIMEOUT_S} s")


def record(recorder: Recorder, url: str, *, is_listed: bool) -> None:
    """Record one chat of each modality and print the counts."""
    wait_until_ready(url)
    for modality in ("text", "audio"):
        ask(url, modality)
        time.sleep(0.5)  # until the warm-up's log lines are written
        recorder.clear()
        recorder.is_on = True
        ask(url, modality)
        time.sleep(0.5)
        recorder.is_on = False
        print(f"{modality}: {len(recorder.files)} files, {recorder.num_moves} moves, {recorder.num_hops} pool hops")
        if is_listed:
            print("\n".join(f"  {file}" for file in sorted(recorder.files)))


def main() -> None:
    """Serve the bundled assistant, record the chats, and stop it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the files")
    is_listed = parser.parse_args().list
    recorder = Recorder()
    recorder.install()
    from mmlora.cli import main as run_command

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def client() -> None:
        try:
            record(recorder, f"http://127.0.0.1:{port}", is_listed=is_listed)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=client).start()
    run_command(["serve", "--port", str(port), "--uvicorn-log-level", "error"])


if __name__ == "__main__":
    main()
