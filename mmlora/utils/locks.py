"""`FairLock` and `EngineLock`: one thread at a time, in order of arrival, and errors where waiting would never end."""

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from mmlora.errors import EngineInUseError


class FairLock:
    """A lock that threads acquire in the order in which they asked for it; it is not re-entrant.

    `threading.Lock` has no order: a thread that acquires it in a loop can keep the others waiting.

    Raises:
        EngineInUseError: on entering, if this thread holds the lock already, or after a fork.
    """

    def __init__(self) -> None:
        self._queue: deque[int] = deque()  # ids of threads; the first one holds the lock
        self._changed = threading.Condition()
        self._pid = os.getpid()

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread holds the lock."""
        try:
            return self._queue[0] == threading.get_ident()
        except IndexError:  # nobody holds it; another thread may have left it just now
            return False

    def check_process(self) -> None:
        """Check that no fork created this process: it has copies of locks, but none of the threads that hold them.

        Raises:
            EngineInUseError: it is another process.
        """
        if os.getpid() != self._pid:
            raise EngineInUseError("the engine was created before a fork; create it in the process that uses it")

    def __enter__(self) -> None:
        self.check_process()
        if self.is_mine:
            raise EngineInUseError("the engine was called again from inside a call that has not returned")
        thread = threading.get_ident()
        with self._changed:
            self._queue.append(thread)
            try:
                self._changed.wait_for(lambda: self._queue[0] == thread)
            except BaseException:  # Ctrl-C
                self._queue.remove(thread)
                self._changed.notify_all()
                raise

    def release_if_mine(self) -> None:
        """Release the lock if this thread holds it."""
        if self.is_mine:
            self.__exit__()

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._queue.popleft()
            self._changed.notify_all()


class EngineLock:
    """Gives an engine to one user at a time.

    A user is a `session` of many calls (a `generate`, or the thread of `AsyncLLM`) or a single `call`. Changes that are
    safe between two calls of any user, such as those of adapters, take a `pause`.
    """

    def __init__(self) -> None:
        self._user = FairLock()
        self._running_call = FairLock()
        self._owner: str | None = None

    def check_process(self) -> None:
        """See `FairLock.check_process`."""
        self._user.check_process()

    @contextmanager
    def session(self, owner: str | None = None) -> Iterator[None]:
        """Wait until no other thread uses the engine, then reserve it for this thread.

        Args:
            owner: named in the error of other threads, which do not wait for this session; by default they do.

        Raises:
            EngineInUseError: this thread uses the engine already, another session has an owner, or after a fork.
        """
        self._refuse_others()
        with self._user:
            self._owner = owner
            try:
                yield
            finally:
                self._owner = None

    @contextmanager
    def call(self) -> Iterator[None]:
        """Hold the engine for one call, inside or outside a session of this thread.

        Raises:
            EngineInUseError: another session has an owner, this thread is inside another call, or after a fork.
        """
        if self._user.is_mine:
            with self._running_call:
                yield
        else:
            self._refuse_others()
            with self._user, self._running_call:
                yield

    def end_call(self) -> None:
        """End a call of this thread that Ctrl-C interrupted while it took or left the lock."""
        self._running_call.release_if_mine()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Hold the engine between two calls of its user; inside a call of this thread there is nothing to wait for."""
        if self._running_call.is_mine:
            yield
        else:
            with self._running_call:
                yield

    def _refuse_others(self) -> None:
        if self._owner is not None and not self._user.is_mine:
            raise EngineInUseError(f"the engine belongs to {self._owner}; call the methods of {self._owner} instead")
