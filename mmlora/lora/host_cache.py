"""`HostCache`: which adapters are in host memory, least recently used ones out first."""

import threading
from collections import OrderedDict
from weakref import WeakSet

from mmlora.errors import AdapterError
from mmlora.lora.adapter import Adapter
from mmlora.lora.request import LoRARequest
from mmlora.lora.stored_adapter import StoredAdapter


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

    def keep(self, entry: StoredAdapter, source: LoRARequest, adapter: Adapter) -> None:
        """Make a version the present one of its entry and the most recently used; evict what is too much."""
        with self._lock:
            self._living.add(adapter)
            entry.take(source, adapter)
            self._kept[entry.name] = entry
            self._kept.move_to_end(entry.name)
            if self.max_adapters is None:
                return
            idle = [other for other in self._kept.values() if other is not entry and not other.is_fixed]
            for other in idle[: max(0, len(self._kept) - self.max_adapters)]:
                other.adapter = None
                del self._kept[other.name]
                self.num_evictions += 1

    def drop(self, entry: StoredAdapter) -> None:
        """Let go of an adapter for good."""
        with self._lock:
            self._kept.pop(entry.name, None)
            entry.adapter = None

    def check_room(self, entry: StoredAdapter) -> None:
        """See to it that an adapter can be kept; one that is there already can.

        Raises:
            AdapterError: every place is taken by an adapter that never leaves.
        """
        if self.max_adapters is None or entry.adapter is not None:
            return
        with self._lock:
            fixed = [other.name for other in self._kept.values() if other is not entry and other.is_fixed]
        if len(fixed) >= self.max_adapters:
            raise AdapterError(
                f"adapter {entry.name!r} finds no place on the host: all max_cpu_loras={self.max_adapters} are taken "
                f"by adapters that are pinned or from memory ({', '.join(fixed[:10])})"
            )

    def mark_pinned(self, entry: StoredAdapter, known: list[StoredAdapter]) -> None:
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
