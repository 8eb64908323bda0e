"""Life cycle of adapters that users see: add, reload, pin, remove and list, on the host and in the device slots."""

import logging
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from mmlora.errors import AdapterError
from mmlora.lora.adapter import Adapter, AdapterIdentity
from mmlora.lora.layers.slots import LoRASlots
from mmlora.lora.loading.files import AdapterFiles, files_from_memory
from mmlora.lora.mix import LoRAMix
from mmlora.lora.request import MEMORY, LoRARequest
from mmlora.lora.store.host_cache import CacheEntry, HostCache
from mmlora.lora.store.registry import AdapterRegistry

logger = logging.getLogger(__name__)

RUNTIME_LORA_IDS: Final = 2**61  # random ids start here and end below twice this, far from ids that callers choose
NUM_PREFETCH_THREADS: Final = 4


@dataclass(frozen=True)
class LoRAInfo:
    """State of one adapter.

    Attributes:
        request: pass it as `lora_request` to run the adapter.
        digest: of the current version; None until the first load has succeeded.
        generation: number of reloads.
        num_bytes: of the current version; 0 while nothing holds it in memory.
        is_pinned: whether it is exempt from eviction, on the host and in its slot.
        is_on_host, is_on_device: where the current version is.
        num_requests: unfinished requests on any version of it.
        num_loads, load_s: number of loads, and the seconds they took.
        problem: why it cannot be used; None when it can.
        rank: largest rank of its modules; 0 while nothing holds it in memory.
    """

    request: LoRARequest
    digest: str | None
    generation: int
    num_bytes: int
    is_pinned: bool
    is_on_host: bool
    is_on_device: bool
    num_requests: int
    num_loads: int
    load_s: float
    problem: str | None
    rank: int = 0

    @property
    def name(self) -> str:
        """Name that requests use."""
        return self.request.lora_name


class LoRAManager:
    """Adds, reloads, pins and removes adapters while requests run.

    Changes of the host cache may come from any thread. `retain`, `release`, `activate_pinned` and `sync_slots` must not
    run during a step of another thread.

    Args:
        cache: adapters in host memory.
        slots: adapters on the device.
        defaults: adapters outside the cache that are always available.
        registry: adapters to restore now.
    """

    def __init__(
        self,
        cache: HostCache,
        slots: LoRASlots,
        defaults: Sequence[Adapter] = (),
        registry: AdapterRegistry | None = None,
    ) -> None:
        self.cache = cache
        self._slots = slots
        self._defaults = {adapter.identity for adapter in defaults}
        self._num_requests: Counter[AdapterIdentity] = Counter()
        self._pins: dict[AdapterIdentity, int] = {}  # slots retained for pinned adapters
        self._resident: tuple[Adapter, ...] = ()  # as of the last `sync_slots`, for other threads
        self._synced: tuple[int, int] | None = None  # numbers of changes at the last `sync_slots`; None: sync again
        for adapter in defaults:
            cache.track(adapter)
        for record in registry.records() if registry is not None else ():
            problem = cache.restore(record).problem
            if problem is not None:
                logger.warning("adapter %r was not restored: %s", record.name, problem)

    @property
    def num_device_bytes(self) -> int:
        """Bytes of all adapter versions in the slots."""
        return sum(adapter.num_bytes for adapter in self._resident)

    def is_on_device(self, adapter: Adapter) -> bool:
        """Return whether a version of an adapter was in a slot after the last step."""
        return adapter in self._resident

    def add(
        self,
        lora: str | LoRARequest,
        path: str | None = None,
        *,
        tensors: Mapping[str, Any] | None = None,
        config: object | None = None,
    ) -> LoRARequest:
        """Load an adapter from a path or from memory, and keep it known until `remove`.

        A name that is known from the same path stays as it is. Tensors replace earlier ones of the same name between
        two steps; they are copied.

        Args:
            lora: a name, or a request with name, id and path.
            path: directory or Hub id, see `LoRARequest`.
            tensors: used instead of a path; with the keys of `adapter_model.safetensors`.
            config: of the tensors: the content of `adapter_config.json`, or PEFT's `LoraConfig`.

        Returns:
            The request to pass as `lora_request`.

        Raises:
            AdapterError: it cannot be loaded, or the name belongs to another path; nothing has changed.
        """
        if isinstance(lora, LoRARequest) + (path is not None) + _is_in_memory(tensors, config) != 1:
            raise AdapterError(
                f"add_lora({lora!r}) takes a LoRARequest alone, or a name with either a path or tensors and config"
            )
        if isinstance(lora, LoRARequest):
            request = lora
        else:
            request = LoRARequest(lora, self._id_of(lora), path or f"{MEMORY}{lora}")
        self.cache.add(request, _files(tensors, config))
        return self.cache.find(request.lora_name).request

    def reload(
        self,
        lora: str | int,
        path: str | None = None,
        *,
        tensors: Mapping[str, Any] | None = None,
        config: object | None = None,
    ) -> LoRARequest:
        """Replace an adapter by another version; running requests finish on the version they started with.

        Args:
            lora: name or id.
            path: of the new version; by default the path of the current one.
            tensors, config: the new version, instead of a path.

        Returns:
            The request to pass as `lora_request` from now on.

        Raises:
            AdapterError: the adapter is unknown, or the new version cannot be loaded; the current one stays.
        """
        if path is not None and _is_in_memory(tensors, config):
            raise AdapterError(f"reload_lora({lora!r}) takes a path or tensors, not both")
        return self.cache.reload(lora, path, _files(tensors, config))

    def remove(self, lora: str | int) -> None:
        """Unload an adapter: new requests are refused at once; its memory is freed when its last request ends.

        Raises:
            AdapterNotFound: it is unknown.
            AdapterError: the registry cannot be written; the adapter stays.
        """
        self.cache.remove(lora)

    def pin(
        self, lora: str | int, run_in_engine: Callable[[Callable[[], None]], None] = lambda function: function()
    ) -> Adapter:
        """Exempt an adapter from eviction, on the host and in a slot.

        Args:
            lora: name or id.
            run_in_engine: calls a function while no step runs, and waits; by default, at once.

        Raises:
            AdapterError: it is unknown or cannot be loaded, too many are pinned, or the device has no room for it; it
                is not pinned then.
        """
        adapter = self.cache.pin(lora)
        try:
            run_in_engine(lambda: self.activate_pinned(adapter))
        except BaseException:
            self.cache.unpin(adapter.name)
            raise
        return adapter

    def unpin(self, lora: str | int) -> None:
        """Make an adapter evictable again, on the host and in its slot.

        Raises:
            AdapterError: it is unknown, or the registry cannot be written.
        """
        self.cache.unpin(lora)

    def list_infos(self) -> list[LoRAInfo]:
        """Return the state of every known adapter, in the order of their first loads. Safe in any thread."""
        resident = {adapter.identity for adapter in self._resident}
        num_requests = dict(self._num_requests)  # one step in C, atomic while the engine thread continues
        return [_info(entry, resident, num_requests) for entry in self.cache.entries]

    def is_missing(self, lora_request: object) -> bool:
        """Return whether a request names an adapter that has to be loaded first."""
        return not all(self.cache.is_ready(request) for request in _requests_in(lora_request))

    def prefetch(self, lora_requests: Iterable[object]) -> None:
        """Load missing adapters concurrently. A failed load is not raised here: each request repeats and reports it.

        Args:
            lora_requests: as callers pass them; entries without an adapter are skipped.
        """
        wanted = {request.lora_name: request for entry in lora_requests for request in _requests_in(entry)}
        cached = {entry.name for entry in self.cache.entries if entry.adapter is not None}
        missing = [request for name, request in wanted.items() if name not in cached]
        if len(missing) > 1:
            with ThreadPoolExecutor(NUM_PREFETCH_THREADS, thread_name_prefix="mmlora-prefetch") as pool:
                for request in missing[: self.cache.max_cpu_loras]:
                    pool.submit(self.cache.get, request)

    def retain(self, adapter: Adapter) -> None:
        """Count a request that runs with a version of an adapter, or with a mix."""
        if adapter.uid == 0:  # a mix; other adapters are tracked since their load
            self.cache.track(adapter)
        self._num_requests[adapter.identity] += 1

    def release(self, adapter: Adapter) -> None:
        """Count a request that ended."""
        self._num_requests[adapter.identity] -= 1
        if self._num_requests[adapter.identity] == 0:
            del self._num_requests[adapter.identity]
            self._synced = None

    def activate_pinned(self, adapter: Adapter) -> None:
        """Load a pinned adapter into a slot now; if all slots are in use, its next request gets it one to keep.

        Raises:
            AdapterError: the device has no room for it.
        """
        if self._slots.max_loras > 1 and self._slots.can_activate(adapter):
            try:
                self._slots.activate(adapter)
            except Exception as error:
                raise AdapterError(f"adapter {adapter.name!r} could not be put into a slot: {error}") from error
        self.sync_slots()

    def sync_slots(self) -> None:
        """Sync the slots with the host cache: retain pinned versions, and free versions that no request can get.

        Returns at once if cache and slots have not changed since the last call and no adapter lost its last request.
        """
        changes = self.cache.num_changes, self._slots.num_changes
        if self._synced == changes:
            return
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
        if self.cache.draining:
            self.cache.forget_drained({uid for uid, _, _ in self._num_requests})
        self._resident = self._slots.resident
        self._synced = changes[0], self._slots.num_changes  # a change of the cache during the sync needs another one

    def _is_known(self, adapter: Adapter) -> bool:
        return adapter.identity in self._defaults or self.cache.entry_of(adapter) is not None

    def _is_pinned(self, adapter: Adapter) -> bool:
        if self._slots.max_loras == 1 or adapter.identity in self._defaults:
            return False
        entry = self.cache.entry_of(adapter)
        return entry is not None and entry.is_pinned

    def _id_of(self, name: str) -> int:
        """Return the id of a known name, else a random one, unique among all processes that share the registry."""
        ids = {entry.name: entry.request.lora_int_id for entry in self.cache.entries}
        return ids.get(name) or RUNTIME_LORA_IDS + secrets.randbelow(RUNTIME_LORA_IDS)


def _is_in_memory(tensors: object, config: object) -> bool:
    return tensors is not None or config is not None


def _files(tensors: object, config: object) -> AdapterFiles | None:
    return files_from_memory(config, tensors) if _is_in_memory(tensors, config) else None


def _info(entry: CacheEntry, resident: Set[AdapterIdentity], num_requests: Mapping[AdapterIdentity, int]) -> LoRAInfo:
    version = entry.live_version
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
        rank=version.report.max_rank if version is not None else 0,
    )


def _requests_in(lora_request: object) -> list[LoRARequest]:
    if isinstance(lora_request, LoRAMix):
        return [request for request, _ in lora_request.parts]
    return [lora_request] if isinstance(lora_request, LoRARequest) else []
