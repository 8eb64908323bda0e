"""The adapter policy: which adapter a request gets. Explicit choice, default for its modalities, or base model.

Pure functions: nothing here loads or caches anything. Every entry point, offline and online, calls `choose_adapter`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from mmlora.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class AdapterChoice(Generic[T]):
    """The adapter that the policy chose (None for the base model), the reason, and a warning for the client."""

    adapter: T | None
    reason: str
    warning: str | None = None


def modality_key(modalities: Iterable[str]) -> str:
    """Return the canonical key of a set of modalities, such as `audio` or `audio+image`."""
    return "+".join(sorted(set(modalities)))


def parse_defaults(defaults: Mapping[str, str] | None, supported: Iterable[str]) -> dict[str, str]:
    """Check `default_mm_loras` and return it under canonical keys.

    Args:
        defaults: adapter path by modality, or by several modalities joined with `+`.
        supported: modalities that the model supports.

    Raises:
        ConfigError: the model is text-only, a key has an unsupported or repeated modality, or a value is not a path.
    """
    allowed = sorted(supported)
    parsed: dict[str, str] = {}
    for key, path in (defaults or {}).items():
        names = [name.strip() for name in str(key).split("+")]
        if not allowed:
            raise ConfigError(f"default_mm_loras[{key!r}]: the model takes text only, so no default can apply")
        if set(names) - set(allowed) or len(set(names)) != len(names):
            raise ConfigError(
                f"default_mm_loras[{key!r}]: the key must be one of {', '.join(allowed)} or a combination such as "
                f"{modality_key(allowed)!r}"
            )
        if not isinstance(path, str) or not path:
            raise ConfigError(f"default_mm_loras[{key!r}]={path!r} must be a directory or a Hub id")
        if modality_key(names) in parsed:
            raise ConfigError(f"default_mm_loras[{key!r}] names the same modalities as another key")
        parsed[modality_key(names)] = path
    return parsed


def choose_adapter(
    modalities: Iterable[str],
    defaults: Mapping[str, T],
    *,
    explicit: T | None = None,
    is_base_explicit: bool = False,
) -> AdapterChoice[T]:
    """Choose the adapter of one request.

    In this order: an explicit choice; the default for exactly this set of modalities; the default of the only
    modality that has one. If several modalities have one, none applies and the choice has a warning.

    Args:
        modalities: those of the request's media items.
        defaults: adapters by the keys that `parse_defaults` returns.
        explicit: the adapter that the request names.
        is_base_explicit: the request explicitly asks for the base model.
    """
    if is_base_explicit:
        return AdapterChoice(None, "explicit:base")
    if explicit is not None:
        return AdapterChoice(explicit, "explicit")
    present = set(modalities)
    exact = modality_key(present)
    if exact in defaults:
        return AdapterChoice(defaults[exact], f"default:{exact}")
    mapped = sorted(present & defaults.keys())
    if len(mapped) == 1:
        return AdapterChoice(defaults[mapped[0]], f"default:{mapped[0]}")
    if not mapped:
        return AdapterChoice(None, "none")
    conflict = modality_key(mapped)
    warning = (
        f"the prompt has {' and '.join(mapped)}, each with a default adapter: none was applied. "
        f"Name an adapter, or add a {conflict!r} key to default_mm_loras"
    )
    return AdapterChoice(None, f"conflict:{conflict}", warning)
