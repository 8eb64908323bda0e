"""`NameLocks`: whoever changes what a name stands for holds its lock meanwhile."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class NameLocks:
    """One lock for each name that somebody changes or waits to change."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        self._num_holders: Counter[str] = Counter()  # those that wait included

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Wait for one's turn with a name."""
        with self._lock:
            self._num_holders[name] += 1
            lock = self._locks.setdefault(name, threading.Lock())
        try:
            with lock:
                yield
        finally:
            with self._lock:
                self._num_holders[name] -= 1
                if not self._num_holders[name]:
                    del self._num_holders[name], self._locks[name]
