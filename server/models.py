"""`ServedModels`: the names that clients may ask for, and the cards of `/v1/models`.

It turns `model` and `lora` of a request into what the engine takes: an explicit adapter, `BASE`, or None for the
automatic choice, which the engine makes.
"""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

from mmlora.errors import ConfigError
from mmlora.lora.adapter import AdapterReport
from mmlora.lora.request import BASE, LoRARequest
from mmlora.server.errors import Refusal
from mmlora.server.protocol import FieldError


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
        except ValueError as error:
            raise ConfigError(f"{text!r}: not JSON: {error}") from None
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


class LoadedAdapter(Protocol):
    """What a card tells about an adapter; `mmlora.lora.adapter.Adapter` has it."""

    @property
    def digest(self) -> str: ...
    @property
    def report(self) -> AdapterReport: ...


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter under the name that clients use for it; `default_for` is set for a default."""

    name: str
    request: LoRARequest
    loaded: LoadedAdapter
    default_for: str | None = None


class ServedModels:
    """All names of one server.

    Args:
        base_name: what clients call the base model.
        root: where the base model came from.
        max_model_len: tokens of prompt and answer.
        adapters: named adapters and defaults, no two of one name; a default's name is its key, such as `audio`.
    """

    def __init__(self, base_name: str, root: str, max_model_len: int, adapters: Iterable[ServedAdapter] = ()) -> None:
        self.base_name = base_name
        self._root = root
        self._max_model_len = max_model_len
        self._created = int(time.time())
        self._adapters = {adapter.name: adapter for adapter in adapters}

    @property
    def names(self) -> list[str]:
        """Every name that `model` may have."""
        return [self.base_name, *self._adapters]

    def resolve(self, model: str | None, lora: str | list[dict[str, Any]] | None) -> LoRARequest | object | None:
        """What the engine is to apply.

        Args:
            model: the base model's name (automatic choice), an adapter's, or a default's key; None is the base.
            lora: None (as `model` says), `[]` (the base model on purpose), a name, or a list of one `{"name": …}`.

        Raises:
            Refusal: 404 for an unknown name.
            FieldError: the fields contradict each other, or `lora` has another form.
        """
        named = None
        if model is not None and model != self.base_name:
            named = self._adapters.get(model)
            if named is None:
                message = f"the model {model!r} does not exist; served are {', '.join(map(repr, self.names))}"
                raise Refusal(404, message, param="model", code="model_not_found")
        if lora is None:
            return named.request if named else None
        if lora == []:
            if named:
                raise FieldError(f"lora=[] asks for the base model, but model={model!r} names an adapter", "lora")
            return BASE
        name = lora if isinstance(lora, str) else _single_name(lora)
        chosen = self._adapters.get(name)
        if chosen is None:
            allowed = ", ".join(map(repr, self._adapters)) or "none"
            message = f"the adapter {name!r} does not exist; served are {allowed}, and [] is the base model"
            raise Refusal(404, message, param="lora", code="adapter_not_found")
        if named and named is not chosen:
            raise FieldError(f"model={model!r} and lora={name!r} name two adapters; give one of them", "lora")
        return chosen.request

    def cards(self) -> list[dict[str, Any]]:
        """The entries of `/v1/models`, the base model first."""
        base = self._card(self.base_name, self._root, None, None)
        return [base, *(self._adapter_card(adapter) for adapter in self._adapters.values())]

    def card(self, name: str) -> dict[str, Any]:
        """The entry of one model.

        Raises:
            Refusal: 404 for an unknown name.
        """
        for card in self.cards():
            if card["id"] == name:
                return card
        raise Refusal(404, f"the model {name!r} does not exist", param="model", code="model_not_found")

    def _adapter_card(self, adapter: ServedAdapter) -> dict[str, Any]:
        request, report = adapter.request, adapter.loaded.report
        info = {
            "name": request.lora_name,
            "digest": adapter.loaded.digest,
            "default_for": adapter.default_for,
            "matched": report.matched,
            "parts": dict(report.parts),
            "unmatched": list(report.unmatched),
        }
        return self._card(adapter.name, request.lora_path, request.base_model_name or self.base_name, info)

    def _card(self, name: str, root: str, parent: str | None, adapter: Mapping[str, Any] | None) -> dict[str, Any]:
        permission = {
            "id": f"modelperm-{name}",
            "object": "model_permission",
            "created": self._created,
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
            "created": self._created,
            "owned_by": "mmlora",
            "root": root,
            "parent": parent,
            "max_model_len": self._max_model_len,
            "permission": [permission],
            "adapter": adapter,
        }


def _single_name(entries: list[dict[str, Any]]) -> str:
    if len(entries) > 1:
        raise FieldError(f"lora holds {len(entries)} adapters; one request takes one", "lora")
    (entry,) = entries
    unknown = sorted(set(entry) - {"name", "scale"})
    if unknown or not isinstance(entry.get("name"), str):
        raise FieldError(f"lora={entries!r}: an entry is {{'name': …}}", "lora")
    scale = entry.get("scale", 1)
    if isinstance(scale, bool) or scale != 1:
        raise FieldError(f"lora: scale={scale!r} for {entry['name']!r}; only 1 is supported", "lora")
    return str(entry["name"])
