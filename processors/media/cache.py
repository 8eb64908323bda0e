"""`MediaCache`: decoded media by the uuids that clients gave them, so that they need not be sent or fetched again."""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from mmlora.processors.media.items import MediaItem

ENTRY_BYTES: Final = 1024  # beside the item itself; small pictures must not become too many


@dataclass(frozen=True)
class CachedMedia:
    """An item, and the http(s) URL that it was read from, if it was."""

    item: MediaItem
    url: str | None

    @property
    def num_bytes(self) -> int:
        return self.item.num_bytes + len(self.url or "") + ENTRY_BYTES


class MediaCache:
    """Keeps the items that were used last, up to a number of bytes. Safe to use from several threads.

    A uuid is only a way to find an item: what the engine knows it by is the hash of its content.

    Args:
        max_bytes: of all items; 0 keeps none.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._entries: OrderedDict[tuple[str, str], CachedMedia] = OrderedDict()  # the last used one is the last
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """What it holds."""
        return self._num_bytes

    def get(self, caller: str, uuid: str) -> CachedMedia | None:
        """Return what a caller gave this uuid last, if it is still held; others' uuids are not seen."""
        with self._lock:
            entry = self._entries.get((caller, uuid))
            if entry is not None:
                self._entries.move_to_end((caller, uuid))
            return entry

    def put(self, caller: str, uuid: str, entry: CachedMedia) -> None:
        """Keep an item in the place of what the uuid stood for; the least recently used ones leave."""
        with self._lock:
            former = self._entries.pop((caller, uuid), None)
            self._num_bytes -= former.num_bytes if former is not None else 0
            if entry.num_bytes > self._max_bytes:
                return
            self._entries[caller, uuid] = entry
            self._num_bytes += entry.num_bytes
            while self._num_bytes > self._max_bytes:
                self._num_bytes -= self._entries.popitem(last=False)[1].num_bytes
