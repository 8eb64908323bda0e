"""`HostCache`: which adapters are in host memory, least recently used ones out first."""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakSet

from mmlora.errors import AdapterError
from mmlora.lora.adapter import Adapter
from mmlora.lora.request import LoRARequest
from mmlora.lora.store.stored_adapter import StoredAdapter


class HostCache:
    """Keep the present versions of adapters; thread-safe.

    Args:
        max_adapters: kept at most; unlimited without it. Pinned adapters and those from memory count, but never leave.
        max_pinned: most adapters that may be pinned; unlimited without it.
    """

    def __init__(self, max_adapters: int | None = None, max_pinned: int | None = None) -> None:
        self.num_evictions = 0
        self.max_adapters = max_adapters
        self._max_pinned = max_pinned
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, StoredAdapter] = OrderedDict()  # least recently used first
        self._coming: set[str] = set()  # names of what is being loaded, never to leave
        self._living: WeakSet[Adapter] = WeakSet()

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """What is kept, least recently used first."""
        with self._lock:
            return tuple(entry.adapter for entry in self._kept.values() if entry.adapter is not None)

    @property
    def num_bytes(self) -> int:
        """Bytes of everything counted that anybody still holds: this cache, a slot or a request."""
        with self._lock:
            return sum(adapter.num_bytes for adapter in self._living)

    def count(self, adapter: Adapter) -> None:
        """Have an adapter in `num_bytes` for as long as it lives."""
        with self._lock:
            self._living.add(adapter)

    def use(self, entry: StoredAdapter, request: LoRARequest) -> Adapter | None:
        """Return the version that a request gets without a load, as the most recently used; None if there is none."""
        with self._lock:
            is_wanted = not entry.wants_reload(request) and entry.serves(request)
            if entry.adapter is None or not is_wanted:
                return None
            self._kept.move_to_end(entry.name)
            return entry.adapter

    def keep(self, entry: StoredAdapter, source: LoRARequest, adapter: Adapter) -> None:
        """Make a version the present one of its entry and the most recently used; evict what is too much."""
        with self._lock:
            self._living.add(adapter)
            entry.take(source, adapter)
            self._kept[entry.name] = entry
            self._kept.move_to_end(entry.name)
            if self.max_adapters is None:
                return
            idle = [other for other in self._kept.values() if not other.is_fixed]
            for other in idle[: max(0, len(self._kept) - self.max_adapters)]:
                other.adapter = None
                del self._kept[other.name]
                self.num_evictions += 1

    def drop(self, entry: StoredAdapter) -> None:
        """Let go of an adapter for good."""
        with self._lock:
            self._kept.pop(entry.name, None)
            entry.adapter = None

    @contextmanager
    def room_for(self, entry: StoredAdapter, source: LoRARequest) -> Iterator[None]:
        """Hold a place for an adapter while it is loaded; one that is there already has its own.

        Args:
            entry: of the adapter.
            source: where it is loaded from; if that is memory, it will never leave.

        Raises:
            AdapterError: every place is taken by an adapter that never leaves.
        """
        is_fixed = entry.is_pinned or source.is_from_memory
        with self._lock:
            fixed = {other.name for other in self._kept.values() if other.is_fixed} | self._coming
            fixed.discard(entry.name)
            has_room = self.max_adapters is None or len(fixed) < self.max_adapters
            if not has_room and (is_fixed or entry.adapter is None):
                raise AdapterError(
                    f"adapter {entry.name!r} finds no place on the host: all max_cpu_loras={self.max_adapters} are "
                    f"taken by adapters that are pinned or from memory ({', '.join(sorted(fixed)[:10])})"
                )
            if is_fixed:
                self._coming.add(entry.name)
        try:
            yield
        finally:
            with self._lock:
                self._coming.discard(entry.name)

    def mark_pinned(self, entry: StoredAdapter, known: Iterable[StoredAdapter]) -> None:
        """Count an adapter as pinned.

        Args:
            entry: to pin.
            known: all adapters there are.

        Raises:
            AdapterError: too many are pinned.
        """
        with self._lock:
            pinned = [other.name for other in known if other is not entry and other.is_pinned]
            if self._max_pinned is not None and len(pinned) >= self._max_pinned:
                raise AdapterError(
                    f"adapter {entry.name!r} cannot be pinned: at most {self._max_pinned} may be, so that a place "
                    f"stays free for the others; pinned are {', '.join(pinned) or 'none'}"
                )
            entry.is_pinned = True
