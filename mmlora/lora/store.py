"""The host cache of adapters: who is who, least recently used out first, reloads that swap whole versions."""

import itertools
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from weakref import WeakValueDictionary

import torch

from mmlora.errors import AdapterError
from mmlora.lora.adapter import Adapter
from mmlora.lora.files import read_adapter, resolve_adapter_path
from mmlora.lora.load import load_adapter
from mmlora.lora.module_index import ModuleIndex
from mmlora.lora.request import LoRARequest

_uids: Final = itertools.count(1)
_Key = tuple[str, int]


@dataclass(eq=False)
class _Entry:
    """What is remembered of an adapter, evicted or not. `lock` admits one load at a time."""

    key: _Key
    path: str
    uid: int = field(default_factory=lambda: next(_uids))
    lock: threading.Lock = field(default_factory=threading.Lock)
    generation: int = 0
    digest: str | None = None  # None until the first load has succeeded
    adapter: Adapter | None = None
    is_pinned: bool = False
    reloaded_for: "WeakValueDictionary[int, LoRARequest]" = field(default_factory=WeakValueDictionary)  # by id()


class AdapterStore:
    """Load adapters on demand and keep the most recent ones on the host.

    Safe to use from several threads: different adapters load at once, one adapter loads once. A version that left the
    cache lives on for as long as somebody refers to it.

    Args:
        index: modules of the model.
        dtype: of the matrices.
        max_cpu_loras: adapters kept on the host, pinned ones included and never evicted; unlimited without it.
        max_lora_rank, strict, allow_media_parts: see `load_adapter`.
    """

    def __init__(
        self,
        index: ModuleIndex,
        *,
        dtype: torch.dtype,
        max_cpu_loras: int | None = None,
        max_lora_rank: int | None = None,
        strict: bool = True,
        allow_media_parts: bool = True,
    ) -> None:
        self._index = index
        self._dtype = dtype
        self._max_cpu_loras = max_cpu_loras
        self._max_lora_rank = max_lora_rank
        self._strict = strict
        self._allow_media_parts = allow_media_parts
        self._lock = threading.Lock()
        self._entries: dict[_Key, _Entry] = {}
        self._loaded: OrderedDict[_Key, _Entry] = OrderedDict()  # least recently used first

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """Adapters on the host, least recently used first."""
        with self._lock:
            return tuple(entry.adapter for entry in self._loaded.values() if entry.adapter is not None)

    def get(self, request: LoRARequest) -> Adapter:
        """Return the adapter of a request, loading it when it is not on the host.

        With `load_inplace` the adapter is read again once for this request object; the old version stays in place
        unless the new one is good.

        Raises:
            AdapterError: it cannot be loaded, its name or id belongs to another path, or its files changed since it
                was evicted. Nothing of a failed load is kept.
        """
        return self._get(request, is_pinned=False)

    def pin(self, request: LoRARequest) -> Adapter:
        """Do as `get`, and never evict the adapter from then on."""
        return self._get(request, is_pinned=True)

    def remove(self, lora_name: str) -> bool:
        """Forget an adapter; requests that run with it keep their version. Tell whether it was known."""
        with self._lock:
            keys = [key for key in self._entries if key[0] == lora_name]
            for key in keys:
                self._forget(self._entries[key])
        return bool(keys)

    def _get(self, request: LoRARequest, is_pinned: bool) -> Adapter:
        while True:
            entry = self._find_or_register(request)
            with entry.lock:
                if self._is_current(entry):
                    adapter = self._adapter_of(entry, request)
                    self._keep(entry, adapter, is_pinned)
                    return adapter
            # Another thread's first load of it failed meanwhile, or it was removed: start again.

    def _find_or_register(self, request: LoRARequest) -> _Entry:
        key = (request.lora_name, request.lora_int_id)
        with self._lock:
            exact = self._entries.get(key)
            if exact is not None:
                related = [exact]
            else:
                related = [
                    entry for entry in self._entries.values() if entry.key[0] == key[0] or entry.key[1] == key[1]
                ]
            if request.load_inplace:
                replaced = next((entry for entry in related if entry.key[0] == key[0]), None)
                if replaced is not None:
                    return replaced
            for entry in related:
                if not _same_location(entry.path, request.lora_path):
                    remedy = "load_inplace=True replaces it" if entry.key[0] == key[0] else "choose another id"
                    raise AdapterError(
                        f"adapter {key[0]!r} (id {key[1]}) is asked for from {request.lora_path!r}, but "
                        f"{entry.key[0]!r} (id {entry.key[1]}) is from {entry.path!r}; {remedy}"
                    )
            return exact or self._entries.setdefault(key, _Entry(key, request.lora_path))

    def _is_current(self, entry: _Entry) -> bool:
        with self._lock:
            return self._entries.get(entry.key) is entry

    def _adapter_of(self, entry: _Entry, request: LoRARequest) -> Adapter:
        is_reload = request.load_inplace and entry.digest is not None and id(request) not in entry.reloaded_for
        adapter = entry.adapter
        if adapter is None or is_reload:
            path = request.lora_path if is_reload else entry.path
            adapter = self._load(entry, path, is_reload)
            entry.path, entry.digest, entry.generation = path, adapter.digest, adapter.generation
        if request.load_inplace:
            entry.reloaded_for[id(request)] = request
        return adapter

    def _keep(self, entry: _Entry, adapter: Adapter, is_pinned: bool) -> None:
        with self._lock:
            if self._entries.get(entry.key) is not entry:
                return
            entry.adapter, entry.is_pinned = adapter, entry.is_pinned or is_pinned
            self._loaded[entry.key] = entry
            self._loaded.move_to_end(entry.key)
            if self._max_cpu_loras is not None:
                idle = [other for other in self._loaded.values() if other is not entry and not other.is_pinned]
                for other in idle[: max(0, len(self._loaded) - self._max_cpu_loras)]:
                    other.adapter = None
                    del self._loaded[other.key]

    def _load(self, entry: _Entry, path: str, is_reload: bool) -> Adapter:
        try:
            adapter = load_adapter(
                read_adapter(resolve_adapter_path(path)),
                entry.key[0],
                self._index,
                dtype=self._dtype,
                max_lora_rank=self._max_lora_rank,
                strict=self._strict,
                allow_media_parts=self._allow_media_parts,
            )
        except BaseException:
            if entry.digest is None:
                with self._lock:
                    self._forget(entry)
            raise
        if not is_reload and entry.digest not in (None, adapter.digest):
            raise AdapterError(
                f"adapter {entry.key[0]!r}: the files in {adapter.path} changed since it was loaded (digest "
                f"{str(entry.digest)[:12]}, now {adapter.digest[:12]}); load_inplace=True takes the new ones"
            )
        return adapter.with_identity(entry.uid, entry.generation + is_reload)

    def _forget(self, entry: _Entry) -> None:
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
            self._loaded.pop(entry.key, None)


def _same_location(path: str, other: str) -> bool:
    return path == other or _location(path) == _location(other)


def _location(path: str) -> str:
    try:
        directory = Path(path).expanduser()
        return str(directory.resolve()) if directory.is_dir() else path
    except (RuntimeError, OSError, ValueError):
        return path
