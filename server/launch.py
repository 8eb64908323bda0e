"""From options to a running HTTP server: claim the port, load the engine, serve, shut down."""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import uvicorn

from mmlora.async_llm import AsyncLLM
from mmlora.config import EngineArgs
from mmlora.environment import read_bool
from mmlora.errors import AdapterError, ConfigError
from mmlora.lora.adapter import AdapterReport
from mmlora.lora.info import LoRAInfo
from mmlora.lora.request import LoRARequest
from mmlora.server.api import DEFAULT_MAX_REQUEST_BYTES, build_app
from mmlora.server.logs import LOG_FORMATS
from mmlora.server.models import LoRAModule, ServedModels
from mmlora.server.resolved import ALLOW_VARIABLE, start_resolution
from mmlora.server.served_adapter import ServedAdapter
from mmlora.server.tool_formats import PARSER_NAMES


@dataclass(frozen=True)
class ServerArgs:
    """Options of the server that are not the engine's.

    Args:
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        api_key: what clients must send as bearer token; without it everyone is let in.
        lora_modules: adapters to load at start, each `name=path` or a JSON object with `name`, `path` and
            `base_model_name`.
        max_request_bytes: largest body of a request, in bytes.
        uvicorn_log_level: of uvicorn and the access lines: critical, error, warning, info, debug or trace.
        log_format: text, or json: one object per line.
        log_requests: log prompts, and media as hashes and sizes.
        enable_auto_tool_choice: let the model choose whether it calls a tool.
        tool_call_parser: the format in which the model writes tool calls: auto (as its chat template says), mistral,
            phi4_mini_json, granite, hermes or llama3_json.

    Raises:
        ConfigError: an option has a wrong value.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    lora_modules: Sequence[LoRAModule] = ()
    max_request_bytes: int = DEFAULT_MAX_REQUEST_BYTES
    uvicorn_log_level: str = "info"
    log_format: str = "text"
    log_requests: bool = False
    enable_auto_tool_choice: bool = True
    tool_call_parser: str = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port={self.port}: must be from 0 to 65535")
        if self.api_key is not None and not self.api_key.strip():
            raise ConfigError("api_key is empty; give a key, or leave it out to let everyone in")
        if self.max_request_bytes < 1:
            raise ConfigError(f"max_request_bytes={self.max_request_bytes}: must be a positive integer")
        if self.uvicorn_log_level not in uvicorn.config.LOG_LEVELS:
            allowed = ", ".join(uvicorn.config.LOG_LEVELS)
            raise ConfigError(f"uvicorn_log_level={self.uvicorn_log_level!r}: must be one of {allowed}")
        if self.log_format not in LOG_FORMATS:
            raise ConfigError(f"log_format={self.log_format!r}: must be one of {', '.join(LOG_FORMATS)}")
        if self.tool_call_parser not in ("auto", *PARSER_NAMES):
            allowed = ", ".join(("auto", *PARSER_NAMES))
            raise ConfigError(f"tool_call_parser={self.tool_call_parser!r}: must be one of {allowed}")


def serve(engine_args: EngineArgs, server_args: ServerArgs) -> None:
    """Serve until the process is told to stop.

    Raises:
        ConfigError: the port is taken, or options, model and adapters do not fit together.
        AdapterError: an adapter cannot be loaded.
    """
    listener = _listen(server_args.host, server_args.port)  # before the slow part, so that a taken port is told at once
    try:
        llm = AsyncLLM(engine_args)
        try:
            models = load_served_models(llm, server_args.lora_modules)
            start_resolution(llm, models, os.environ)
            app = build_app(
                llm,
                models,
                api_key=server_args.api_key,
                max_request_bytes=server_args.max_request_bytes,
                allow_lora_updates=read_bool(ALLOW_VARIABLE),
                log_requests=server_args.log_requests,
                tool_call_parser=server_args.tool_call_parser if server_args.enable_auto_tool_choice else None,
            )
            level = server_args.uvicorn_log_level
            config = uvicorn.Config(app, log_level=level, log_config=None, access_log=False, lifespan="off")
            _Server(config, models.names).run(sockets=[listener])
        finally:
            llm.shutdown()
    finally:
        listener.close()


def load_served_models(llm: AsyncLLM, lora_modules: Sequence[LoRAModule] = ()) -> ServedModels:
    """Load the adapters of `--lora-modules` and name everything that an engine serves.

    Raises:
        ConfigError: two models share a name, or adapters are given to an engine without LoRA.
        AdapterError: an adapter cannot be loaded.
    """
    args, parts = llm.engine.args, llm.engine.parts
    adapters = [
        ServedAdapter(key, request, adapter.digest, adapter.report, default_for=key)
        for key, (request, adapter) in parts.defaults.items()
    ]
    if lora_modules and parts.store is None:
        raise ConfigError(f"lora_modules: {lora_modules[0].name!r} needs enable_lora=True")
    if llm.model_name in parts.defaults:
        raise ConfigError(f"served_model_name={llm.model_name!r} is the key of a default adapter; choose another name")
    names = [llm.model_name, *parts.defaults]
    for lora_int_id, module in enumerate(lora_modules, start=1):
        if module.name in names:
            raise ConfigError(f"lora_modules: the name {module.name!r} is taken; taken are {', '.join(names)}")
        names.append(module.name)
        request = LoRARequest(module.name, lora_int_id, module.path, module.base_model_name)
        assert parts.store is not None
        adapter = parts.store.get(request)
        adapters.append(ServedAdapter(module.name, request, adapter.digest, adapter.report))
    restored = llm.engine.list_loras() if parts.store is not None else []
    adapters += [_restored(llm, info) for info in restored if info.name not in names]
    return ServedModels(llm.model_name, args.model, llm.engine.max_model_len, adapters)


def _restored(llm: AsyncLLM, info: LoRAInfo) -> ServedAdapter:
    """An adapter that the registry kept, whether it can be used or not."""
    store, problem = llm.engine.parts.store, info.problem
    assert store is not None
    if problem is None:
        try:
            adapter = store.get(info.request)
            return ServedAdapter(info.name, info.request, adapter.digest, adapter.report)
        except AdapterError as error:
            problem = str(error)
    return ServedAdapter(info.name, info.request, info.digest, AdapterReport(0, {}), problem=problem)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"host={host!r}: {error.strerror or error}") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen()  # two sockets may be bound to a port, but only one listens
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}, port {port}: {error.strerror}") from None
    return listener


class _Server(uvicorn.Server):
    """Says in one line when it is ready, and under which names it serves."""

    def __init__(self, config: uvicorn.Config, names: Sequence[str]) -> None:
        super().__init__(config)
        self._names = names

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if not self.should_exit and sockets:
            host, port = sockets[0].getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            print(f"mmlora is ready: http://{host}:{port}/v1 serves {', '.join(self._names)}", flush=True)
