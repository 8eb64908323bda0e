"""`ServedModels`: the names that clients may ask for, and the cards of `/v1/models`.

It turns `model` and `lora` of a request into what the engine takes: an explicit adapter, `BASE`, or None for the
automatic choice, which the engine makes.
"""

import json
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any, TypeGuard

from mmlora.errors import AdapterNotFound, ConfigError, RequestError
from mmlora.lora.mix import LoRAMix
from mmlora.lora.request import BASE, LoRARequest
from mmlora.lora.resolving.resolution import LoRAResolution
from mmlora.server.errors import Refusal
from mmlora.server.lora.lora_field import LoRAField, parse_lora_field
from mmlora.server.lora.model_cards import Card, model_card
from mmlora.server.lora.name_locks import NameLocks
from mmlora.server.lora.served_adapter import ServedAdapter
from mmlora.server.openai.protocol import FieldError
from mmlora.utils.text import shorten


@dataclass(frozen=True)
class LoRAModule:
    """One `--lora-modules` entry: `name=path`, or a JSON object with these fields."""

    name: str
    path: str
    base_model_name: str | None = None

    @classmethod
    def parse(cls, text: str) -> "LoRAModule":
        """Read an entry as it stands on the command line.

        Raises:
            ConfigError: it has neither form.
        """
        if not text.lstrip().startswith("{"):
            name, equals, path = text.partition("=")
            if not (equals and name and path):
                raise ConfigError(f"{text!r}: an entry is name=path or a JSON object")
            return cls(name, path)
        try:
            entry = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{shorten(text, max_chars=400)}: not JSON: {error}") from None
        allowed = [field.name for field in fields(cls)]
        if not isinstance(entry, dict):
            raise ConfigError(f"{text!r}: an entry is name=path or a JSON object")
        entry = {name: value for name, value in entry.items() if value is not None or name != "base_model_name"}
        unknown = sorted(set(entry) - set(allowed))
        if unknown or not all(isinstance(value, str) and value for value in entry.values()):
            raise ConfigError(f"{text!r}: an entry holds {', '.join(allowed)}, each a non-empty string")
        if "name" not in entry or "path" not in entry:
            raise ConfigError(f"{text!r}: an entry needs a name and a path")
        return cls(**entry)


class ServedModels:
    """All names of one server. Safe to use from several threads.

    Attributes:
        resolution: asks resolvers for names that are not served; None where there are none to ask.
        changes: held by whoever loads or unloads an adapter, from before it until its name is served or gone.

    Args:
        base_name: what clients call the base model.
        root: where the base model came from.
        max_model_len: tokens of prompt and answer.
        adapters: named adapters and defaults, no two of one name; a default's name is its key, such as `audio`.
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
        self._created = int(time.time())
        self.resolution: LoRAResolution | None = None
        self.changes = NameLocks()
        self._lock = threading.Lock()
        # Replaced whole by whoever holds the lock, so that readers need none.
        self._adapters = {adapter.name: adapter for adapter in adapters}

    @property
    def names(self) -> list[str]:
        """Every name that `model` may have."""
        return [*self._base_names, *self._adapters]

    @property
    def adapters(self) -> Mapping[str, ServedAdapter]:
        """The adapters by their names, as of now."""
        return self._adapters

    def is_base(self, name: str) -> bool:
        """Whether a name is the base model's."""
        return name in self._base_names

    def add(self, adapter: ServedAdapter, *, replace: bool = False) -> None:
        """Serve an adapter from now on.

        Args:
            adapter: with the name that clients use.
            replace: take the place of an adapter of this name that is no default.

        Raises:
            RequestError: the name is taken.
        """
        with self._lock:
            taken = self._adapters.get(adapter.name)
            may_replace = replace and taken is not None and taken.default_for is None
            if self.is_base(adapter.name) or (taken is not None and not may_replace):
                raise RequestError(f"the name {shorten(adapter.name)} is taken; served are {self._listed()}")
            self._adapters = {**self._adapters, adapter.name: adapter}

    def remove(self, name: str) -> ServedAdapter:
        """Serve an adapter no more, and return it. What the engine has of it is left to the caller.

        Raises:
            RequestError: it is a default, which the engine keeps.
            AdapterNotFound: there is no adapter of this name.
        """
        with self._lock:
            adapter = self._adapters.get(name)
            if adapter is None:
                raise AdapterNotFound(f"there is no adapter {shorten(name)}; served are {self._listed()}")
            if adapter.default_for is not None:
                raise RequestError(f"the adapter {name!r} is the default for {adapter.default_for}; it stays")
            self._adapters = {other: self._adapters[other] for other in self._adapters if other != name}
            return adapter

    async def find(self, model: str | None, lora: LoRAField) -> LoRARequest | object | None:
        """Do as `resolve`, after asking the resolvers for each name that is not served.

        Raises:
            Refusal, FieldError: see `resolve`.
            AdapterError: a resolver found an adapter that cannot be used.
            ResolverError: a resolver failed, and no other found the adapter.
        """
        parts = self._parse(model, lora)
        if self.resolution is not None:
            with suppress(AdapterNotFound):  # `resolve` says so, and which field names it; the rest is not looked for
                for name in [model or self.base_name, *(name for name, _ in parts)]:
                    if name not in self.names:
                        await self.resolution.resolve(name)
        return self.resolve(model, lora)

    def resolve(self, model: str | None, lora: LoRAField) -> LoRARequest | object | None:
        """What the engine is to apply.

        Args:
            model: the base model's name (automatic choice), an adapter's, or a default's key; None is the base.
            lora: None (as `model` says), `[]` (the base model on purpose), a name, or `[{"name": …, "scale": …}, …]`.

        Raises:
            FieldError: the fields contradict each other, or `lora` has another form.
            Refusal: 404 for an unknown name.
        """
        parts = self._parse(model, lora)
        adapters = self._adapters
        named = None
        if self._is_other(model):
            named = adapters.get(model)
            if named is None:
                message = f"the model {shorten(model)} does not exist; served are {self._listed()}"
                raise Refusal(404, message, param="model", code="model_not_found")
        if lora is None:
            return named.request if named else None
        chosen = [(self._chosen(adapters, name).request, scale) for name, scale in parts]
        if not chosen:
            return BASE
        return chosen[0][0] if len(chosen) == 1 and chosen[0][1] == 1 else LoRAMix(chosen)

    def _parse(self, model: str | None, lora: LoRAField) -> list[tuple[str, float]]:
        """The adapters that `lora` names; `model` may name the base model, or the one adapter that `lora` names."""
        parts = parse_lora_field(lora)
        if lora is not None and self._is_other(model) and [name for name, _ in parts] != [model]:
            asked = shorten(lora) if parts else "[], which is the base model,"
            message = f"model={shorten(model)} and lora={asked} contradict each other; give one of them"
            raise FieldError(message, "lora")
        return parts

    def _is_other(self, model: str | None) -> TypeGuard[str]:
        """Whether `model` names something else than the base model."""
        return model is not None and not self.is_base(model)

    def _chosen(self, adapters: Mapping[str, ServedAdapter], name: str) -> ServedAdapter:
        chosen = adapters.get(name)
        if chosen is None:
            allowed = ", ".join(map(repr, adapters)) or "none"
            message = f"the adapter {shorten(name)} does not exist; served are {allowed}, and [] is the base model"
            raise Refusal(404, message, param="lora", code="adapter_not_found")
        return chosen

    def cards(self) -> list[Card]:
        """The entries of `/v1/models`, the base model first."""
        bases = [self._card(name, self._root, None, None) for name in self._base_names]
        return [*bases, *(self._adapter_card(adapter) for adapter in self._adapters.values())]

    def card(self, name: str) -> Card:
        """The entry of one model.

        Raises:
            Refusal: 404 for an unknown name.
        """
        for card in self.cards():
            if card["id"] == name:
                return card
        raise Refusal(404, f"the model {shorten(name)} does not exist", param="model", code="model_not_found")

    def _listed(self) -> str:
        return ", ".join(map(repr, self.names))

    def _adapter_card(self, adapter: ServedAdapter) -> Card:
        request = adapter.request
        return self._card(adapter.name, request.lora_path, request.base_model_name or self.base_name, adapter.facts())

    def _card(self, name: str, root: str, parent: str | None, adapter: dict[str, Any] | None) -> Card:
        return model_card(name, root, parent, adapter, self._max_model_len, self._created)
