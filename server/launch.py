"""From options to a running HTTP server: claim the port, load the engine, serve, shut down."""

import gc
import os
import ssl
from collections.abc import Callable, Sequence

import uvicorn
from tqdm import tqdm

from mmlora.async_llm import AsyncLLM
from mmlora.config import EngineArgs
from mmlora.errors import AdapterError, ConfigError
from mmlora.lora.adapter import AdapterReport
from mmlora.lora.request import LoRARequest
from mmlora.lora.store.manager import LoRAInfo
from mmlora.server.api import build_app
from mmlora.server.args import ServerArgs
from mmlora.server.http.admission import Admission
from mmlora.server.http.auth import CORS
from mmlora.server.http.connection import ConnectionLimits
from mmlora.server.http.listener import address_of, listening, raise_file_limit, tls_of
from mmlora.server.http.server import HTTPServer
from mmlora.server.lora.resolved import ALLOW_VARIABLE, start_resolution
from mmlora.server.lora.served_models import LoRAModule, ServedAdapter, ServedModels
from mmlora.server.observability.startup_summary import announce
from mmlora.server.observability.tracing import Tracer, tracing
from mmlora.utils.environment import read_bool


def serve(engine_args: EngineArgs, server_args: ServerArgs) -> None:
    """Serve until the process is told to stop.

    Raises:
        ConfigError: the port is taken, or options, model and adapters do not fit together.
        AdapterError: an adapter cannot be loaded.
    """
    tls = tls_of(server_args)
    raise_file_limit(server_args.max_connections)
    endpoint, is_logged = server_args.otlp_traces_endpoint, server_args.log_requests
    with tracing(endpoint, engine_args.model_name, log_requests=is_logged) as tracer:
        _serve(engine_args, server_args, tls, tracer)


def _serve(engine_args: EngineArgs, args: ServerArgs, tls: ssl.SSLContext | None, tracer: Tracer | None) -> None:
    # Before the slow part, so that a taken port is told at once.
    with listening(args.host, args.port, args.uds) as listener:
        llm = AsyncLLM(engine_args)
        try:
            models = load_served_models(llm, args.lora_modules)
            start_resolution(llm, models, os.environ)
            address = address_of(listener, is_tls=tls is not None, root_path=args.root_path)

            def tell() -> None:
                announce(llm, models, args, address)

            server = build_server(llm, models, args, tls=tls, tracer=tracer, on_ready=tell)
            # What was loaded stays: a collection that went through it all would hold every request up.
            gc.collect()
            gc.freeze()
            server.run(sockets=[listener])
        finally:
            gc.unfreeze()
            llm.shutdown()


def build_server(
    llm: AsyncLLM,
    models: ServedModels,
    args: ServerArgs,
    *,
    tls: ssl.SSLContext | None = None,
    tracer: Tracer | None = None,
    on_ready: Callable[[], None],
) -> HTTPServer:
    """Build the application and the server around it.

    Args:
        llm, models: what is served.
        args: options of the server.
        tls: for TLS.
        tracer: traces the requests.
        on_ready: called when requests are served.
    """
    admission = Admission(
        llm.args.max_num_seqs,
        args.max_queued_requests,
        request_timeout=args.request_timeout,
        body_timeout=args.body_timeout,
    )
    cors = CORS(args.allowed_origins, args.allowed_methods, args.allowed_headers, args.allow_credentials)
    app = build_app(
        llm,
        models,
        api_key=args.api_keys or None,
        max_request_bytes=args.max_request_bytes,
        allow_lora_updates=read_bool(ALLOW_VARIABLE),
        log_requests=args.log_requests,
        tracer=tracer,
        admission=admission,
        cors=cors if args.allowed_origins else None,
        root_path=args.root_path,
        tool_call_parser=args.tool_call_parser if args.enable_auto_tool_choice else None,
    )
    config = uvicorn.Config(
        app,
        log_level=args.uvicorn_log_level,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_keep_alive=args.keep_alive_timeout,  # type: ignore[arg-type]  # it takes fractions, too
    )
    limits = ConnectionLimits(args.max_connections, args.header_timeout, args.write_timeout)
    return HTTPServer(config, llm, admission, limits, tls=tls, drain_timeout=args.drain_timeout, on_ready=on_ready)


def load_served_models(llm: AsyncLLM, lora_modules: Sequence[LoRAModule] = ()) -> ServedModels:
    """Load the adapters of `--lora-modules` and name everything that an engine serves.

    Raises:
        ConfigError: two models share a name, or adapters are given to an engine without LoRA.
        AdapterError: an adapter cannot be loaded.
    """
    args, store, defaults = llm.args, llm.adapter_store, llm.default_adapters
    adapters = [
        ServedAdapter(key, request, adapter.digest, adapter.report, default_for=key)
        for key, (request, adapter) in defaults.items()
    ]
    if lora_modules and store is None:
        raise ConfigError(f"lora_modules: {lora_modules[0].name!r} needs enable_lora=True")
    for name in args.model_names:
        if name in defaults:
            raise ConfigError(f"served_model_name={name!r} is the key of a default adapter; choose another name")
    names = [*args.model_names, *defaults]
    # The bar is drawn only where standard error is a terminal.
    for lora_int_id, module in enumerate(tqdm(lora_modules, "Loading adapters", disable=None, leave=False), start=1):
        if module.name in names:
            raise ConfigError(f"lora_modules: the name {module.name!r} is taken; taken are {', '.join(names)}")
        names.append(module.name)
        request = LoRARequest(module.name, lora_int_id, module.path, module.base_model_name)
        assert store is not None
        adapter = store.get(request)
        adapters.append(ServedAdapter(module.name, request, adapter.digest, adapter.report))
    restored = llm.engine.list_loras() if store is not None else []
    adapters += [_restored(llm, info) for info in restored if info.name not in names]
    base_name, *aliases = args.model_names
    return ServedModels(base_name, args.model, llm.max_model_len, adapters, aliases)


def _restored(llm: AsyncLLM, info: LoRAInfo) -> ServedAdapter:
    """An adapter that the registry kept, whether it can be used or not."""
    store, problem = llm.adapter_store, info.problem
    assert store is not None
    if problem is None:
        try:
            adapter = store.get(info.request)
            return ServedAdapter(info.name, info.request, adapter.digest, adapter.report)
        except AdapterError as error:
            problem = str(error)
    return ServedAdapter(info.name, info.request, info.digest, AdapterReport(0, {}), problem=problem)
