"""`LoRAResolver`: finds adapters by the names that clients ask for; and the registry of all resolvers.

The registry belongs to the process, as plugins do. `mmlora.lora.resolving.resolution` asks the resolvers.
"""

import hashlib
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import KeysView
from typing import Final

from mmlora.errors import ConfigError
from mmlora.lora.request import LoRARequest

logger = logging.getLogger(__name__)

MAX_NAME_BYTES: Final = 255  # of a file name on most systems
_PART = r"\w[\w.@+=:, -]*"
_NAME: Final = re.compile(rf"{_PART}(/{_PART})*")


class LoRAResolver(ABC):
    """Finds adapters by name. Every resolver is awaited on one event loop that lasts as long as the process."""

    @abstractmethod
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Find an adapter.

        Args:
            base_model_name: what clients call the base model.
            lora_name: what a client asks for; see `is_lora_name` for what it may be.

        Returns:
            A request of that name whose path is a local directory with the adapter, or None when this resolver does not
            know it (`FileNotFoundError` and `AdapterNotFound` say the same).
        """


class _Registry:
    """Resolvers by name, in the order of registration, which is the order they are asked in."""

    def __init__(self) -> None:
        self._resolvers: dict[str, LoRAResolver] = {}

    def register_resolver(self, resolver_name: str, resolver: LoRAResolver) -> None:
        """Add a resolver; one of the same name is replaced, with a warning.

        Raises:
            ConfigError: it is no `LoRAResolver`.
        """
        if not isinstance(resolver, LoRAResolver):
            raise ConfigError(f"resolver {resolver_name!r} is a {type(resolver).__name__}; it must be a LoRAResolver")
        if resolver_name in self._resolvers:
            logger.warning("the resolver %r is registered again and replaced", resolver_name)
        self._resolvers = {**self._resolvers, resolver_name: resolver}

    def get_supported_resolvers(self) -> KeysView[str]:
        """The names of all resolvers as of now, first registered first."""
        return self._resolvers.keys()

    def get_resolver(self, resolver_name: str) -> LoRAResolver:
        """Return a resolver.

        Raises:
            ConfigError: there is none of this name.
        """
        if resolver_name not in self._resolvers:
            known = ", ".join(map(repr, self._resolvers)) or "none"
            raise ConfigError(f"there is no resolver {resolver_name!r}; registered: {known}")
        return self._resolvers[resolver_name]


LoRAResolverRegistry: Final = _Registry()


def is_lora_name(name: str) -> bool:
    """Tell whether a name is one that resolvers are asked for.

    Parts joined by `/`, each of letters, digits and `_ . @ + = : ,` blank `-`, beginning with a letter, a digit or `_`;
    at most `MAX_NAME_BYTES` in UTF-8. So it is relative, has no `..`, and holds nothing that a path, a URL or a shell
    pattern gives a meaning to.
    """
    return len(name) <= MAX_NAME_BYTES and _NAME.fullmatch(name) is not None and len(name.encode()) <= MAX_NAME_BYTES


def derive_lora_id(name: str) -> int:
    """Return an id for an adapter that has only a name: the same in every process, from 2³² to 2⁵⁷."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big") + 2**32
