"""Which adapter a request gets: the explicit one, a default for its modalities, or none.

Pure functions over names; nothing here loads, runs or remembers anything. Every entry point, offline and online,
decides through `choose_adapter`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from mmlora.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Choice(Generic[T]):
    """An adapter (None: the base model), why it was chosen, and a warning for the client."""

    adapter: T | None
    reason: str
    warning: str | None = None


def modality_key(modalities: Iterable[str]) -> str:
    """The canonical key of a set of modalities: `audio`, `audio+image`."""
    return "+".join(sorted(set(modalities)))


def parse_defaults(defaults: Mapping[str, str] | None, supported: Iterable[str]) -> dict[str, str]:
    """Check `default_mm_loras` and return it under canonical keys.

    Args:
        defaults: modality, or modalities joined with `+`, to an adapter path.
        supported: the modalities that the model takes.

    Raises:
        ConfigError: the model takes no media, a key names another modality, repeats one, or has no path.
    """
    allowed = sorted(supported)
    parsed: dict[str, str] = {}
    for key, path in (defaults or {}).items():
        names = [name.strip() for name in str(key).split("+")]
        if not allowed:
            raise ConfigError(f"default_mm_loras[{key!r}]: the model takes text only, so no default can apply")
        if set(names) - set(allowed) or len(set(names)) != len(names):
            raise ConfigError(
                f"default_mm_loras[{key!r}]: allowed are {', '.join(allowed)} and combinations such as "
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
) -> Choice[T]:
    """Decide the adapter of one request.

    An explicit choice wins. Else a default for exactly this set of modalities, else the default of the only mapped
    modality; with several mapped modalities none applies, and the choice carries a warning.

    Args:
        modalities: of the request's parsed media items.
        defaults: adapters under the keys of `parse_defaults`.
        explicit: the adapter that the request names.
        is_base_explicit: the request asks for the base model on purpose.
    """
    if is_base_explicit:
        return Choice(None, "explicit:base")
    if explicit is not None:
        return Choice(explicit, "explicit")
    present = set(modalities)
    exact = modality_key(present)
    if exact in defaults:
        return Choice(defaults[exact], f"default:{exact}")
    mapped = sorted(present & defaults.keys())
    if len(mapped) == 1:
        return Choice(defaults[mapped[0]], f"default:{mapped[0]}")
    if not mapped:
        return Choice(None, "none")
    conflict = modality_key(mapped)
    warning = (
        f"the prompt has {' and '.join(mapped)}, each with a default adapter: none was applied. "
        f"Name an adapter, or give default_mm_loras a {conflict!r} key"
    )
    return Choice(None, f"conflict:{conflict}", warning)
