"""Launch the HTTP server: claim the port, load the engine, serve, shut down."""

import gc
import logging
import os
import ssl
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import uvicorn
from tqdm import tqdm

from mmlora.async_llm import AsyncLLM
from mmlora.config import EngineArgs
from mmlora.errors import AdapterError, ConfigError
from mmlora.lora.adapter import AdapterReport
from mmlora.lora.request import LoRARequest
from mmlora.lora.store.manager import LoRAInfo
from mmlora.server.api import build_app
from mmlora.server.args import LoRAModule, ServerArgs
from mmlora.server.http.admission import Admission
from mmlora.server.http.auth import CORS
from mmlora.server.http.listener import format_url, is_loopback, listening, raise_file_limit
from mmlora.server.http.origins import AllowedHosts
from mmlora.server.http.server import ConnectionLimits, HTTPServer
from mmlora.server.lora.resolved import ALLOW_VARIABLE, start_resolution
from mmlora.server.lora.served_models import ServedAdapter, ServedModels
from mmlora.server.observability.log_format import STARTUP_LOGGER
from mmlora.server.observability.tracing import Tracer, tracing
from mmlora.utils.environment import read_bool
from mmlora.utils.text import print_text, printable, size_text

logger = logging.getLogger(STARTUP_LOGGER)


def serve(engine_args: EngineArgs, server_args: ServerArgs) -> None:
    """Serve until the process gets a signal.

    Raises:
        ConfigError: the port is taken, or options, model and adapters do not fit together.
        AdapterError: an adapter cannot be loaded.
    """
    tls = load_tls(server_args)
    warn_if_exposed(server_args)
    raise_file_limit(server_args.max_connections)
    endpoint, is_logged = server_args.otlp_traces_endpoint, server_args.log_requests
    with tracing(endpoint, engine_args.model_name, log_requests=is_logged) as tracer:
        _serve(engine_args, server_args, tls, tracer)


def _serve(engine_args: EngineArgs, args: ServerArgs, tls: ssl.SSLContext | None, tracer: Tracer | None) -> None:
    # Listen before loading the model, which is slow, so that a taken port is reported at once.
    with listening(args.host, args.port, args.uds) as listener:
        llm = AsyncLLM(engine_args)
        try:
            if llm.processor is not None:
                llm.media.workers.start()
            models = load_served_models(llm, args.lora_modules)
            start_resolution(llm, models, os.environ)
            url = format_url(listener, is_tls=tls is not None, root_path=args.root_path)
            on_ready = partial(announce, llm, models, args, url)
            server = build_server(llm, models, args, tls=tls, tracer=tracer, on_ready=on_ready)
            # Exclude what was loaded from garbage collection: traversing it would stall all requests.
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
    """Build the application and its server, which calls `on_ready` when it accepts connections."""
    admission = Admission(
        llm.args.num_seqs,
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
        metrics_prefix=args.metrics_prefix,
        cors=cors if args.allowed_origins else None,
        allowed_hosts=allowed_hosts(args),
        root_path=args.root_path,
        tool_call_parser=args.tool_call_parser if args.enable_auto_tool_choice else None,
        reasoning_parser=args.reasoning_parser,
    )
    config = uvicorn.Config(
        app,
        log_level=args.uvicorn_log_level,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_keep_alive=args.keep_alive_timeout,  # type: ignore[arg-type]  # fractions work, too
    )
    limits = ConnectionLimits(args.max_connections, args.header_timeout, args.write_timeout)
    return HTTPServer(config, llm, admission, limits, tls=tls, drain_timeout=args.drain_timeout, on_ready=on_ready)


def allowed_hosts(args: ServerArgs) -> AllowedHosts | None:
    """Return the hosts that requests may address, or None to allow all.

    Without an API key, a server on a loopback address is only protected by being local, which DNS rebinding defeats.
    """
    is_local = args.uds is None and is_loopback(args.host)
    is_checked = bool(args.allowed_hosts) or (is_local and not args.api_keys)
    return AllowedHosts(args.allowed_hosts, is_local) if is_checked else None


def warn_if_exposed(args: ServerArgs) -> None:
    """Log a warning if a server on a public address has neither an API key nor a list of hosts."""
    if args.uds is None and not (args.api_keys or args.allowed_hosts or is_loopback(args.host)):
        logger.warning(
            "host=%r without an API key: everyone who can reach this server can use it, and web pages can through the "
            "browsers of its users (DNS rebinding); set --api-key, or at least --allowed-hosts",
            args.host,
        )


def load_served_models(llm: AsyncLLM, lora_modules: Sequence[LoRAModule] = ()) -> ServedModels:
    """Load the adapters of `--lora-modules` and return everything that the engine serves, by name.

    Raises:
        ConfigError: two models share a name, or adapters are given to an engine without LoRA.
        AdapterError: an adapter cannot be loaded.
    """
    args, host_cache, defaults = llm.args, llm.host_cache, llm.default_adapters
    adapters = [
        ServedAdapter(key, request, adapter.digest, adapter.report, default_for=key)
        for key, (request, adapter) in defaults.items()
    ]
    if lora_modules and host_cache is None:
        raise ConfigError(f"lora_modules: {lora_modules[0].name!r} needs enable_lora=True")
    for name in args.model_names:
        if name in defaults:
            raise ConfigError(f"served_model_name={name!r} is the key of a default adapter; choose another name")
    names = [*args.model_names, *defaults]
    # `disable=None` draws the progress bar only if standard error is a terminal.
    for lora_int_id, module in enumerate(tqdm(lora_modules, "Loading adapters", disable=None, leave=False), start=1):
        if module.name in names:
            raise ConfigError(f"lora_modules: the name {module.name!r} is taken; served names are {', '.join(names)}")
        names.append(module.name)
        request = LoRARequest(module.name, lora_int_id, module.path, module.base_model_name)
        assert host_cache is not None
        adapter = host_cache.get(request)
        adapters.append(ServedAdapter(module.name, request, adapter.digest, adapter.report))
    adapters += [_restore_adapter(llm, info) for info in llm.known_loras if info.name not in names]
    base_name, *aliases = args.model_names
    return ServedModels(base_name, args.model, llm.max_model_len, adapters, aliases)


def _restore_adapter(llm: AsyncLLM, info: LoRAInfo) -> ServedAdapter:
    """Return an adapter of the registry; one that cannot be used is served with its problem."""
    host_cache, problem = llm.host_cache, info.problem
    assert host_cache is not None
    if problem is None:
        try:
            adapter = host_cache.get(info.request)
            return ServedAdapter(info.name, info.request, adapter.digest, adapter.report)
        except AdapterError as error:
            problem = str(error)
    return ServedAdapter(info.name, info.request, info.digest, AdapterReport(0, {}), problem=problem)


def load_tls(args: ServerArgs) -> ssl.SSLContext | None:
    """Load certificates and keys; return None if no certificate is given.

    Raises:
        ConfigError: a file cannot be used.
    """
    if args.ssl_certfile is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(args.ssl_certfile, args.ssl_keyfile, password=_refuse_encrypted_key)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        key = f", ssl_keyfile={args.ssl_keyfile!r}" if args.ssl_keyfile else ""
        raise ConfigError(f"ssl_certfile={args.ssl_certfile!r}{key}: {_describe_tls_error(error)}") from None
    try:
        if args.ssl_ca_certs is not None:
            context.load_verify_locations(args.ssl_ca_certs)
        context.verify_mode = ssl.VerifyMode(args.ssl_cert_reqs)
    except (OSError, ValueError) as error:
        raise ConfigError(f"ssl_ca_certs={args.ssl_ca_certs!r}: {_describe_tls_error(error)}") from None
    return context


def _refuse_encrypted_key() -> str:
    raise ValueError("the key is encrypted; only keys without a passphrase can be used")


def _describe_tls_error(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return f"not a usable PEM file ({error.reason or error})"
    return getattr(error, "strerror", None) or str(error)


def announce(llm: AsyncLLM, models: ServedModels, args: ServerArgs, url: str) -> None:
    """Report that the server is ready, with a summary: as text, or as one object of the JSON log."""
    url = url if url.startswith("unix:") else f"{url}/v1"
    fields, is_json = summarize(llm, models, args, url), args.log_format == "json"
    ready = f"mmlora is ready: {url} serves {', '.join(models.names)}"
    text = ready if is_json else f"{ready}\n{format_summary(fields)}"
    if not print_text(text, errors="backslashreplace"):
        logger.warning("standard output cannot be written; %s", ready)
    if is_json:
        logger.info("mmlora is ready", extra={"fields": fields})


def summarize(llm: AsyncLLM, models: ServedModels, args: ServerArgs, url: str) -> dict[str, Any]:
    """Return the fields of the startup summary."""
    engine, options = llm.summary(), llm.args
    return {
        "url": url,
        "model": options.model,
        "class": engine.model_class,
        "takes": ["text", *engine.modalities],
        "parameters": dict(engine.num_parameters),
        "dtype": engine.dtype,
        "device": engine.device,
        "max_model_len": llm.max_model_len,
        "adapters": [name for name, adapter in models.adapters.items() if adapter.default_for is None],
        "default_adapters": {key: request.lora_path for key, (request, _) in llm.default_adapters.items()},
        "broken_adapters": {name: adapter.problem for name, adapter in models.adapters.items() if adapter.problem},
        "lora_slots": engine.num_lora_slots,
        "kv_cache_bytes": engine.kv_cache_bytes,
        "kv_cache_tokens": engine.kv_cache_tokens,
        "encoder_cache_bytes": engine.encoder_cache_bytes,
        "max_num_seqs": options.num_seqs,
        "max_queued_requests": args.max_queued_requests,
        "request_timeout": args.request_timeout,
        "num_api_keys": len(args.api_keys),
        "allowed_origins": list(args.allowed_origins),
        "allowed_hosts": list(args.allowed_hosts),
    }


def format_summary(fields: dict[str, Any]) -> str:
    """Format the startup summary as a few lines of text."""
    parameters = ", ".join(f"{part.replace('_', ' ')} {_format_count(n)}" for part, n in fields["parameters"].items())
    keys_of: dict[str, list[str]] = {}
    for key, path in fields["default_adapters"].items():
        keys_of.setdefault(path, []).append(key)
    defaults = [f"{path} for {' and '.join(keys)}" for path, keys in keys_of.items()]
    slots = f"; {fields['lora_slots']} per step" if fields["lora_slots"] else " (LoRA is off)"
    encoded = f", encoder cache {size_text(fields['encoder_cache_bytes'])}" if fields["encoder_cache_bytes"] else ""
    timeout = f", {fields['request_timeout']:g} s each" if fields["request_timeout"] is not None else ""
    keys = f"{fields['num_api_keys']} API key(s)" if fields["num_api_keys"] else "no API key: all requests are admitted"
    origins = f", origins {', '.join(fields['allowed_origins'])}" if fields["allowed_origins"] else ""
    hosts = f", hosts {', '.join(fields['allowed_hosts'])}" if fields["allowed_hosts"] else ""
    lines = {
        "model": f"{fields['model']} ({fields['class']}), takes {', '.join(fields['takes'])}",
        "parameters": f"{parameters}; {fields['dtype']} on {fields['device']}",
        "adapters": (", ".join(fields["adapters"]) or "none") + slots,
        "default adapters": ", ".join(defaults),
        "broken adapters": "; ".join(f"{name}: {problem}" for name, problem in fields["broken_adapters"].items()),
        "context": f"{fields['max_model_len']} tokens",
        "memory": f"KV cache {size_text(fields['kv_cache_bytes'])} ({fields['kv_cache_tokens']} tokens){encoded}",
        "requests": f"{fields['max_num_seqs']} running, {fields['max_queued_requests']} waiting{timeout}",
        "access": keys + origins + hosts,
    }
    return "\n".join(printable(f"  {name:<18}{text}") for name, text in lines.items() if text)


def _format_count(count: int) -> str:
    """Format a count: 3.8 B, 440 M, 12 k."""
    units = ((10**9, "B"), (10**6, "M"), (10**3, "k"))
    return next((f"{count / unit:.3g} {name}" for unit, name in units if count >= unit), str(count))
