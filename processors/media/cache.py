"""`MediaCache`: decoded media by client uuid, so that clients need not send them again."""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from mmlora.processors.media.items import MediaItem

ENTRY_BYTES: Final = 1024  # overhead of an entry, which also limits the number of small images


@dataclass(frozen=True)
class CachedMedia:
    """An item, and the http(s) URL that it was downloaded from, if any."""

    item: MediaItem
    url: str | None

    @property
    def num_bytes(self) -> int:
        return self.item.num_bytes + len(self.url or "") + ENTRY_BYTES


class MediaCache:
    """LRU cache with a capacity in bytes; thread-safe.

    The uuid is used only here: all other caches identify an item by the hash of its content.

    Args:
        max_bytes: capacity for all items; 0 disables the cache.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._entries: OrderedDict[tuple[str, str], CachedMedia] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Size of the cached items and their overhead."""
        return self._num_bytes

    def get(self, caller: str, uuid: str) -> CachedMedia | None:
        """Return the item that a caller (tenant) stored under a uuid, None if it was evicted or never stored."""
        with self._lock:
            entry = self._entries.get((caller, uuid))
            if entry is not None:
                self._entries.move_to_end((caller, uuid))
            return entry

    def put(self, caller: str, uuid: str, entry: CachedMedia) -> None:
        """Store an item under a uuid, replacing the previous one, and evict the least recently used items."""
        with self._lock:
            former = self._entries.pop((caller, uuid), None)
            self._num_bytes -= former.num_bytes if former is not None else 0
            if entry.num_bytes > self._max_bytes:
                return
            self._entries[caller, uuid] = entry
            self._num_bytes += entry.num_bytes
            while self._num_bytes > self._max_bytes:
                self._num_bytes -= self._entries.popitem(last=False)[1].num_bytes
