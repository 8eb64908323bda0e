"""`LoRAResolution`: finds an adapter by name through the registered resolvers, and verifies what they return.

Resolvers are isolated from each other: each has a time limit, and its exceptions are logged. Unknown names are cached.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from cachetools import TTLCache

from mmlora.errors import AdapterError, AdapterNotFound, MMLoRAError, RequestError, ResolverError
from mmlora.lora.request import LoRARequest
from mmlora.lora.resolver import LoRAResolver, LoRAResolverRegistry, is_lora_name, resolver_loop
from mmlora.utils.environment import read_number
from mmlora.utils.text import shorten

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResolutionLimits:
    """Limits of `LoRAResolution`.

    Args:
        timeout_s: time limit of each resolver for one adapter, including downloads.
        miss_lifetime_s: how long an unknown name or unusable adapter is cached.
        max_misses: maximum number of cached misses; the least recently requested are evicted first.
        max_pending: maximum number of names that are resolved concurrently.
    """

    timeout_s: float = 300.0
    miss_lifetime_s: float = 60.0
    max_misses: int = 1024
    max_pending: int = 64

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "ResolutionLimits":
        """Read `MMLORA_LORA_RESOLVER_TIMEOUT_S` and `MMLORA_LORA_RESOLVER_MISS_LIFETIME_S`.

        Raises:
            ConfigError: one of them is not a positive number.
        """
        return cls(
            read_number("MMLORA_LORA_RESOLVER_TIMEOUT_S", cls.timeout_s, environment),
            read_number("MMLORA_LORA_RESOLVER_MISS_LIFETIME_S", cls.miss_lifetime_s, environment),
        )


@dataclass(frozen=True)
class _Miss:
    """Why a name was not resolved. Stored instead of an exception, whose traceback would grow with each request."""

    kind: type[MMLoRAError]
    message: str


class LoRAResolution:
    """Resolves names for one engine. Safe to use from several event loops.

    Args:
        base_model_name: name of the base model for clients; passed to the resolvers.
        accept: verifies a resolved adapter and makes it available; raises when it is unusable. Awaited on the
            resolvers' loop.
        limits: time limits and bounds.
    """

    def __init__(
        self,
        base_model_name: str,
        accept: Callable[[LoRARequest], Awaitable[None]],
        limits: ResolutionLimits | None = None,
    ) -> None:
        self._base_model_name = base_model_name
        self._accept = accept
        self._limits = limits = limits or ResolutionLimits()
        # Used only on the resolvers' loop.
        self._pending: dict[str, asyncio.Task[LoRARequest | _Miss]] = {}
        self._misses: TTLCache[str, _Miss] = TTLCache(
            limits.max_misses, limits.miss_lifetime_s, timer=lambda: time.monotonic()
        )
        self._running: set[asyncio.Task[object]] = set()

    async def resolve(self, lora_name: str) -> LoRARequest:
        """Resolve an adapter and accept it. Concurrent calls for one name share one resolution.

        The resolution continues when a caller is cancelled.

        Raises:
            AdapterNotFound: no resolver knows the name, or the name is not allowed.
            AdapterError: an adapter was found, but is unusable.
            ResolverError: a resolver failed and no other found the adapter, or too many names are being resolved.
        """
        if not is_lora_name(lora_name):
            raise AdapterNotFound(f"the adapter name {shorten(lora_name)} is not allowed, so no resolver is called")
        future = asyncio.run_coroutine_threadsafe(self._join(lora_name), resolver_loop())
        outcome = await asyncio.wrap_future(future)
        if isinstance(outcome, _Miss):
            raise outcome.kind(outcome.message)
        return outcome

    async def _join(self, name: str) -> LoRARequest | _Miss:
        """Wait for the resolution of a name, and start it if there is none."""
        miss = self._misses.get(name)
        if miss is not None:
            return miss
        task = self._pending.get(name)
        if task is None:
            if len(self._pending) >= self._limits.max_pending:
                return _Miss(ResolverError, f"{len(self._pending)} adapters are being resolved; try again later")
            task = self._pending[name] = asyncio.create_task(self._resolve(name))
            task.add_done_callback(lambda _: self._pending.pop(name))
        return await asyncio.shield(task)

    async def _resolve(self, name: str) -> LoRARequest | _Miss:
        failed, unusable = [], []
        for resolver_name in LoRAResolverRegistry.get_supported_resolvers():
            try:
                request = _verify(await self._call(LoRAResolverRegistry.get_resolver(resolver_name), name), name)
                if request is not None:
                    await self._accept_found(request)
                    return request
            except (FileNotFoundError, AdapterNotFound) as error:
                logger.info("resolver %r does not know adapter %r: %s", resolver_name, name, error)
            except RequestError as error:
                logger.warning("resolver %r: adapter %r cannot be used: %s", resolver_name, name, error)
                unusable.append(resolver_name)
            except Exception as error:
                logger.warning("resolver %r failed for adapter %r", resolver_name, name, exc_info=error)
                failed.append(f"{resolver_name} ({type(error).__name__})")
        if failed:
            message = f"adapter {name!r} cannot be resolved now: {', '.join(failed)} failed; the server's log says why"
            return _Miss(ResolverError, message)
        miss = _Miss(AdapterNotFound, f"no resolver knows an adapter called {name!r}")
        if unusable:
            message = (
                f"adapter {name!r} was found by {', '.join(unusable)}, but cannot be used; the server's log says why"
            )
            miss = _Miss(AdapterError, message)
        self._misses[name] = miss
        return miss

    async def _call(self, resolver: LoRAResolver, name: str) -> object:
        """Call a resolver and return its result.

        Raises:
            Exception: any error of the resolver, or that it exceeded its time limit.
        """
        task = asyncio.create_task(_catch_all(lambda: resolver.resolve_lora(self._base_model_name, name)))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        await asyncio.wait({task}, timeout=self._limits.timeout_s)
        if not task.done():
            task.cancel()  # not awaited, so that a resolver that ignores it blocks no other
            raise TimeoutError(f"no result within {self._limits.timeout_s:g} s")
        if task.cancelled():
            raise RuntimeError("the resolver cancelled itself")
        return _unwrap(task.result())

    async def _accept_found(self, request: LoRARequest) -> None:
        try:
            _unwrap(await _catch_all(lambda: self._accept(request)))
        except AdapterNotFound as error:  # a resolver has found it, so clients must not get "not found"
            raise AdapterError(str(error)) from error


async def _catch_all(call: Callable[[], Awaitable[object]]) -> object:
    """Return the result or the exception of a call; a `SystemExit` would otherwise end the loop of all resolvers."""
    try:
        return await call()
    except asyncio.CancelledError:
        raise
    except Exception as error:
        return error
    except BaseException as error:  # including a panic of a Rust library
        return RuntimeError(f"{type(error).__name__}: {error}")


def _unwrap(outcome: object) -> object:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _verify(result: object, name: str) -> LoRARequest | None:
    if result is None:
        return None
    if not isinstance(result, LoRARequest):
        raise TypeError(f"the resolver returned a {type(result).__name__}; it must be a LoRARequest or None")
    if result.lora_name != name:
        raise ValueError(f"the resolver returned adapter {result.lora_name!r}; it must have the requested name")
    return result
