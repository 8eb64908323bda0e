"""Serving adapters that resolvers find: each is loaded, which verifies it, and then served by name."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from mmlora.async_llm import AsyncLLM
from mmlora.errors import AdapterNotFound, ResolverError
from mmlora.lora.loading.files import CONFIG_FILE
from mmlora.lora.request import LoRARequest
from mmlora.lora.resolution import LoRAResolution, ResolutionLimits
from mmlora.lora.resolver import LoRAResolverRegistry
from mmlora.lora.store.host_cache import HostCache
from mmlora.plugins import load_general_plugins
from mmlora.server.lora.served_models import ServedAdapter, ServedModels
from mmlora.utils.environment import read_bool

logger = logging.getLogger(__name__)

ALLOW_VARIABLE = "MMLORA_ALLOW_RUNTIME_LORA_UPDATING"


def start_resolution(llm: AsyncLLM, models: ServedModels, environment: Mapping[str, str]) -> None:
    """Load plugins, and enable resolvers for unknown names if `MMLORA_ALLOW_RUNTIME_LORA_UPDATING` is true.

    Args:
        llm: loads the adapters.
        models: serves them; `resolution` is set.
        environment: environment variables; see `docs/resolvers.md`.

    Raises:
        ConfigError: a variable is invalid, or a plugin cannot be loaded.
    """
    is_allowed = read_bool(ALLOW_VARIABLE, environment)
    limits = ResolutionLimits.from_environment(environment)
    load_general_plugins(environment)
    host_cache = llm.host_cache
    if is_allowed and host_cache is not None:
        models.resolution = LoRAResolution(llm.model_name, _AdapterLoader(llm, models, host_cache), limits)
    elif LoRAResolverRegistry.get_supported_resolvers():
        needs = "enable_lora=True" if is_allowed else f"{ALLOW_VARIABLE}=true"
        logger.warning("%s needs %s: it is not used", ", ".join(LoRAResolverRegistry.get_supported_resolvers()), needs)


class _AdapterLoader:
    """Loads and serves the adapter that a resolver found."""

    def __init__(self, llm: AsyncLLM, models: ServedModels, host_cache: HostCache) -> None:
        self._llm = llm
        self._models = models
        self._host_cache = host_cache

    async def __call__(self, request: LoRARequest) -> None:
        await self._llm.run_in_pool(self._load, request, pool="loader")

    def _load(self, request: LoRARequest) -> None:
        request = _as_directory(request)
        with self._models.name_locks.hold(request.lora_name):
            if request.lora_name in self._models.names:
                return  # a client has loaded an adapter of this name
            if self._host_cache.is_draining(request.lora_name):  # a temporary state
                raise ResolverError(f"adapter {request.lora_name!r} is being unloaded")
            adapter = self._host_cache.get(request)
            self._warn_about_base(request, adapter.path)
            self._models.add_adapter(ServedAdapter(request.lora_name, request, adapter.digest, adapter.report))

    def _warn_about_base(self, request: LoRARequest, directory: Path | None) -> None:
        trained_on = request.base_model_name or _base_model_in(directory)
        if trained_on not in (None, *self._llm.args.model_names, self._llm.args.model):
            logger.warning(
                "adapter %r was trained on %r; its shapes match this model, so it is used",
                request.lora_name,
                trained_on,
            )


def _as_directory(request: LoRARequest) -> LoRARequest:
    """Make the path absolute: a relative path that does not exist would be read as a Hub id that a client chose.

    Raises:
        AdapterNotFound: the directory does not exist.
    """
    directory = os.path.abspath(os.path.expanduser(request.lora_path))
    if not os.path.isdir(directory):
        raise AdapterNotFound(f"lora_path is {request.lora_path!r}; a resolver must return a local directory")
    return replace(request, lora_path=directory)


def _base_model_in(directory: Path | None) -> str | None:
    """Return the base model that an adapter's configuration names."""
    if directory is None:
        return None
    name = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8")).get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None
