"""The host cache of adapters: who is who, least recently used out first, reloads that swap whole versions."""

import threading
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import replace

from mmlora.errors import AdapterError, AdapterNotFound
from mmlora.lora.adapter import Adapter
from mmlora.lora.loading.files import AdapterFiles
from mmlora.lora.request import MEMORY, LoRARequest
from mmlora.lora.store.host_cache import HostCache
from mmlora.lora.store.registry import AdapterRecord, AdapterRegistry
from mmlora.lora.store.stored_adapter import Load, StoredAdapter


class AdapterStore:
    """Load adapters on demand and keep the most recent ones on the host.

    Safe to use from several threads: different adapters load at once, one adapter loads once. A version that left the
    cache lives on for as long as somebody refers to it, and is taken back without a load while it does.

    Args:
        load: builds an adapter from its files and its name, see `load_adapter`.
        max_cpu_loras, max_pinned: see `HostCache`.
        registry: keeps what `add` loaded from a path across restarts.

    Attributes:
        host: what is in memory.
        num_loads, load_s: loads so far, and the seconds that they took.
    """

    def __init__(
        self,
        load: Load,
        *,
        max_cpu_loras: int | None = None,
        max_pinned: int | None = None,
        registry: AdapterRegistry | None = None,
    ) -> None:
        self.host = HostCache(max_cpu_loras, max_pinned)
        self.num_loads = 0
        self.load_s = 0.0
        self._load_adapter = load
        self._registry = registry
        self._lock = threading.Lock()
        self._entries: dict[str, StoredAdapter] = {}
        self._draining: dict[str, int] = {}  # name to uid of what was removed while requests run with it

    @property
    def entries(self) -> list[StoredAdapter]:
        """Everything known, on the host or not."""
        with self._lock:
            return list(self._entries.values())

    def entry_of(self, adapter: Adapter) -> StoredAdapter | None:
        """Return the entry whose present version an adapter is; None for one that was removed or replaced."""
        entry = self._entries.get(adapter.name)
        return entry if entry is not None and entry.is_version(adapter) else None

    def find(self, lora: str | int) -> StoredAdapter:
        """Return the entry of a name or id.

        Raises:
            AdapterNotFound: there is none.
        """
        for entry in self.entries:
            if lora in (entry.name, entry.request.lora_int_id):
                return entry
        known = ", ".join(repr(entry.name) for entry in self.entries[:10]) or "none"
        raise AdapterNotFound(f"no adapter {lora!r} is loaded; loaded are {known}")

    def is_ready(self, request: LoRARequest) -> bool:
        """Tell whether `get` would answer at once."""
        entry = self._entries.get(request.lora_name)
        return entry is not None and entry.adapter is not None and not entry.wants_reload(request)

    def get(self, request: LoRARequest) -> Adapter:
        """Return the adapter of a request, loading it when it is not on the host.

        With `load_inplace` the adapter is read again once for this request object; the old version stays in place
        unless the new one is good.

        Raises:
            AdapterError: it cannot be loaded, its name or id belongs to another path, it is being unloaded, or its
                files changed since it was evicted. Nothing of a failed load is kept.
        """
        return self._get(request)

    def is_draining(self, name: str) -> bool:
        """Tell whether an adapter of this name was removed and requests still run with it."""
        with self._lock:
            return name in self._draining and name not in self._entries

    def add(self, request: LoRARequest, files: AdapterFiles | None = None) -> Adapter:
        """Do as `get` for an adapter that is to stay known: in the registry, and though its name is being unloaded.

        Args:
            request: names it.
            files: in place of reading its path; they replace what was there from memory.

        Raises:
            AdapterError: see `get`.
        """
        return self._get(request, files, is_added=True)

    def reload(self, lora: str | int, path: str | None = None, files: AdapterFiles | None = None) -> LoRARequest:
        """Load another version of a known adapter aside and swap it in; requests that run keep theirs.

        Args:
            lora: name or id.
            path: to read, by default the one it was read from.
            files: in place of a path.

        Raises:
            AdapterError: it is unknown or cannot be loaded; the old version stays.
        """
        with self._locked(lora) as entry:
            path = f"{MEMORY}{entry.name}" if files is not None else path or entry.request.lora_path
            request = replace(entry.request, lora_path=path)
            self._bring(entry, request, files, is_reload=True, is_added=False)
            return entry.request

    def pin(self, lora: str | int) -> Adapter:
        """Load an adapter if need be, and never evict it from then on.

        Raises:
            AdapterError: it is unknown, cannot be loaded, or too many are pinned.
        """
        with self._locked(lora) as entry:
            was_pinned = entry.is_pinned
            self._mark_pinned(entry)
            try:
                adapter = self._bring(entry, entry.request, None, is_reload=False, is_added=False)
                self._record_pin(entry, True)
                return adapter
            except BaseException:
                entry.is_pinned = was_pinned
                raise

    def unpin(self, lora: str | int) -> None:
        """Let an adapter be evicted again.

        Raises:
            AdapterError: it is unknown, or the registry cannot be written.
        """
        with self._locked(lora) as entry:
            self._record_pin(entry, False)
            entry.is_pinned = False

    def remove(self, lora: str | int) -> None:
        """Forget an adapter; requests that run keep their version, new ones are refused until `forget_drained`.

        Raises:
            AdapterError: it is unknown, or the registry cannot be written.
        """
        with self._locked(lora) as entry:
            if self._registry is not None and entry.is_recorded:
                self._registry.remove(entry.name)
            with self._lock:
                self._forget(entry)
                self._draining[entry.name] = entry.uid

    def forget_drained(self, uids_in_use: Container[int]) -> None:
        """Free the names of removed adapters that no request uses any more."""
        if self._draining:
            with self._lock:
                self._draining = {name: uid for name, uid in self._draining.items() if uid in uids_in_use}

    def restore(self, record: AdapterRecord) -> StoredAdapter:
        """Take up an adapter from a registry; `problem` of the result says why it cannot be used, if so."""
        entry = StoredAdapter(record.request, record.digest, is_added=True)
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
            entry = self._find_or_register(request, is_added)
            adapter = None if is_added else self.host.use(entry, request)  # whoever reloads it meanwhile
            if adapter is not None:
                return adapter
            with entry.lock:
                if self._entries.get(entry.name) is entry and entry.serves(request):
                    return self._fetch(entry, request, files, is_added=is_added)
            # Another thread's first load of it failed meanwhile, or it was removed or reloaded: start again.

    def _find_or_register(self, request: LoRARequest, is_added: bool) -> StoredAdapter:
        name, path = request.lora_name, request.lora_path
        with self._lock:
            entry = self._entries.get(name)
            if entry is not None and entry.serves(request):
                return entry
            if entry is None and name in self._draining and not is_added:
                raise AdapterNotFound(f"adapter {name!r} is being unloaded; add_lora loads it again")
            if entry is None and request.only_known:
                raise AdapterNotFound(f"adapter {name!r} is not loaded any more")
            related = entry or self._owner_of_id(request)
            if related is not None:
                remedy = (
                    "load_inplace=True replaces it, as does reload_lora" if entry is not None else "choose another id"
                )
                raise AdapterError(
                    f"adapter {name!r} (id {request.lora_int_id}) is asked for from {path!r}, but {related.name!r} "
                    f"(id {related.request.lora_int_id}) is from {related.request.lora_path!r}; {remedy}"
                )
            return self._entries.setdefault(name, StoredAdapter(request))

    def _owner_of_id(self, request: LoRARequest) -> StoredAdapter | None:
        """The adapter of another place that has the id."""
        owners = (other for other in self._entries.values() if other.request.lora_int_id == request.lora_int_id)
        return next((other for other in owners if not other.is_from(request.lora_path)), None)

    def _fetch(
        self, entry: StoredAdapter, request: LoRARequest, files: AdapterFiles | None, *, is_added: bool
    ) -> Adapter:
        is_reload = entry.wants_reload(request) or (files is not None and entry.digest is not None)
        source = request if is_reload else entry.request
        try:
            adapter = self._bring(entry, source, files, is_reload=is_reload, is_added=is_added)
        except BaseException:
            if entry.digest is None:
                with self._lock:
                    self._forget(entry)
            raise
        if request.load_inplace:
            entry.reloaded_for[id(request)] = request
        return adapter

    def _bring(
        self, entry: StoredAdapter, source: LoRARequest, files: AdapterFiles | None, *, is_reload: bool, is_added: bool
    ) -> Adapter:
        """Have an adapter on the host: the present version, or the next one."""
        with self.host.room_for(entry, source):
            adapter = None if is_reload else entry.living_version
            if adapter is None:
                adapter = self._load(entry, source, files, is_reload)
            if is_added or (is_reload and entry.is_added):
                self._record(entry, source, adapter.digest)  # first, because it may fail
            self.host.keep(entry, source, adapter)
        if is_added:
            entry.is_added = True
            with self._lock:
                self._draining.pop(entry.name, None)
        return adapter

    def _load(self, entry: StoredAdapter, request: LoRARequest, files: AdapterFiles | None, is_reload: bool) -> Adapter:
        before_s = entry.load_s
        adapter = entry.load(self._load_adapter, request, files, is_reload=is_reload)
        with self._lock:
            self.num_loads, self.load_s = self.num_loads + 1, self.load_s + entry.load_s - before_s
        return adapter

    @contextmanager
    def _locked(self, lora: str | int) -> Iterator[StoredAdapter]:
        entry = self.find(lora)
        with entry.lock:
            if self._entries.get(entry.name) is not entry:
                raise AdapterNotFound(f"adapter {entry.name!r} was removed meanwhile")
            yield entry

    def _mark_pinned(self, entry: StoredAdapter) -> None:
        with self._lock:  # one at a time, so that no pin is overlooked
            self.host.mark_pinned(entry, self._entries.values())

    def _record(self, entry: StoredAdapter, source: LoRARequest, digest: str) -> None:
        record = entry.as_record(source, digest)
        if self._registry is not None and record is not None:
            self._registry.save(record)
        elif self._registry is not None and entry.is_recorded:
            self._registry.remove(entry.name)

    def _record_pin(self, entry: StoredAdapter, is_pinned: bool) -> None:
        if self._registry is not None and entry.is_recorded:
            self._registry.mark_pinned(entry.name, is_pinned)

    def _forget(self, entry: StoredAdapter) -> None:
        if self._entries.get(entry.name) is entry:
            del self._entries[entry.name]
            self.host.drop(entry)
