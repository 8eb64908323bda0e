"""What a server says of itself once it is ready: the model, its parts and adapters, memory, bounds, and where it is."""

import logging
from typing import Any

from mmlora.async_llm import AsyncLLM
from mmlora.server.args import ServerArgs
from mmlora.server.lora.served_models import ServedModels
from mmlora.server.observability.log_format import STARTUP_LOGGER
from mmlora.utils.text import printable, size_text

logger = logging.getLogger(STARTUP_LOGGER)


def announce(llm: AsyncLLM, models: ServedModels, args: ServerArgs, address: str) -> None:
    """Say that requests are served, and what serves them: for people, or as one object of the JSON log.

    Args:
        llm, models: what is served.
        args: options of the server.
        address: its URL.
    """
    url = address if address.startswith("unix:") else f"{address}/v1"
    print(f"mmlora is ready: {url} serves {', '.join(models.names)}", flush=True)
    facts = summary(llm, models, args, url)
    if args.log_format == "json":
        logger.info("mmlora is ready", extra={"fields": facts})
    else:
        print(as_text(facts), flush=True)


def summary(llm: AsyncLLM, models: ServedModels, args: ServerArgs, url: str) -> dict[str, Any]:
    """All that is told, by name."""
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
        "max_num_seqs": options.max_num_seqs,
        "max_queued_requests": args.max_queued_requests,
        "request_timeout": args.request_timeout,
        "num_api_keys": len(args.api_keys),
        "allowed_origins": list(args.allowed_origins),
    }


def as_text(facts: dict[str, Any]) -> str:
    """A few lines for people."""
    parameters = ", ".join(f"{part.replace('_', ' ')} {_count_text(num)}" for part, num in facts["parameters"].items())
    keys_of: dict[str, list[str]] = {}
    for key, path in facts["default_adapters"].items():
        keys_of.setdefault(path, []).append(key)
    defaults = [f"{path} for {' and '.join(keys)}" for path, keys in keys_of.items()]
    slots = f"; {facts['lora_slots']} in one step" if facts["lora_slots"] else " (LoRA is off)"
    encoded = f", encoded media {size_text(facts['encoder_cache_bytes'])}" if facts["encoder_cache_bytes"] else ""
    timeout = f", {facts['request_timeout']:g} s each" if facts["request_timeout"] is not None else ""
    keys = f"{facts['num_api_keys']} API key(s)" if facts["num_api_keys"] else "no API key: everyone is let in"
    origins = f", pages of {', '.join(facts['allowed_origins'])}" if facts["allowed_origins"] else ""
    lines = {
        "model": f"{facts['model']} ({facts['class']}), takes {', '.join(facts['takes'])}",
        "parameters": f"{parameters}; {facts['dtype']} on {facts['device']}",
        "adapters": (", ".join(facts["adapters"]) or "none") + slots,
        "applied by itself": ", ".join(defaults),
        "broken": "; ".join(f"{name}: {problem}" for name, problem in facts["broken_adapters"].items()),
        "context": f"{facts['max_model_len']} tokens",
        "memory": f"KV cache {size_text(facts['kv_cache_bytes'])} ({facts['kv_cache_tokens']} tokens){encoded}",
        "requests": f"{facts['max_num_seqs']} run, {facts['max_queued_requests']} wait{timeout}",
        "access": keys + origins,
    }
    return "\n".join(printable(f"  {name:<18}{text}") for name, text in lines.items() if text)


def _count_text(count: int) -> str:
    """Write a count for people: 3.8 B, 440 M, 12 k."""
    units = ((10**9, "B"), (10**6, "M"), (10**3, "k"))
    return next((f"{count / unit:.3g} {name}" for unit, name in units if count >= unit), str(count))
