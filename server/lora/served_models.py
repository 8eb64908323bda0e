"""Names that clients may request: the base model, its aliases and adapters, with their `/v1/models` cards.

`ServedModels` converts the `model` and `lora` fields of a request to the engine's `lora_request`: an explicit adapter,
`BASE`, or None to let the engine choose.
"""

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Final, TypeGuard
from weakref import WeakValueDictionary

from mmlora.errors import AdapterError, AdapterNotFound, RequestError
from mmlora.lora.adapter import AdapterReport
from mmlora.lora.mix import MAX_MIX_PARTS, LoRAMix
from mmlora.lora.request import BASE, LoRARequest
from mmlora.lora.resolution import LoRAResolution
from mmlora.server.errors import Refusal
from mmlora.utils.text import is_finite_number, shorten

logger = logging.getLogger(__name__)

MAX_NAMES: Final = 8  # in one message: there may be thousands of adapters
MAX_NAME_CHARS: Final = 40

ModelCard = dict[str, Any]
LoRAField = str | list[dict[str, Any]] | None


@dataclass(frozen=True)
class ServedAdapter:
    """Adapter under the name that clients use for it.

    It has no reference to the weights, which may be evicted from the host while the name is served.

    Attributes:
        name: value of `model` and `lora` that selects it.
        request: passed to the engine.
        digest, report: of the loaded adapter.
        default_for: key of a default adapter, such as `audio`; None for other adapters.
        problem: why requests for it fail; None if they do not.
    """

    name: str
    request: LoRARequest
    digest: str | None
    report: AdapterReport
    default_for: str | None = None
    problem: str | None = None

    def __post_init__(self) -> None:
        # A request may be in preparation while its adapter is replaced or unloaded: `only_known` then makes it fail
        # instead of loading the adapter again. Default adapters are recognized by the identity of their request.
        if self.default_for is None:
            object.__setattr__(self, "request", replace(self.request, only_known=True))

    def describe(self) -> dict[str, Any]:
        """Return the `adapter` field of its model card."""
        return {
            "name": self.request.lora_name,
            "lora_int_id": self.request.lora_int_id,
            "digest": self.digest,
            "default_for": self.default_for,
            "matched": self.report.matched,
            "parts": dict(self.report.parts),
            "unmatched": list(self.report.unmatched),
            "problem": self.problem,
        }


class NameLocks:
    """One lock per name; a lock exists only while a thread holds it or waits for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._locks: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Hold the lock of a name."""
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            yield


class ServedModels:
    """All names of one server. Thread-safe.

    Attributes:
        base_name: the main name of the base model.
        resolution: asks resolvers for names that are not served; None without resolvers.
        name_locks: a name's lock is held from before its adapter is loaded or unloaded until the name is served or
            removed.

    Args:
        base_name: the main name of the base model.
        root: path or Hub id of the base model.
        max_model_len: maximum number of prompt and output tokens.
        adapters: named adapters and defaults with unique names; the name of a default is its key, such as `audio`.
        aliases: other names of the base model.
    """

    def __init__(
        self,
        base_name: str,
        root: str,
        max_model_len: int,
        adapters: Iterable[ServedAdapter] = (),
        aliases: Iterable[str] = (),
    ) -> None:
        self.base_name = base_name
        self._base_names = (base_name, *aliases)
        self._root = root
        self._max_model_len = max_model_len
        self._created_s = int(time.time())
        self.resolution: LoRAResolution | None = None
        self.name_locks = NameLocks()
        self._lock = threading.Lock()
        # Copy-on-write: replaced as a whole under the lock, so that readers need no lock.
        self._adapters = {adapter.name: adapter for adapter in adapters}

    @property
    def names(self) -> list[str]:
        """All valid values of the `model` field."""
        return [*self._base_names, *self._adapters]

    @property
    def adapters(self) -> Mapping[str, ServedAdapter]:
        """A snapshot of the served adapters by name."""
        return self._adapters

    def is_base(self, name: str) -> bool:
        """Return whether a name is one of the base model's."""
        return name in self._base_names

    def add_adapter(self, adapter: ServedAdapter, *, replace: bool = False) -> None:
        """Start serving an adapter.

        Args:
            adapter: the adapter with its name.
            replace: replace a served adapter of this name, unless that is a default.

        Raises:
            RequestError: the name is taken.
        """
        with self._lock:
            taken = self._adapters.get(adapter.name)
            may_replace = replace and taken is not None and taken.default_for is None
            if self.is_base(adapter.name) or (taken is not None and not may_replace):
                raise RequestError(f"the name {shorten(adapter.name)} is taken; {self._list_names()}")
            self._adapters = {**self._adapters, adapter.name: adapter}

    def find_removable(self, name: str) -> ServedAdapter:
        """Return a served adapter that may be removed.

        Raises:
            RequestError: it is a default, which cannot be unloaded.
            AdapterNotFound: there is no adapter of this name.
        """
        adapter = self._adapters.get(name)
        if adapter is None:
            raise AdapterNotFound(f"the adapter {shorten(name)} does not exist; {self._list_names()}")
        if adapter.default_for is not None:
            raise RequestError(f"the adapter {name!r} is the default for {adapter.default_for} and cannot be unloaded")
        return adapter

    def remove_adapter(self, name: str) -> ServedAdapter:
        """Stop serving an adapter and return it. The caller removes it from the engine.

        Raises:
            RequestError, AdapterNotFound: see `find_removable`.
        """
        with self._lock:
            adapter = self.find_removable(name)
            self._adapters = {other: self._adapters[other] for other in self._adapters if other != name}
            return adapter

    async def find_adapter(self, model: str | None, lora: LoRAField) -> LoRARequest | object | None:
        """Ask the resolvers for each name that is not served, then select as `select_adapter` does.

        Raises:
            Refusal, RequestError: see `select_adapter`.
            AdapterError: a resolver found an adapter that cannot be used.
            ResolverError: a resolver failed, and no other found the adapter.
        """
        parts = self._parse_fields(model, lora)
        if self.resolution is not None:
            # `select_adapter` reports a name that is not found, and its field; skip the remaining names.
            with suppress(AdapterNotFound):
                for name in [model or self.base_name, *(name for name, _ in parts)]:
                    if name not in self.names:
                        await self.resolution.resolve(name)
        return self.select_adapter(model, lora)

    def select_adapter(self, model: str | None, lora: LoRAField) -> LoRARequest | object | None:
        """Return the adapter to apply, `BASE`, or None for the automatic choice.

        Args:
            model: the base model's name (automatic choice), an adapter's, or a default's key; None and "" are the base.
            lora: None (as `model` says), `[]` (explicitly the base model), a name, or
                `[{"name": …, "scale": …}, …]`.

        Raises:
            RequestError: the fields contradict each other, or `lora` has another form.
            Refusal: 404 for an unknown name.
        """
        parts = self._parse_fields(model, lora)
        adapters = self._adapters
        named = None
        if self._names_adapter(model):
            named = adapters.get(model)
            if named is None:
                message = f"the model {shorten(model)} does not exist; {self._list_names()}"
                raise Refusal(404, message, param="model", code="model_not_found")
        if lora is None:
            return named.request if named else None
        chosen = [(_served_adapter(adapters, name).request, scale) for name, scale in parts]
        if not chosen:
            return BASE
        return chosen[0][0] if len(chosen) == 1 and chosen[0][1] == 1 else LoRAMix(chosen)

    @contextmanager
    def log_failures(self, model: str | None, lora: LoRAField) -> Iterator[None]:
        """Log adapter failures; clients get a generic 500, so that file paths do not leak.

        Args:
            model, lora: fields of the request.

        Raises:
            Refusal: 500 in place of an `AdapterError`; 404 if the adapter was unloaded in the meantime.
        """
        try:
            yield
        except AdapterError as error:
            self.select_adapter(model, lora)
            logger.exception("a served adapter cannot be used")
            message = "the adapter of this request cannot be used; see the server's log for the reason"
            raise Refusal(500, message, param="model") from error

    def model_cards(self) -> list[ModelCard]:
        """Return the entries of `/v1/models`, the base model first."""
        bases = [self._build_card(name, self._root) for name in self._base_names]
        return [*bases, *map(self._build_adapter_card, self._adapters.values())]

    def model_card(self, name: str) -> ModelCard:
        """Return the `/v1/models` entry of one model.

        Raises:
            Refusal: 404 for an unknown name.
        """
        for card in self.model_cards():
            if card["id"] == name:
                return card
        raise Refusal(404, f"the model {shorten(name)} does not exist", param="model", code="model_not_found")

    def _parse_fields(self, model: str | None, lora: LoRAField) -> list[tuple[str, float]]:
        """Return the adapters of `lora`; `model` may name the base model, or the only adapter of `lora`."""
        parts = _parse_lora_field(lora)
        if lora is not None and self._names_adapter(model) and [name for name, _ in parts] != [model]:
            received = shorten(lora) if parts else "[], which is the base model,"
            message = f"model={shorten(model)} and lora={received} contradict each other; set only one of them"
            raise RequestError(message, "lora")
        return parts

    def _names_adapter(self, model: str | None) -> TypeGuard[str]:
        return bool(model) and not self.is_base(str(model))

    def _list_names(self) -> str:
        return f"served models are {_list_some(self.names)}"

    def _build_adapter_card(self, adapter: ServedAdapter) -> ModelCard:
        request = adapter.request
        parent = request.base_model_name or self.base_name
        return self._build_card(adapter.name, request.lora_path, parent, adapter.describe())

    def _build_card(
        self, name: str, root: str, parent: str | None = None, adapter: dict[str, Any] | None = None
    ) -> ModelCard:
        """Return OpenAI's model object with vLLM's fields and our `adapter`."""
        permission = {
            "id": f"modelperm-{name}",
            "object": "model_permission",
            "created": self._created_s,
            "allow_create_engine": False,
            "allow_sampling": True,
            "allow_logprobs": True,
            "allow_search_indices": False,
            "allow_view": True,
            "allow_fine_tuning": False,
            "organization": "*",
            "group": None,
            "is_blocking": False,
        }
        return {
            "id": name,
            "object": "model",
            "created": self._created_s,
            "owned_by": "mmlora",
            "root": root,
            "parent": parent,
            "max_model_len": self._max_model_len,
            "permission": [permission],
            "adapter": adapter,
        }


def _list_some(names: Sequence[str]) -> str:
    """List the first names for a message, and say how many there are beyond."""
    shown = ", ".join(shorten(name, max_chars=MAX_NAME_CHARS) for name in names[:MAX_NAMES])
    num_more = len(names) - MAX_NAMES
    return f"{shown} and {num_more} more (/v1/models lists all)" if num_more > 0 else shown


def _served_adapter(adapters: Mapping[str, ServedAdapter], name: str) -> ServedAdapter:
    adapter = adapters.get(name)
    if adapter is None:
        allowed = _list_some(list(adapters)) or "none"
        message = (
            f"the adapter {shorten(name)} does not exist; served adapters are {allowed}; [] selects the base model"
        )
        raise Refusal(404, message, param="lora", code="adapter_not_found")
    return adapter


def _parse_lora_field(lora: LoRAField) -> list[tuple[str, float]]:
    """Return the adapters of a `lora` field with their scales.

    Raises:
        RequestError: there are too many entries, one has another form, or an adapter is named twice.
    """
    if lora is None or isinstance(lora, str):
        return [(lora, 1.0)] if lora is not None else []
    if len(lora) > MAX_MIX_PARTS:
        raise RequestError(f"lora has {len(lora)} adapters; the limit is {MAX_MIX_PARTS}", "lora")
    parts = [_parse_lora_entry(entry) for entry in lora]
    names = [name for name, _ in parts]
    if len(set(names)) != len(names):
        raise RequestError(f"lora contains an adapter twice: {shorten(names)}; add up its scales", "lora")
    return parts


def _parse_lora_entry(entry: dict[str, Any]) -> tuple[str, float]:
    unknown = sorted(set(entry) - {"name", "scale"})
    if unknown or not isinstance(entry.get("name"), str):
        raise RequestError(f"lora: {shorten(entry)} must be {{'name': …}} or {{'name': …, 'scale': …}}", "lora")
    scale = entry.get("scale", 1)
    if not is_finite_number(scale):
        message = f"lora: scale={shorten(scale)} for {shorten(entry['name'])}; it must be a finite number"
        raise RequestError(message, "lora")
    return entry["name"], float(scale)
