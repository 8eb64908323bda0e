"""`WorkerPool`: decodes media in processes that are killed when a file takes too long or nobody waits for it."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from mmlora import errors
from mmlora.errors import EngineDeadError, MediaError, MMLoRAError
from mmlora.processors.media.channel import Channel
from mmlora.processors.media.items import MediaItem, MediaLimits
from mmlora.processors.modalities import Modality
from mmlora.utils.text import size_text

WORKER: Final = "mmlora.processors.media.worker"
START_TIMEOUT_S: Final = 60.0
BASE_BYTES: Final = 512 * 2**20  # address space of the interpreter and the libraries: 220 MiB were measured
BYTES_PER_PIXEL: Final = 24  # WebP: two canvases, the decoded frame, the image and its copy, 4 bytes each
BYTES_PER_SAMPLE: Final = 16


def memory_limit(limits: MediaLimits) -> int:
    """Return the address space of a worker in bytes: enough for the largest file within the limits."""
    decoded = max(BYTES_PER_PIXEL * limits.max_pixels, BYTES_PER_SAMPLE * limits.max_samples)
    return BASE_BYTES + 2 * limits.max_bytes + decoded


@dataclass(eq=False)
class DecodeBudget:
    """The time that decoding may take for all media of one prompt.

    Attributes:
        rest_s: what is left, in seconds.
        worker: that decodes a file of the prompt at the moment.
        is_cancelled: set by `WorkerPool.cancel`.
    """

    rest_s: float
    worker: "Worker | None" = None
    is_cancelled: bool = False


class Worker:
    """A decoding process, started when it is needed, and again after it was killed or has crashed.

    All methods but `kill` are called by the thread that uses the worker.

    Args:
        limits: on each file.
        timeout_s: CPU time for a file, after which the process ends even if the server has been killed.
    """

    def __init__(self, limits: MediaLimits, timeout_s: float) -> None:
        self._limits = limits
        self._memory_bytes = memory_limit(limits)
        options = {"limits": asdict(limits), "timeout_s": timeout_s, "memory_bytes": self._memory_bytes}
        self._command = [sys.executable, "-P", "-m", WORKER, json.dumps(options)]
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._is_ready = False
        self._is_killed = False

    def start(self) -> None:
        """Start the process, if there is none, without waiting until it is ready.

        Raises:
            MMLoRAError: the system cannot start it.
        """
        if self._process is not None and not self._is_killed and self._process.poll() is None:
            return
        self.stop()
        self._is_killed = False
        try:
            ours, theirs = socket.socketpair()
            self._channel = Channel(ours)
            with theirs:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    cwd=os.sep,  # the current directory may have been deleted, and nothing is imported from it
                    env=_environment(),
                    start_new_session=True,  # Ctrl-C in a terminal is for the server
                )
        except OSError as error:
            raise MMLoRAError(f"the media decoder cannot be started: {error}") from error

    def decode(self, modality: Modality, data: bytes, budget: DecodeBudget, *, is_base64: bool) -> MediaItem:
        """Decode one file; the time is taken from the budget. Any error but a `MediaError` stops the process.

        Raises:
            MediaError: it cannot be decoded within the limits.
            TimeoutError: the budget is used up.
            EOFError, OSError: the process was killed or crashed.
            MMLoRAError: the process does not start, or has a bug.
        """
        try:
            channel = self._ready_channel(budget)
            start_s = time.monotonic()
            try:
                channel.deadline_s = start_s + budget.rest_s
                channel.send({"modality": modality.name, "num_bytes": len(data), "is_base64": is_base64}, [data])
                return self._receive(channel, modality)
            finally:
                budget.rest_s -= time.monotonic() - start_s
        except MediaError:
            raise
        except BaseException:  # KeyboardInterrupt among others: the rest of the answer would be taken for the next one
            self.stop()
            raise

    def kill(self) -> None:
        """Kill the process; called by any thread. The thread that uses the worker gets an error."""
        self._is_killed = True
        process = self._process
        if process is not None:
            process.kill()

    def stop(self) -> None:
        """Kill the process, if there is one, and wait for its end."""
        process, channel = self._process, self._channel
        self._process, self._channel, self._is_ready = None, None, False
        if channel is not None:
            channel.close()
        if process is not None:
            process.kill()
            process.wait()

    def _receive(self, channel: Channel, modality: Modality) -> MediaItem:
        header = channel.receive()
        if "error" in header:
            raise MediaError(header["error"])
        if "is_out_of_memory" in header:
            allowed = size_text(self._memory_bytes)
            raise MediaError(f"decoding this {modality.name} needs more memory than the allowed {allowed}")
        if "failure" in header:
            raise MMLoRAError(f"the media decoder failed: {header['failure']}")
        return modality.receive(header, channel.read, self._limits)

    def _ready_channel(self, budget: DecodeBudget) -> Channel:
        """Return the channel when the process has imported its libraries."""
        self.start()
        if budget.is_cancelled:  # after the start: `cancel` sets it before it kills the process
            raise EOFError("cancelled")
        assert self._channel is not None
        if not self._is_ready:
            self._channel.deadline_s = time.monotonic() + START_TIMEOUT_S
            try:
                self._channel.receive()
            except (EOFError, OSError) as error:
                if budget.is_cancelled:
                    raise
                raise MMLoRAError("the media decoder ended while it started, or did not start in time") from error
            self._is_ready = True
        return self._channel


class WorkerPool:
    """Decodes media in worker processes. Thread-safe.

    Processes are started on first use, or by `start`. They end with the pool, and when the server is killed.

    Attributes:
        decode_s: seconds that processes were busy.
        num_lost: processes that were replaced, by reason: `timeout`, `cancelled` or `crashed`.

    Args:
        limits: on each file.
        num_workers: maximum number of processes.
        timeout_s: for decoding all media of one prompt; waiting for a worker does not count.
    """

    def __init__(self, limits: MediaLimits, *, num_workers: int, timeout_s: float) -> None:
        self.decode_s = 0.0
        self.num_lost: Counter[str] = Counter(timeout=0, cancelled=0, crashed=0)
        self._limits = limits
        self._timeout_s = timeout_s
        self._workers = [Worker(limits, timeout_s) for _ in range(num_workers)]
        self._idle = list(self._workers)
        self._open: set[DecodeBudget] = set()  # that use a worker
        self._is_closed = False
        self._changed = threading.Condition()
        self._stop = weakref.finalize(self, _stop_all, self._workers)

    def start(self) -> None:
        """Start all processes, so that no request waits for it.

        Raises:
            MMLoRAError: the system cannot start them.
        """
        for worker in self._workers:
            worker.start()

    def new_budget(self) -> DecodeBudget:
        """Return the budget of a prompt."""
        return DecodeBudget(self._timeout_s)

    def decode(self, modality: Modality, data: bytes, budget: DecodeBudget, *, is_base64: bool = False) -> MediaItem:
        """Decode one file of a prompt; blocks until a worker is free and has decoded it.

        Args:
            modality: of the file.
            data: the file, or its base64.
            budget: of the prompt.
            is_base64: whether `data` is base64, which workers decode, too: 64 MiB would stop all threads for 0.4 s.

        Raises:
            MediaError: it cannot be decoded within the limits of time and memory, or the prompt was cancelled.
            EngineDeadError: the pool was closed.
        """
        if budget.rest_s <= 0:
            raise self._too_slow()
        worker, rest_s = self._take_worker(budget), budget.rest_s
        try:
            return worker.decode(modality, data, budget, is_base64=is_base64)
        except TimeoutError as error:
            self._count_lost("timeout")
            raise self._too_slow() from error
        except (EOFError, OSError) as error:
            self._count_lost("cancelled" if self._is_closed or budget.is_cancelled else "crashed")
            self.check_open(budget)
            raise MediaError(
                f"the decoder crashed on this {modality.name}, which is damaged or needs more memory than the allowed "
                f"{size_text(memory_limit(self._limits))}"
            ) from error
        finally:
            self._free_worker(worker, budget, rest_s - budget.rest_s)

    def check_open(self, budget: DecodeBudget) -> None:
        """Raise the error of `decode` if nothing is decoded for this prompt any more."""
        if self._is_closed:
            raise EngineDeadError("the engine has stopped and decodes no further media")
        if budget.is_cancelled:
            raise MediaError("the request was cancelled while its media were decoded")

    def cancel(self, budget: DecodeBudget) -> None:
        """Kill the worker that decodes for a prompt, if any, and let later calls for the prompt fail."""
        with self._changed:
            budget.is_cancelled = True
            if budget.worker is not None:
                budget.worker.kill()
            self._changed.notify_all()

    def close(self) -> None:
        """End all processes; running and later calls fail."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            budgets = list(self._open)
        for budget in budgets:
            self.cancel(budget)
        with self._changed:
            self._changed.wait_for(lambda: not self._open)
        self._stop()

    def _take_worker(self, budget: DecodeBudget) -> Worker:
        with self._changed:
            self._changed.wait_for(lambda: self._idle or budget.is_cancelled or self._is_closed)
            self.check_open(budget)
            worker = budget.worker = self._idle.pop()
            self._open.add(budget)
            return worker

    def _free_worker(self, worker: Worker, budget: DecodeBudget, decode_s: float) -> None:
        with self._changed:
            self.decode_s += decode_s
            budget.worker = None  # from now on, `cancel` kills no process that the next request uses
        try:
            if not self._is_closed:
                with suppress(MMLoRAError):  # the next request that needs it reports why
                    worker.start()  # if it was stopped
        finally:
            with self._changed:
                self._open.discard(budget)
                self._idle.append(worker)
                self._changed.notify_all()

    def _count_lost(self, reason: str) -> None:
        with self._changed:
            self.num_lost[reason] += 1

    def _too_slow(self) -> MediaError:
        return MediaError(f"decoding the media of the prompt takes more than the allowed {self._timeout_s:g} s")


def _stop_all(workers: Sequence[Worker]) -> None:
    for worker in workers:
        worker.stop()


def _environment() -> dict[str, str]:
    """Return the environment of a worker, which imports from where this process does, but not from its directory."""
    try:
        directory = os.getcwd()
    except FileNotFoundError:  # it was deleted
        directory = ""
    folders = [folder for folder in sys.path if os.path.isabs(folder) and folder != directory]
    folders.append(str(Path(errors.__file__).parents[1]))  # last: it may be the directory
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OPENBLAS_NUM_THREADS": "1"}
