"""`LoRAManager`: the life cycle of adapters, on the host and in the slots, from loading to the last byte freed."""

import logging
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from mmlora.errors import AdapterError
from mmlora.lora.adapter import Adapter, AdapterIdentity
from mmlora.lora.layers.slots import LoRASlots
from mmlora.lora.loading.files import AdapterFiles, files_from_memory
from mmlora.lora.mix import LoRAMix
from mmlora.lora.request import MEMORY, LoRARequest
from mmlora.lora.store.info import LoRAInfo
from mmlora.lora.store.registry import AdapterRegistry
from mmlora.lora.store.store import AdapterStore
from mmlora.lora.store.stored_adapter import StoredAdapter

logger = logging.getLogger(__name__)

RUNTIME_LORA_IDS: Final = 2**61  # random ids are from here to twice that, far from those that callers choose
NUM_PREFETCH_THREADS: Final = 4


class LoRAManager:
    """Add, reload, pin and remove adapters while requests run.

    What changes the host may be called from any thread. `retain`, `release`, `place` and `settle` belong to the thread
    that runs the engine: it brings the slots in line between two steps.

    Args:
        store: adapters on the host.
        slots: adapters on the device.
        defaults: adapters that are always there, beside those of the store.
        registry: where to restore adapters from, now.
    """

    def __init__(
        self,
        store: AdapterStore,
        slots: LoRASlots,
        defaults: Sequence[Adapter] = (),
        registry: AdapterRegistry | None = None,
    ) -> None:
        self._store = store
        self._slots = slots
        self._defaults = {adapter.identity for adapter in defaults}
        self._num_requests: Counter[AdapterIdentity] = Counter()
        self._pins: dict[AdapterIdentity, int] = {}  # slots that are retained for pinned adapters
        self._resident: tuple[Adapter, ...] = ()  # as of the last `settle`, for other threads
        for adapter in defaults:
            store.host.count(adapter)
        for record in registry.records() if registry is not None else ():
            problem = store.restore(record).problem
            if problem is not None:
                logger.warning("adapter %r was not restored: %s", record.name, problem)

    @property
    def num_host_bytes(self) -> int:
        """Bytes of all adapter versions in host memory, those included that only requests or slots still hold."""
        return self._store.host.num_bytes

    @property
    def num_device_bytes(self) -> int:
        """Bytes of all adapter versions in the slots."""
        return sum(adapter.num_bytes for adapter in self._resident)

    @property
    def num_evictions(self) -> int:
        """Adapters that had to leave the host for others, so far."""
        return self._store.host.num_evictions

    @property
    def loads(self) -> tuple[int, float]:
        """Loads so far, and the seconds that they took."""
        return self._store.num_loads, self._store.load_s

    def is_on_device(self, adapter: Adapter) -> bool:
        """Tell whether a version of an adapter was in a slot after the last step."""
        return adapter in self._resident

    def add(
        self,
        lora: str | LoRARequest,
        path: str | None = None,
        *,
        tensors: Mapping[str, Any] | None = None,
        config: object | None = None,
    ) -> LoRARequest:
        """Load an adapter, from a path or from memory, and keep it known until `remove`.

        A name that is known from the same path stays as it is. Tensors replace those that the name had before, between
        two steps; they are copied.

        Args:
            lora: a name, or a request that holds name, id and path.
            path: directory or Hub id, see `LoRARequest`.
            tensors: in place of a path, as in `adapter_model.safetensors`.
            config: of the tensors, as in `adapter_config.json`, or PEFT's `LoraConfig`.

        Returns:
            What to pass as `lora_request`.

        Raises:
            AdapterError: it cannot be loaded, or the name belongs to another path; nothing was changed.
        """
        if isinstance(lora, LoRARequest) + (path is not None) + _is_in_memory(tensors, config) != 1:
            raise AdapterError(
                f"add_lora({lora!r}) takes a LoRARequest alone, or a name with either a path or tensors and config"
            )
        if isinstance(lora, LoRARequest):
            request = lora
        else:
            request = LoRARequest(lora, self._id_of(lora), path or f"{MEMORY}{lora}")
        self._store.add(request, _files(tensors, config))
        return self._store.find(request.lora_name).request

    def reload(
        self,
        lora: str | int,
        path: str | None = None,
        *,
        tensors: Mapping[str, Any] | None = None,
        config: object | None = None,
    ) -> LoRARequest:
        """Replace an adapter by another version at once; requests in flight finish on the version they started with.

        Args:
            lora: name or id.
            path: of the new version, by default where the old one came from.
            tensors, config: the new version, in place of a path.

        Returns:
            What to pass as `lora_request` from now on.

        Raises:
            AdapterError: it is unknown, or the new version cannot be loaded; the old one stays.
        """
        if path is not None and _is_in_memory(tensors, config):
            raise AdapterError(f"reload_lora({lora!r}) takes a path or tensors, not both")
        return self._store.reload(lora, path, _files(tensors, config))

    def remove(self, lora: str | int) -> None:
        """Unload an adapter: new requests are refused at once, its memory is freed when the last running one ends.

        Raises:
            AdapterNotFound: it is unknown.
            AdapterError: the registry cannot be written; the adapter stays.
        """
        self._store.remove(lora)

    def pin(
        self, lora: str | int, run_in_engine: Callable[[Callable[[], None]], None] = lambda function: function()
    ) -> Adapter:
        """Keep an adapter on the host and in a slot.

        Args:
            lora: name or id.
            run_in_engine: has the engine's thread call a function, and waits; by default, this is that thread.

        Raises:
            AdapterError: it is unknown, cannot be loaded, or too many are pinned; nothing was changed. Or the device
                has no room for it; then it is pinned no more.
        """
        adapter = self._store.pin(lora)
        try:
            run_in_engine(lambda: self.place(adapter))
        except BaseException:
            self._store.unpin(adapter.name)
            raise
        return adapter

    def unpin(self, lora: str | int) -> None:
        """Let an adapter leave the host and its slot again.

        Raises:
            AdapterError: it is unknown, or the registry cannot be written.
        """
        self._store.unpin(lora)

    def infos(self) -> list[LoRAInfo]:
        """The state of every adapter that is known, in the order in which they came."""
        resident = {adapter.identity for adapter in self._resident}
        num_requests = dict(self._num_requests)  # one step in C: the engine's thread goes on meanwhile
        return [_info(entry, resident, num_requests) for entry in self._store.entries]

    def is_missing(self, request: object) -> bool:
        """Tell whether a request as callers pass it asks for an adapter that has to be loaded first."""
        return not all(self._store.is_ready(part) for part in _parts(request))

    def prefetch(self, requests: Iterable[object]) -> None:
        """Load the adapters of requests side by side; whoever asks for one that cannot be loaded is told then.

        Args:
            requests: as callers pass them; only adapters count.
        """
        wanted = {part.lora_name: part for request in requests for part in _parts(request)}
        present = {entry.name for entry in self._store.entries if entry.adapter is not None}
        missing = [request for name, request in wanted.items() if name not in present]
        if len(missing) > 1:
            with ThreadPoolExecutor(NUM_PREFETCH_THREADS, thread_name_prefix="mmlora-prefetch") as pool:
                for request in missing[: self._store.host.max_adapters]:
                    pool.submit(self._store.get, request)

    def retain(self, adapter: Adapter) -> None:
        """Count a request that runs with a version of an adapter, or with a mix."""
        self._store.host.count(adapter)
        self._num_requests[adapter.identity] += 1

    def release(self, adapter: Adapter) -> None:
        """Count a request that ended."""
        self._num_requests[adapter.identity] -= 1
        if self._num_requests[adapter.identity] == 0:
            del self._num_requests[adapter.identity]

    def place(self, adapter: Adapter) -> None:
        """Put a pinned adapter into its slot now; if all are in use, it keeps the one that its next request gets.

        Raises:
            AdapterError: the device has no room for it.
        """
        if self._slots.max_loras > 1 and self._slots.can_activate(adapter):
            try:
                self._slots.activate(adapter)
            except Exception as error:
                raise AdapterError(f"adapter {adapter.name!r} could not be put into a slot: {error}") from error
        self.settle()

    def settle(self) -> None:
        """Bring the slots in line with the host: free versions that nobody can ask for any more, hold pinned ones."""
        kept = {adapter.identity for adapter in self._slots.resident if self._is_pinned(adapter)}
        for identity in self._pins.keys() - kept:
            self._slots.release(self._pins.pop(identity))
        for adapter in self._slots.resident:
            identity, slot = adapter.identity, self._slots.slot_of(adapter.identity)
            if identity in kept and identity not in self._pins and slot is not None:
                self._pins[identity] = slot
                self._slots.retain(slot)
            elif identity not in self._num_requests and not self._is_known(adapter):
                self._slots.evict(identity)
        self._store.forget_drained({uid for uid, _, _ in self._num_requests})
        self._resident = self._slots.resident

    def _is_known(self, adapter: Adapter) -> bool:
        return adapter.identity in self._defaults or self._store.entry_of(adapter) is not None

    def _is_pinned(self, adapter: Adapter) -> bool:
        entry = self._store.entry_of(adapter)
        return entry is not None and entry.is_pinned and self._slots.max_loras > 1

    def _id_of(self, name: str) -> int:
        """The id of a known name, else one that nobody has, in whatever process that shares the registry."""
        ids = {entry.name: entry.request.lora_int_id for entry in self._store.entries}
        return ids.get(name) or RUNTIME_LORA_IDS + secrets.randbelow(RUNTIME_LORA_IDS)


def _is_in_memory(tensors: object, config: object) -> bool:
    return tensors is not None or config is not None


def _files(tensors: object, config: object) -> AdapterFiles | None:
    return files_from_memory(config, tensors) if _is_in_memory(tensors, config) else None


def _info(
    entry: StoredAdapter, resident: Set[AdapterIdentity], num_requests: Mapping[AdapterIdentity, int]
) -> LoRAInfo:
    version = entry.living_version
    return LoRAInfo(
        entry.request,
        entry.digest,
        entry.generation,
        num_bytes=version.num_bytes if version is not None else 0,
        is_pinned=entry.is_pinned,
        is_on_host=entry.adapter is not None,
        is_on_device=version is not None and version.identity in resident,
        num_requests=sum(count for identity, count in num_requests.items() if identity[0] == entry.uid),
        num_loads=entry.num_loads,
        load_s=entry.load_s,
        problem=entry.problem,
    )


def _parts(request: object) -> list[LoRARequest]:
    if isinstance(request, LoRAMix):
        return [part for part, _ in request.parts]
    return [request] if isinstance(request, LoRARequest) else []
