"""`LoRAResolution`: asks the registered resolvers for an adapter by name, one after the other, and verifies answers.

No resolver can do harm to the next: each has a time limit, and what it raises is logged. Names that nobody knows are
remembered for a while.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from mmlora.errors import AdapterError, AdapterNotFound, MMLoRAError, RequestError, ResolverError
from mmlora.lora.request import LoRARequest
from mmlora.lora.resolver import LoRAResolver, LoRAResolverRegistry, is_lora_name
from mmlora.lora.resolving.resolver_loop import resolver_loop
from mmlora.utils.environment import read_number
from mmlora.utils.text import shorten

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResolutionLimits:
    """Bounds of resolutions.

    Args:
        timeout_s: what each resolver has to find one adapter, downloads included.
        miss_lifetime_s: how long it is remembered that a name is unknown, or its adapter unusable.
        max_misses: most such names; the least recently asked leave first.
        max_pending: most names that are resolved at once.
    """

    timeout_s: float = 300.0
    miss_lifetime_s: float = 60.0
    max_misses: int = 1024
    max_pending: int = 64

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "ResolutionLimits":
        """Read `MMLORA_LORA_RESOLVER_TIMEOUT_S` and `MMLORA_LORA_RESOLVER_MISS_LIFETIME_S`.

        Raises:
            ConfigError: one of them is no positive number.
        """
        return cls(
            read_number("MMLORA_LORA_RESOLVER_TIMEOUT_S", cls.timeout_s, environment),
            read_number("MMLORA_LORA_RESOLVER_MISS_LIFETIME_S", cls.miss_lifetime_s, environment),
        )


@dataclass(frozen=True)
class _Failure:
    """Why a name was not resolved. Kept instead of an exception, which would gather a traceback per request."""

    kind: type[MMLoRAError]
    message: str


class LoRAResolution:
    """Resolves names for one engine. May be used from any number of event loops.

    Args:
        base_model_name: what clients call the base model; resolvers are told.
        accept: verifies what a resolver found and puts it to use; raises when it cannot be used. Awaited on the
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
        self._limits = limits or ResolutionLimits()
        # All three are touched by the resolvers' loop only.
        self._pending: dict[str, asyncio.Task[LoRARequest | _Failure]] = {}
        self._misses: OrderedDict[str, tuple[float, _Failure]] = OrderedDict()
        self._running: set[asyncio.Task[object]] = set()

    async def resolve(self, lora_name: str) -> LoRARequest:
        """Find an adapter and have it accepted. Requests for one name share one resolution, which goes on without them.

        Raises:
            AdapterNotFound: no resolver knows the name, or none would be asked for it.
            AdapterError: an adapter was found, but cannot be used.
            ResolverError: some resolver failed and none found it, or too many names are being resolved.
        """
        if not is_lora_name(lora_name):
            raise AdapterNotFound(f"no resolver is asked for an adapter called {shorten(lora_name)}")
        future = asyncio.run_coroutine_threadsafe(self._join(lora_name), resolver_loop())
        outcome = await asyncio.wrap_future(future)
        if isinstance(outcome, _Failure):
            raise outcome.kind(outcome.message)
        return outcome

    async def _join(self, name: str) -> LoRARequest | _Failure:
        """Wait for the resolution of a name, starting it when there is none."""
        expires_s, failure = self._misses.get(name, (0.0, None))
        if failure is not None and time.monotonic() < expires_s:
            self._misses.move_to_end(name)
            return failure
        task = self._pending.get(name)
        if task is None:
            if len(self._pending) >= self._limits.max_pending:
                return _Failure(ResolverError, f"{len(self._pending)} adapters are being resolved; try again later")
            task = self._pending[name] = asyncio.create_task(self._resolve(name))
            task.add_done_callback(lambda _: self._pending.pop(name))
        return await asyncio.shield(task)

    async def _resolve(self, name: str) -> LoRARequest | _Failure:
        failed, unusable = [], []
        for resolver_name in LoRAResolverRegistry.get_supported_resolvers():
            try:
                request = _verify(await self._ask(LoRAResolverRegistry.get_resolver(resolver_name), name), name)
                if request is not None:
                    await self._try(request)
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
            return _Failure(ResolverError, message)
        failure = _Failure(AdapterNotFound, f"no resolver knows an adapter called {name!r}")
        if unusable:
            message = (
                f"adapter {name!r} was found by {', '.join(unusable)}, but cannot be used; the server's log says why"
            )
            failure = _Failure(AdapterError, message)
        self._remember(name, failure)
        return failure

    async def _ask(self, resolver: LoRAResolver, name: str) -> object:
        """Have a resolver answer in time.

        Raises:
            Exception: whatever it raised, or that it was too late.
        """
        call = _contain(lambda: resolver.resolve_lora(self._base_model_name, name))
        task = asyncio.create_task(call)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        await asyncio.wait({task}, timeout=self._limits.timeout_s)
        if not task.done():
            task.cancel()  # not awaited: a resolver that will not stop holds up nobody else
            raise TimeoutError(f"no answer within {self._limits.timeout_s:g} s")
        if task.cancelled():
            raise RuntimeError("the resolver cancelled itself")
        return _unwrap(task.result())

    async def _try(self, request: LoRARequest) -> None:
        try:
            _unwrap(await _contain(lambda: self._accept(request)))
        except AdapterNotFound as error:  # the resolver said that it is there
            raise AdapterError(str(error)) from error

    def _remember(self, name: str, failure: _Failure) -> None:
        self._misses[name] = time.monotonic() + self._limits.miss_lifetime_s, failure
        self._misses.move_to_end(name)
        if len(self._misses) > self._limits.max_misses:
            self._misses.popitem(last=False)


async def _contain(call: Callable[[], Awaitable[object]]) -> object:
    """What a call returns or raises; a `SystemExit` let through would end the loop of all resolvers."""
    try:
        return await call()
    except asyncio.CancelledError:
        raise
    except Exception as error:
        return error
    except BaseException as error:  # also a panic of a library in Rust
        return RuntimeError(f"{type(error).__name__}: {error}")


def _unwrap(outcome: object) -> object:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _verify(answer: object, name: str) -> LoRARequest | None:
    if answer is None:
        return None
    if not isinstance(answer, LoRARequest):
        raise TypeError(f"the resolver returned a {type(answer).__name__}; it must be a LoRARequest or None")
    if answer.lora_name != name:
        raise ValueError(f"the resolver returned adapter {answer.lora_name!r}; it must have the name asked for")
    return answer
