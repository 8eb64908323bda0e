"""Host cache of LoRA adapters: loaded on demand, one load per version, the least recently used evicted first.

Locks: each entry has a lock that is held during a load or change of its adapter, including disk and registry I/O. The
lock of the cache guards the table of names, the LRU order, pins, reservations, draining names and counters; nothing
loads or writes under it. A thread takes an entry's lock first, then the lock of the cache, and never the locks of two
entries. Fields of an entry are written under its own lock, and under both locks where look-ups and eviction read them;
eviction alone clears `adapter` under the lock of the cache only. A single field may be read without a lock.
"""

import itertools
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final
from weakref import WeakSet, WeakValueDictionary, ref

from mmlora.errors import AdapterError, AdapterNotFound
from mmlora.lora.adapter import Adapter
from mmlora.lora.loading.files import AdapterFiles, read_adapter, reason_of, resolve_adapter_path
from mmlora.lora.request import MEMORY, LoRARequest
from mmlora.lora.store.registry import AdapterRecord, AdapterRegistry

LoadAdapter = Callable[[AdapterFiles, str], Adapter]
_uids: Final = itertools.count(1)


@dataclass(eq=False)
class CacheEntry:
    """Everything known about one adapter name, whether its matrices are in host memory or not.

    Attributes:
        request: names the files of the current version.
        digest: of the current version; None until the first load has succeeded.
        generation: number of reloads.
        directory: the files of the current version; None for an adapter from memory.
        adapter: the current version while it is cached.
        is_pinned: whether it is exempt from eviction, in the cache and in its slot.
        is_added: whether the registry keeps it across restarts; an adapter from memory is kept only once it has files.
        problem: error of the last failed load.
        num_loads, load_s: number of loads, and the seconds they took.
        uid: number of the adapter in this process.
        lock: held during a load or change; see the module.
        reloaded_for: `id()` of requests with `load_inplace` whose reload is done.
    """

    request: LoRARequest
    digest: str | None = None
    generation: int = 0
    directory: Path | None = None
    adapter: Adapter | None = None
    is_pinned: bool = False
    is_added: bool = False
    problem: str | None = None
    num_loads: int = 0
    load_s: float = 0.0
    uid: int = field(default_factory=lambda: next(_uids))
    lock: threading.Lock = field(default_factory=threading.Lock)
    reloaded_for: "WeakValueDictionary[int, LoRARequest]" = field(default_factory=WeakValueDictionary)
    _version: Callable[[], Adapter | None] = lambda: None

    @property
    def name(self) -> str:
        """Name that requests use."""
        return self.request.lora_name

    @property
    def is_evictable(self) -> bool:
        """Whether it may be evicted: it is not pinned, and its files can be read again."""
        return not self.is_pinned and not self.request.is_from_memory

    @property
    def is_recorded(self) -> bool:
        """Whether the registry has a record of it."""
        return self.is_added and not self.request.is_from_memory

    @property
    def live_version(self) -> Adapter | None:
        """The current version if the cache, a slot or a request still holds it."""
        return self.adapter or self._version()

    def is_from(self, path: str) -> bool:
        """Return whether this adapter was read from this path, also if it is spelled differently."""
        return path == self.request.lora_path or _absolute(path) == _absolute(self.request.lora_path)

    def serves(self, request: LoRARequest) -> bool:
        """Return whether a request of this name can use this adapter: it has the same path, or accepts any path."""
        return request.load_inplace or request.only_known or self.is_from(request.lora_path)

    def is_version(self, adapter: Adapter) -> bool:
        """Return whether an adapter is the current version."""
        return (adapter.uid, adapter.generation) == (self.uid, self.generation)

    def wants_reload(self, request: LoRARequest) -> bool:
        """Return whether a request requires a reload that has not been done for it."""
        return request.load_inplace and self.digest is not None and id(request) not in self.reloaded_for

    def build(
        self, load_adapter: LoadAdapter, source: LoRARequest, files: AdapterFiles | None, *, is_reload: bool
    ) -> Adapter:
        """Build a version without making it the current one.

        Args:
            load_adapter: builds an adapter from its files and its name.
            source: where to read the files.
            files: used instead of reading.
            is_reload: build the next generation, with any content; else the digest must be the current one.

        Raises:
            AdapterError: it cannot be built, or the files have changed.
        """
        try:
            try:
                adapter = load_adapter(files or self._read(source, is_reload), self.name)
            except (OSError, MemoryError, RuntimeError) as error:  # disk failures, or no memory for the matrices
                reason = reason_of(error) or type(error).__name__
                raise AdapterError(f"adapter {self.name!r} could not be loaded: {reason}") from error
            if not is_reload and self.digest not in (None, adapter.digest):
                raise AdapterError(
                    f"adapter {self.name!r}: the files in {source.lora_path} changed since it was loaded (digest "
                    f"{str(self.digest)[:12]}, now {adapter.digest[:12]}); load_inplace=True or reload_lora accepts "
                    "the new files"
                )
        except AdapterError as error:
            if not is_reload:
                self.problem = str(error)
            _release(error)
            raise error
        return replace(adapter, uid=self.uid, generation=self.generation + is_reload)

    def set_version(self, source: LoRARequest, adapter: Adapter) -> None:
        """Make a version the current one, in host memory."""
        self.request = replace(source, lora_int_id=self.request.lora_int_id, load_inplace=False)
        self.digest, self.generation, self.directory = adapter.digest, adapter.generation, adapter.path
        self.adapter, self._version, self.problem = adapter, ref(adapter), None

    def _read(self, source: LoRARequest, is_reload: bool) -> AdapterFiles:
        """Read the files; after an eviction, from the directory that they were found in before."""
        if source.is_from_memory:
            raise AdapterNotFound(
                f"adapter {self.name!r} was given in memory and is not loaded; add_lora or reload_lora with tensors "
                "and config loads it"
            )
        if not is_reload and self.directory is not None and self.directory.is_dir():
            return read_adapter(self.directory, source.lora_path)
        return read_adapter(resolve_adapter_path(source.lora_path), source.lora_path)


class HostCache:
    """Adapters in host memory. Thread-safe: different adapters load concurrently, one adapter loads once.

    An evicted version stays alive while a slot or a request refers to it, and is then reused without a load.

    Args:
        load_adapter: builds an adapter from its files and its name, see `mmlora.lora.loading.load.load_adapter`.
        max_cpu_loras: capacity; unlimited by default. Pinned adapters and those from memory count, and are not evicted.
        max_pinned: maximum number of pinned adapters; unlimited by default.
        registry: records what `add` loads from a path, for the next start.

    Attributes:
        max_cpu_loras: see Args.
        num_loads, load_s: number of loads, and the seconds they took.
        num_evictions: number of adapters that were evicted.
        num_changes: incremented after the current version of an adapter was replaced or removed, or a pin changed.
        draining: uid by name of removed adapters whose names are still refused.
    """

    def __init__(
        self,
        load_adapter: LoadAdapter,
        *,
        max_cpu_loras: int | None = None,
        max_pinned: int | None = None,
        registry: AdapterRegistry | None = None,
    ) -> None:
        self.max_cpu_loras = max_cpu_loras
        self.num_loads = 0
        self.load_s = 0.0
        self.num_evictions = 0
        self.num_changes = 0
        self.draining: dict[str, int] = {}
        self._load_adapter = load_adapter
        self._max_pinned = max_pinned
        self._registry = registry
        self._lock = threading.Lock()
        self._entries: dict[str, CacheEntry] = {}
        self._cached: OrderedDict[str, CacheEntry] = OrderedDict()  # with an adapter, least recently used first
        self._reserved: set[str] = set()  # adapters being loaded that will not be evictable
        self._live: WeakSet[Adapter] = WeakSet()

    @property
    def entries(self) -> list[CacheEntry]:
        """Every known adapter, cached or not, in the order of its first load."""
        with self._lock:
            return list(self._entries.values())

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The cached adapters, least recently used first."""
        with self._lock:
            return tuple(entry.adapter for entry in self._cached.values() if entry.adapter is not None)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tracked adapters that are alive: in the cache, in a slot or used by a request."""
        with self._lock:
            return sum(adapter.num_bytes for adapter in self._live)

    def track(self, adapter: Adapter) -> None:
        """Count an adapter in `num_bytes` until it is garbage-collected."""
        with self._lock:
            self._live.add(adapter)

    def entry_of(self, adapter: Adapter) -> CacheEntry | None:
        """Return the entry whose current version an adapter is; None when it was removed or replaced."""
        entry = self._entries.get(adapter.name)
        return entry if entry is not None and entry.is_version(adapter) else None

    def find(self, lora: str | int) -> CacheEntry:
        """Return the entry of a name or id.

        Raises:
            AdapterNotFound: there is none.
        """
        for entry in self.entries:
            if lora in (entry.name, entry.request.lora_int_id):
                return entry
        known = ", ".join(repr(entry.name) for entry in self.entries[:10]) or "none"
        raise AdapterNotFound(f"no adapter {lora!r} is loaded; loaded adapters: {known}")

    def is_ready(self, request: LoRARequest) -> bool:
        """Return whether `get` needs no load."""
        entry = self._entries.get(request.lora_name)
        return entry is not None and entry.adapter is not None and not entry.wants_reload(request)

    def is_draining(self, name: str) -> bool:
        """Return whether an adapter of this name was removed while requests still run with it."""
        with self._lock:
            return name in self.draining and name not in self._entries

    def get(self, request: LoRARequest) -> Adapter:
        """Return the adapter of a request, loading it when it is not cached.

        With `load_inplace` the adapter is reloaded once for this request object; a failed reload keeps the old version.

        Raises:
            AdapterError: it cannot be loaded, its name or id belongs to another path, it is being unloaded, or its
                files changed since it was evicted. A failed load leaves no trace.
        """
        return self._get(request)

    def add(self, request: LoRARequest, files: AdapterFiles | None = None) -> Adapter:
        """Return the adapter of a request as `get` does, record it in the registry, and accept a draining name.

        Args:
            request: names the adapter.
            files: used instead of reading the path; they replace earlier files from memory.

        Raises:
            AdapterError: see `get`.
        """
        return self._get(request, files, is_added=True)

    def reload(self, lora: str | int, path: str | None = None, files: AdapterFiles | None = None) -> LoRARequest:
        """Load another version of a known adapter and swap it in atomically; running requests keep theirs.

        Args:
            lora: name or id.
            path: of the new version; by default the path of the current one.
            files: used instead of a path.

        Raises:
            AdapterError: the adapter is unknown or cannot be loaded; the current version stays.
        """
        with self._locked_entry(lora) as entry:
            path = f"{MEMORY}{entry.name}" if files is not None else path or entry.request.lora_path
            self._load_into_cache(entry, replace(entry.request, lora_path=path), files, is_reload=True)
            return entry.request

    def pin(self, lora: str | int) -> Adapter:
        """Load an adapter if it is not cached, and exempt it from eviction.

        Raises:
            AdapterError: it is unknown or cannot be loaded, or too many are pinned.
        """
        with self._locked_entry(lora) as entry:
            was_pinned = entry.is_pinned
            self._mark_pinned(entry)
            try:
                adapter = self._load_into_cache(entry, entry.request)
                self._record_pin(entry, True)
                return adapter
            except BaseException:
                self._set_pinned(entry, was_pinned)
                raise

    def unpin(self, lora: str | int) -> None:
        """Make an adapter evictable again.

        Raises:
            AdapterError: it is unknown, or the registry cannot be written.
        """
        with self._locked_entry(lora) as entry:
            self._record_pin(entry, False)
            self._set_pinned(entry, False)

    def unrecord(self, lora: str | int) -> None:
        """Remove an adapter from the registry, so that the next start does not load it; it stays in the cache.

        Raises:
            AdapterError: it is unknown, or the registry cannot be written.
        """
        with self._locked_entry(lora) as entry:
            self._unrecord(entry)

    def remove(self, lora: str | int) -> None:
        """Remove an adapter. Running requests keep it; new ones are refused until `forget_drained`.

        Raises:
            AdapterError: it is unknown, or the registry cannot be written.
        """
        with self._locked_entry(lora) as entry:
            self._unrecord(entry)
            with self._lock:
                self.draining[entry.name] = entry.uid
                self._forget(entry)

    def forget_drained(self, uids_in_use: Container[int]) -> None:
        """Free the names of removed adapters that no request uses any more."""
        with self._lock:
            self.draining = {name: uid for name, uid in self.draining.items() if uid in uids_in_use}

    def restore(self, record: AdapterRecord) -> CacheEntry:
        """Load an adapter that the registry recorded; `problem` of the returned entry is the error of a failed load."""
        entry = CacheEntry(record.request, record.digest, is_added=True)
        with self._lock:
            self._entries[entry.name] = entry
        try:
            if record.is_pinned:
                self._mark_pinned(entry)
            self.get(entry.request)
        except AdapterError as error:
            entry.problem = str(error)
        return entry

    def _get(self, request: LoRARequest, files: AdapterFiles | None = None, *, is_added: bool = False) -> Adapter:
        while True:
            entry, adapter = self._look_up(request, is_added)
            if adapter is not None:
                return adapter  # without the entry's lock, so that a running reload does not block it
            with entry.lock:
                if self._entries.get(entry.name) is entry and entry.serves(request):
                    return self._load_requested(entry, request, files, is_added)
            # Meanwhile another thread's first load failed, or the adapter was removed or reloaded: start again.

    def _look_up(self, request: LoRARequest, is_added: bool) -> tuple[CacheEntry, Adapter | None]:
        """Return the entry of a request, created if missing, and its cached adapter if no load is needed.

        Raises:
            AdapterError: the name or id belongs to another path, or the name may not be loaded.
        """
        name = request.lora_name
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                return self._new_entry(request, is_added), None
            if not entry.serves(request):
                raise _conflict(request, entry, "load_inplace=True replaces it, as does reload_lora")
            if is_added or entry.adapter is None or entry.wants_reload(request):
                return entry, None
            self._cached.move_to_end(name)
            return entry, entry.adapter

    def _new_entry(self, request: LoRARequest, is_added: bool) -> CacheEntry:
        """Register the name of a request; the caller holds the lock of the cache."""
        name = request.lora_name
        if name in self.draining and not is_added:
            raise AdapterNotFound(f"adapter {name!r} is being unloaded; add_lora loads it again")
        if request.only_known:
            raise AdapterNotFound(f"adapter {name!r} is not loaded any more")
        for other in self._entries.values():
            if other.request.lora_int_id == request.lora_int_id and not other.is_from(request.lora_path):
                raise _conflict(request, other, "choose another id")
        return self._entries.setdefault(name, CacheEntry(request))

    def _load_requested(
        self, entry: CacheEntry, request: LoRARequest, files: AdapterFiles | None, is_added: bool
    ) -> Adapter:
        is_reload = entry.wants_reload(request) or (files is not None and entry.digest is not None)
        source = request if is_reload else entry.request
        try:
            adapter = self._load_into_cache(entry, source, files, is_reload=is_reload, is_added=is_added)
        except BaseException:
            if entry.digest is None:
                with self._lock:
                    self._forget(entry)
            raise
        if request.load_inplace:
            entry.reloaded_for[id(request)] = request
        return adapter

    def _load_into_cache(
        self,
        entry: CacheEntry,
        source: LoRARequest,
        files: AdapterFiles | None = None,
        *,
        is_reload: bool = False,
        is_added: bool = False,
    ) -> Adapter:
        """Put the current version of an adapter into the cache, or with `is_reload` its next version."""
        with self._reserve_space(entry, source):
            adapter = None if is_reload else entry.live_version
            if adapter is None:
                adapter = self._build(entry, source, files, is_reload)
            if is_added or (is_reload and entry.is_added):
                self._record(entry, source, adapter.digest)  # before the swap, because it may fail
            with self._lock:
                self._insert(entry, source, adapter)
                if is_added:
                    entry.is_added = True
                    self.draining.pop(entry.name, None)
        return adapter

    def _build(self, entry: CacheEntry, source: LoRARequest, files: AdapterFiles | None, is_reload: bool) -> Adapter:
        start_s = time.monotonic()
        adapter = entry.build(self._load_adapter, source, files, is_reload=is_reload)
        load_s = time.monotonic() - start_s
        with self._lock:
            for counter in (entry, self):
                counter.num_loads += 1
                counter.load_s += load_s
        return adapter

    def _insert(self, entry: CacheEntry, source: LoRARequest, adapter: Adapter) -> None:
        """Cache a version and make it the current one, evicting others; the caller holds the lock of the cache."""
        is_replaced = not entry.is_version(adapter)
        self._live.add(adapter)
        entry.set_version(source, adapter)
        self.num_changes += is_replaced
        self._cached[entry.name] = entry
        self._cached.move_to_end(entry.name)
        if self.max_cpu_loras is None:
            return
        evictable = [other for other in self._cached.values() if other.is_evictable]
        for other in evictable[: max(0, len(self._cached) - self.max_cpu_loras)]:
            other.adapter = None
            del self._cached[other.name]
            self.num_evictions += 1

    def _forget(self, entry: CacheEntry) -> None:
        """Drop a name and its cached adapter; the caller holds the lock of the cache."""
        if self._entries.get(entry.name) is entry:
            del self._entries[entry.name]
            self._cached.pop(entry.name, None)
            entry.adapter = None
            self.num_changes += 1

    @contextmanager
    def _reserve_space(self, entry: CacheEntry, source: LoRARequest) -> Iterator[None]:
        """Reserve capacity during a load for an adapter that will not be evictable.

        Raises:
            AdapterError: the cache is full of adapters that cannot be evicted, and has none of this name.
        """
        is_fixed = entry.is_pinned or source.is_from_memory
        with self._lock:
            fixed = {other.name for other in self._cached.values() if not other.is_evictable} | self._reserved
            fixed.discard(entry.name)
            is_full = self.max_cpu_loras is not None and len(fixed) >= self.max_cpu_loras
            if is_full and (is_fixed or entry.adapter is None):
                raise AdapterError(
                    f"adapter {entry.name!r} cannot be loaded: the host LoRA cache is full; all "
                    f"max_cpu_loras={self.max_cpu_loras} adapters are pinned or from memory "
                    f"({', '.join(sorted(fixed)[:10])})"
                )
            if is_fixed:
                self._reserved.add(entry.name)
        try:
            yield
        finally:
            with self._lock:
                self._reserved.discard(entry.name)

    @contextmanager
    def _locked_entry(self, lora: str | int) -> Iterator[CacheEntry]:
        entry = self.find(lora)
        with entry.lock:
            if self._entries.get(entry.name) is not entry:
                raise AdapterNotFound(f"adapter {entry.name!r} was removed meanwhile")
            yield entry

    def _mark_pinned(self, entry: CacheEntry) -> None:
        with self._lock:  # check and set at once, so that two concurrent pins cannot exceed the limit
            self._check_pins(entry)
            entry.is_pinned = True
            self.num_changes += 1

    def _check_pins(self, entry: CacheEntry) -> None:
        pinned = [other.name for other in self._entries.values() if other is not entry and other.is_pinned]
        if self._max_pinned is not None and len(pinned) >= self._max_pinned:
            raise AdapterError(
                f"adapter {entry.name!r} cannot be pinned: at most {self._max_pinned} may be pinned, so that there is "
                f"room for others; pinned are {', '.join(pinned) or 'none'}"
            )

    def _set_pinned(self, entry: CacheEntry, is_pinned: bool) -> None:
        with self._lock:
            entry.is_pinned = is_pinned
            self.num_changes += 1

    def _record(self, entry: CacheEntry, source: LoRARequest, digest: str) -> None:
        if self._registry is None:
            return
        if source.is_from_memory:
            if entry.is_recorded:
                self._registry.remove(entry.name)
            return
        path = _absolute(source.lora_path)  # the next process may run in another directory
        self._registry.save(
            AdapterRecord(entry.name, entry.request.lora_int_id, path, source.base_model_name, digest, entry.is_pinned)
        )

    def _unrecord(self, entry: CacheEntry) -> None:
        if self._registry is not None and entry.is_recorded:
            self._registry.remove(entry.name)
            entry.is_added = False

    def _record_pin(self, entry: CacheEntry, is_pinned: bool) -> None:
        if self._registry is not None and entry.is_recorded:
            self._registry.mark_pinned(entry.name, is_pinned)


def _release(error: BaseException | None) -> None:
    """Free the tensors of a failed load: the frames of its traceback would keep them as long as the error lives."""
    while error is not None:
        error.__traceback__ = None
        error = error.__context__


def _conflict(request: LoRARequest, other: CacheEntry, remedy: str) -> AdapterError:
    return AdapterError(
        f"adapter {request.lora_name!r} (id {request.lora_int_id}) is requested from {request.lora_path!r}, but "
        f"{other.name!r} (id {other.request.lora_int_id}) is from {other.request.lora_path!r}; {remedy}"
    )


def _absolute(path: str) -> str:
    """Return the absolute path of a directory; other paths, such as Hub ids, unchanged."""
    try:
        directory = Path(path).expanduser()
        return str(directory.resolve()) if directory.is_dir() else path
    except (RuntimeError, OSError, ValueError):
        return path
