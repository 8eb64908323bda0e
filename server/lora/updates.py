"""`POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`: adapter updates at runtime."""

import logging
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Final

from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.responses import PlainTextResponse

from mmlora.async_llm import AsyncLLM
from mmlora.errors import AdapterNotFound, RegistryError, RequestError
from mmlora.lora.request import MAX_INT_ID, MEMORY, LoRARequest
from mmlora.lora.store.host_cache import HostCache
from mmlora.server.bodies import Body, body_schema, parse_body
from mmlora.server.errors import Refusal
from mmlora.server.http.admission import read_body
from mmlora.server.lora.resolved import ALLOW_VARIABLE
from mmlora.server.lora.served_models import ServedAdapter, ServedModels
from mmlora.utils.text import shorten

logger = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = 2**16
MAX_LORA_NAME_CHARS: Final = 255
MAX_LORA_PATH_CHARS: Final = 4096
# Random ids are in [2**52, 2**53): exact as JavaScript numbers, and far from ids that users choose.
FIRST_ID: Final = 2**52


class LoadBody(Body):
    """Body of a load request."""

    lora_name: str = Field(min_length=1, max_length=MAX_LORA_NAME_CHARS)
    lora_path: str = Field(min_length=1, max_length=MAX_LORA_PATH_CHARS)
    base_model_name: str | None = Field(None, min_length=1, max_length=MAX_LORA_NAME_CHARS)
    load_inplace: bool | None = None


class UnloadBody(Body):
    """Body of an unload request: the name of an adapter, its id, or both."""

    lora_name: str | None = None
    lora_int_id: int | None = Field(None, ge=1, le=MAX_INT_ID)


def adapter_routes(llm: AsyncLLM, models: ServedModels, *, is_allowed: bool) -> APIRouter:
    """Build the routes.

    Args:
        is_allowed: whether updates are allowed; if not, both routes return a 404 that says how to allow them.
    """
    updates = AdapterUpdates(llm, models)

    def check_allowed(request: Request) -> None:
        if not is_allowed:
            message = (
                f"{request.url.path} is disabled; set {ALLOW_VARIABLE}=true in the server's environment to enable it"
            )
            raise Refusal(404, message)

    routes = APIRouter(prefix="/v1", dependencies=[Depends(check_allowed)])

    @routes.post("/load_lora_adapter", openapi_extra=body_schema(LoadBody), response_class=PlainTextResponse)
    async def load(request: Request) -> PlainTextResponse:
        body = parse_body(LoadBody, await read_body(request, MAX_BODY_BYTES))
        return PlainTextResponse(await updates.load(body))

    @routes.post("/unload_lora_adapter", openapi_extra=body_schema(UnloadBody), response_class=PlainTextResponse)
    async def unload(request: Request) -> PlainTextResponse:
        body = parse_body(UnloadBody, await read_body(request, MAX_BODY_BYTES))
        return PlainTextResponse(await updates.unload(body))

    return routes


class AdapterUpdates:
    """Loads and unloads adapters of one server. An update that has started completes even if its client disconnects."""

    def __init__(self, llm: AsyncLLM, models: ServedModels) -> None:
        self._llm = llm
        self._models = models

    async def load(self, body: LoadBody) -> str:
        """Load and serve an adapter, or atomically replace a served one.

        Returns:
            The message for the client.

        Raises:
            RequestError: the name is not available, or the adapter cannot be used; nothing has changed.
            Refusal: 5xx if the adapter registry cannot be written; nothing has changed.
        """
        name = body.lora_name
        if not name.isprintable():
            raise RequestError(f"lora_name is {shorten(name)}; it must contain only printable characters", "lora_name")
        if body.lora_path.startswith(MEMORY):
            message = f"lora_path is {shorten(body.lora_path)}; it must be a directory or a Hub id"
            raise RequestError(message, "lora_path")
        await self._change(partial(self._load, body, self._host_cache()))
        logger.info("adapter %r was loaded from %r", name, body.lora_path)
        return f"Success: LoRA adapter '{name}' added successfully"

    async def unload(self, body: UnloadBody) -> str:
        """Stop serving an adapter; its memory is freed when the requests that use it have finished.

        Returns:
            The message for the client.

        Raises:
            RequestError: there is no such adapter, or it cannot be unloaded.
            Refusal: 5xx if the adapter registry cannot be written; nothing has changed.
        """
        if body.lora_name is None and body.lora_int_id is None:
            raise RequestError("lora_name or lora_int_id is required", "lora_name")
        name = body.lora_name if body.lora_name is not None else self._name_of(body.lora_int_id)
        await self._change(partial(self._unload, name, body.lora_int_id, self._host_cache()))
        logger.info("adapter %r was unloaded", name)
        return f"Success: LoRA adapter '{name}' removed successfully"

    async def _change(self, change: Callable[[], None]) -> None:
        try:
            await self._llm.change_loras(change)
        except RegistryError as error:
            logger.error("%s", error)
            status, headers = (503, {"retry-after": "1"}) if error.is_temporary else (500, None)
            message = f"{error.reason}; nothing has changed; the server's log names the file"
            raise Refusal(status, message, code="registry_error", headers=headers) from error

    def _host_cache(self) -> HostCache:
        host_cache = self._llm.host_cache
        if host_cache is None:
            raise RequestError("adapters cannot be loaded: the server runs without --enable-lora")
        return host_cache

    def _load(self, body: LoadBody, host_cache: HostCache) -> None:
        name = body.lora_name
        with self._models.name_locks.hold(name):
            served = self._check_name(name, may_replace=bool(body.load_inplace))
            former = served.request if served is not None else None
            request = LoRARequest(
                name,
                former.lora_int_id if former is not None else FIRST_ID + secrets.randbelow(FIRST_ID),
                body.lora_path,
                body.base_model_name or (former.base_model_name if former is not None else None),
                load_inplace=bool(body.load_inplace),
            )
            # `get` adds nothing to the registry, so that the next start loads `--lora-modules` as given.
            adapter = host_cache.get(request) if served is not None else host_cache.add(request)
            request = replace(request, lora_int_id=host_cache.find(name).request.lora_int_id, load_inplace=False)
            self._models.add_adapter(ServedAdapter(name, request, adapter.digest, adapter.report), replace=True)

    def _check_name(self, name: str, *, may_replace: bool) -> ServedAdapter | None:
        """Return the adapter that is already served under the name.

        Raises:
            RequestError: the name is not available.
        """
        if self._models.is_base(name):
            raise RequestError(f"lora_name {shorten(name)} is the name of the base model; choose another", "lora_name")
        served = self._models.adapters.get(name)
        if served is not None and served.default_for is not None:
            message = f"lora_name {name!r} is the name of the default adapter for {served.default_for}; choose another"
            raise RequestError(message, "lora_name")
        if served is not None and not may_replace:
            message = (
                f"the adapter {shorten(name)} is already loaded from {shorten(served.request.lora_path)}; "
                "load_inplace=true replaces it"
            )
            raise RequestError(message, "lora_name")
        return served

    def _unload(self, name: str, lora_int_id: int | None, host_cache: HostCache) -> None:
        if self._models.is_base(name):
            raise RequestError(f"{shorten(name)} is the base model, which cannot be unloaded", "lora_name")
        with self._models.name_locks.hold(name):
            served = self._models.adapters.get(name)
            if served is not None and lora_int_id not in (None, served.request.lora_int_id):
                message = (
                    f"lora_name={shorten(name)} and lora_int_id={lora_int_id} contradict each other: "
                    f"the id of {shorten(name)} is {served.request.lora_int_id}"
                )
                raise RequestError(message, "lora_int_id")
            self._models.find_removable(name)
            with suppress(AdapterNotFound):  # it was removed through the Python API
                host_cache.unrecord(name)  # first: if the registry cannot be written, nothing has changed
            adapter = self._models.remove_adapter(name)  # before the host cache, so that no new request selects it
            try:
                with suppress(AdapterNotFound):
                    host_cache.remove(name)
            except RequestError:
                self._models.add_adapter(adapter)
                raise

    def _name_of(self, lora_int_id: int | None) -> str:
        for name, adapter in self._models.adapters.items():
            if adapter.request.lora_int_id == lora_int_id:
                return name
        message = f"no adapter has lora_int_id={lora_int_id}; /v1/models lists all adapters"
        raise Refusal(404, message, param="lora_int_id", code="adapter_not_found")
