"""Resolvers, which find adapters by the names that clients request: interface, registry and event loop.

All belong to the process, as plugins do. `mmlora.lora.resolution` calls the resolvers.
"""

import asyncio
import hashlib
import logging
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import KeysView
from typing import Final

from mmlora.errors import ConfigError
from mmlora.lora.request import LoRARequest

logger = logging.getLogger(__name__)

MAX_NAME_BYTES: Final = 255  # limit of file names on most systems
_PART = r"\w[\w.@+=:, -]*"
_NAME: Final = re.compile(rf"{_PART}(/{_PART})*")

_loop_lock: Final = threading.Lock()
_loops: Final[list[asyncio.AbstractEventLoop]] = []


class LoRAResolver(ABC):
    """Finds adapters by name. All resolvers are awaited on one event loop that lasts as long as the process."""

    @abstractmethod
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Find an adapter.

        Args:
            base_model_name: name of the base model for clients.
            lora_name: the requested name; `is_lora_name` defines which names are possible.

        Returns:
            A request of that name whose path is a local directory with the adapter, or None when this resolver does not
            know it (raising `FileNotFoundError` or `AdapterNotFound` is equivalent).
        """


class _Registry:
    """Resolvers by name. They are called in the order of their registration."""

    def __init__(self) -> None:
        self._resolvers: dict[str, LoRAResolver] = {}

    def register_resolver(self, resolver_name: str, resolver: LoRAResolver) -> None:
        """Register a resolver; one of the same name is replaced, with a warning.

        Raises:
            ConfigError: it is not a `LoRAResolver`.
        """
        if not isinstance(resolver, LoRAResolver):
            raise ConfigError(f"resolver {resolver_name!r} is a {type(resolver).__name__}; it must be a LoRAResolver")
        if resolver_name in self._resolvers:
            logger.warning("the resolver %r is registered again and replaced", resolver_name)
        self._resolvers = {**self._resolvers, resolver_name: resolver}

    def get_supported_resolvers(self) -> KeysView[str]:
        """Return a snapshot of the names of all resolvers, first registered first."""
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
    """Return whether a name may be passed to resolvers.

    A valid name has parts joined by `/`. Each part consists of letters, digits, spaces and `_ . @ + = : , -`, and
    starts with a letter, a digit or `_`. The name has at most `MAX_NAME_BYTES` in UTF-8. So it is relative, has no
    `..`, and contains nothing with a special meaning in paths, URLs or shell patterns.
    """
    return len(name) <= MAX_NAME_BYTES and _NAME.fullmatch(name) is not None and len(name.encode()) <= MAX_NAME_BYTES


def derive_lora_id(name: str) -> int:
    """Return an id for an adapter known by its name only: the same in every process, from 2³² to 2⁵⁷."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big") + 2**32


def resolver_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop of all resolvers, started on first use in a daemon thread.

    There is one per process because clients of storage services are bound to the loop that first uses them.
    """
    with _loop_lock:
        if not _loops:
            loop = asyncio.new_event_loop()
            threading.Thread(target=_run_forever, args=[loop], name="mmlora-resolvers", daemon=True).start()
            _loops.append(loop)
        return _loops[0]


def _run_forever(loop: asyncio.AbstractEventLoop) -> None:
    """Run the loop as long as the process, even if a task of a resolver exits or stops the loop."""
    while not loop.is_closed():
        try:
            loop.run_forever()
            logger.error("a resolver stopped the event loop of all resolvers; it is restarted")
        except BaseException:
            logger.exception("a task of a resolver left the event loop of all resolvers; it is restarted")
