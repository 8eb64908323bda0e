"""`StoredAdapter`: what the host remembers of one name, whether its matrices are on the host or not."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final
from weakref import WeakValueDictionary, ref

from mmlora.errors import AdapterError, AdapterNotFound
from mmlora.lora.adapter import Adapter
from mmlora.lora.loading.files import AdapterFiles, read_adapter, resolve_adapter_path
from mmlora.lora.request import LoRARequest
from mmlora.lora.store.registry import AdapterRecord

Load = Callable[[AdapterFiles, str], Adapter]
_uids: Final = itertools.count(1)


@dataclass(eq=False)
class StoredAdapter:
    """One adapter by its name.

    Attributes:
        request: what loads its present version.
        digest: of that version; None until the first load has succeeded.
        generation: count of reloads.
        directory: where the files of that version lie; None for one from memory.
        adapter: the version, while it is kept on the host.
        is_pinned: it is not to leave the host, nor its slot.
        is_added: it is to stay known across restarts, for as long as there are files to read it from.
        problem: why it could not be loaded the last time.
        num_loads: times that it was loaded.
        load_s: seconds that this took.
        lock: admits one load or change at a time.
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
    reloaded_for: "WeakValueDictionary[int, LoRARequest]" = field(default_factory=WeakValueDictionary)  # by id()
    _version: Callable[[], Adapter | None] = lambda: None

    @property
    def name(self) -> str:
        """What callers call it."""
        return self.request.lora_name

    @property
    def is_fixed(self) -> bool:
        """Whether it may not be evicted: it is pinned, or there is nothing to read it from again."""
        return self.is_pinned or self.request.is_from_memory

    @property
    def is_recorded(self) -> bool:
        """Whether a registry holds it."""
        return self.is_added and not self.request.is_from_memory

    @property
    def living_version(self) -> Adapter | None:
        """The present version if it is on the host, or is still held by a slot or a request."""
        return self.adapter or self._version()

    def is_from(self, path: str) -> bool:
        """Tell whether a path leads to where this adapter was read from."""
        return path == self.request.lora_path or _location(path) == _location(self.request.lora_path)

    def serves(self, request: LoRARequest) -> bool:
        """Tell whether a request of its name means this adapter, wherever it is read from or from the same place."""
        return request.load_inplace or request.only_known or self.is_from(request.lora_path)

    def is_version(self, adapter: Adapter) -> bool:
        """Tell whether this is the version that requests get now."""
        return (adapter.uid, adapter.generation) == (self.uid, self.generation)

    def wants_reload(self, request: LoRARequest) -> bool:
        """Tell whether a request asks for a reload that was not done for it yet."""
        return request.load_inplace and self.digest is not None and id(request) not in self.reloaded_for

    def load(self, load: Load, request: LoRARequest, files: AdapterFiles | None, *, is_reload: bool) -> Adapter:
        """Build a version aside, under this entry's identity; nothing changes here but the statistics.

        Args:
            load: builds an adapter.
            request: where to read it.
            files: in place of reading.
            is_reload: it is to be the next generation, whatever it holds.

        Raises:
            AdapterError: it cannot be built, or is not what it was before.
        """
        start_s = time.monotonic()
        try:
            with _named_failure(self.name):
                adapter = load(files or self._read(request, is_reload), self.name)
            if not is_reload and self.digest not in (None, adapter.digest):
                raise AdapterError(
                    f"adapter {self.name!r}: the files in {adapter.path} changed since it was loaded (digest "
                    f"{str(self.digest)[:12]}, now {adapter.digest[:12]}); load_inplace=True or reload_lora takes "
                    "the new ones"
                )
        except AdapterError as error:
            if not is_reload:
                self.problem = str(error)
            raise
        self.num_loads += 1
        self.load_s += time.monotonic() - start_s
        return adapter.with_identity(self.uid, self.generation + is_reload)

    def take(self, request: LoRARequest, adapter: Adapter) -> None:
        """Make a version the present one, on the host."""
        self.request = replace(request, lora_int_id=self.request.lora_int_id, load_inplace=False)
        self.digest, self.generation, self.directory = adapter.digest, adapter.generation, adapter.path
        self.adapter, self._version, self.problem = adapter, ref(adapter), None

    def as_record(self, request: LoRARequest, digest: str) -> AdapterRecord | None:
        """What the registry is to hold of a version; None for one from memory."""
        if request.is_from_memory:
            return None
        path = _location(request.lora_path)  # absolute: the next process may run in another directory
        return AdapterRecord(self.name, self.request.lora_int_id, path, request.base_model_name, digest, self.is_pinned)

    def _read(self, request: LoRARequest, is_reload: bool) -> AdapterFiles:
        """Read the files; what comes back after an eviction is read from where it was found before."""
        if request.is_from_memory:
            raise AdapterNotFound(
                f"adapter {self.name!r} was given in memory and is not loaded; add_lora or reload_lora with tensors "
                "and config loads it"
            )
        if not is_reload and self.directory is not None and self.directory.is_dir():
            return read_adapter(self.directory)
        return read_adapter(resolve_adapter_path(request.lora_path))


@contextmanager
def _named_failure(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:  # the disk is gone, or there is no memory for the matrices
        raise AdapterError(f"adapter {name!r} could not be loaded: {str(error) or type(error).__name__}") from error


def _location(path: str) -> str:
    try:
        directory = Path(path).expanduser()
        return str(directory.resolve()) if directory.is_dir() else path
    except (RuntimeError, OSError, ValueError):
        return path
