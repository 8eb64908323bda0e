"""Loading of an engine: model, processor, towers, adapters, KV cache and scheduler, in this order."""

import functools
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from mmlora.attention import choose_backend
from mmlora.attention.kv_cache import KVLayout, fit_max_model_len, kv_cache_bytes, num_kv_blocks
from mmlora.config import PRIORITY, EngineArgs
from mmlora.engine.block_manager import BlockManager
from mmlora.engine.model_runner import ModelRunner
from mmlora.engine.scheduler import Scheduler
from mmlora.errors import ConfigError
from mmlora.inputs.adapter_policy import parse_defaults
from mmlora.inputs.input_processor import InputProcessor
from mmlora.lora.adapter import Adapter
from mmlora.lora.layers.slots import LoRASlots
from mmlora.lora.loading.load import load_adapter
from mmlora.lora.loading.module_index import ModuleIndex
from mmlora.lora.request import LoRARequest
from mmlora.lora.store.host_cache import HostCache, LoadAdapter
from mmlora.lora.store.manager import LoRAManager
from mmlora.lora.store.registry import AdapterRegistry
from mmlora.models.config import load_config
from mmlora.models.decoder_check import check_decoder
from mmlora.models.default_adapters import choose_default_adapters
from mmlora.models.families import find_family, find_layout, get_key_mapping, get_processor, get_towers
from mmlora.models.loader import (
    load_meta_model,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
    resolve_max_model_len,
    resolve_model_path,
)
from mmlora.models.longrope import replace_longrope
from mmlora.models.media_check import check_media, process_blank_media
from mmlora.models.transcription import PROMPT_FIELD, TranscriptionPrompt, read_checkpoint_prompt
from mmlora.models.weights import check_weights, read_headers
from mmlora.processors.base import MultiModalProcessor, ProcessedMedia
from mmlora.structured_outputs import ConstraintCompiler
from mmlora.towers.encoder import MediaEncoder

logger = logging.getLogger(__name__)

DEFAULT_LORA_IDS = 2**62  # ids of default adapters start here, far from ids that callers choose
GENERATION_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class LoadedAdapters:
    """The parts of an engine for adapters; empty without LoRA. Defaults are by modality key, load times by name."""

    host_cache: HostCache | None = None
    slots: LoRASlots | None = None
    lora: LoRAManager | None = None
    defaults: dict[str, tuple[LoRARequest, Adapter]] = field(default_factory=dict)
    default_load_s: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineParts:
    """Everything that `LLMEngine` is made of."""

    tokenizer: Any
    max_model_len: int
    input_processor: InputProcessor
    runner: ModelRunner
    block_manager: BlockManager
    scheduler: Scheduler
    adapters: LoadedAdapters
    stop_ids: frozenset[int]
    long_length: int | None  # longer sequences use the long factors of longrope; None without longrope
    sampling_defaults: dict[str, Any]
    transcription_prompt: TranscriptionPrompt | None  # None if the model has none


def load_engine_parts(args: EngineArgs) -> EngineParts:
    """Load a model and everything around it.

    Raises:
        ConfigError: an option does not fit the model.
        AdapterError: a default adapter cannot be loaded. An adapter of the registry that fails is listed as broken.
    """
    path = resolve_model_path(args.model, args.revision)
    config = load_config(path)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, config, device)
    max_model_len = resolve_max_model_len(args.max_model_len, config)
    tokenizer = load_tokenizer(args, path)
    processor = get_processor(config, path, tokenizer)
    default_paths = choose_default_adapters(args, config, path)
    default_paths = parse_defaults(default_paths, processor.modalities if processor is not None else ())
    _check_limits(args, processor.modalities if processor is not None else frozenset())
    unchecked = _check_without_weights(args, config, path, processor)
    model = load_model(config, path, dtype=dtype, device=device)
    towers = get_towers(model)
    backend, layout = choose_backend(device), KVLayout.from_config(config, args.block_size, dtype)
    check_decoder(model, towers, backend, layout, max_model_len)
    check_media(unchecked, processor, towers, is_meta=False)
    long_length = replace_longrope(model)
    adapters = LoadedAdapters()
    if args.uses_lora:
        index = ModuleIndex(model, towers.part_of if towers is not None else None, get_key_mapping(path))
        load = functools.partial(
            load_adapter,
            index=index,
            dtype=dtype,
            max_lora_rank=args.max_lora_rank,
            allow_media_parts=args.enable_tower_connector_lora,
        )
        adapters = _load_adapters(args, model, load, device, default_paths, path)
    num_bytes, limit = kv_cache_bytes(args, device), max_model_len
    max_model_len = fit_max_model_len(args, layout.block_bytes, num_bytes, limit)
    if max_model_len < limit:
        logger.warning("max_model_len=%d: the KV cache holds no more of the model's %d tokens", max_model_len, limit)
    num_blocks = num_kv_blocks(args, layout.block_bytes, num_bytes, max_model_len)
    kv_cache = backend.allocate(layout, num_blocks, device)
    block_manager = BlockManager(num_blocks, args.block_size, enable_prefix_caching=args.enable_prefix_caching)
    stop_ids, sampling_defaults, transcription = _generation_config(args, path, config, tokenizer)
    lora_state = adapters.slots.state if adapters.slots is not None else None
    encoder = MediaEncoder(towers, lora_state, args.encoder_cache_memory_bytes) if towers is not None else None
    return EngineParts(
        tokenizer=tokenizer,
        max_model_len=max_model_len,
        input_processor=InputProcessor(
            args,
            tokenizer,
            vocab_size=model.get_input_embeddings().weight.shape[0],
            max_model_len=max_model_len,
            processor=processor,
            towers=towers,
            host_cache=adapters.host_cache,
            defaults=adapters.defaults,
            constraints=ConstraintCompiler(tokenizer, stop_ids),
        ),
        runner=ModelRunner(model, backend, kv_cache, encoder, lora_state),
        block_manager=block_manager,
        scheduler=Scheduler(
            block_manager,
            adapters.slots,
            args.num_seqs,
            args.num_batched_tokens,
            is_by_priority=args.scheduling_policy == PRIORITY,
        ),
        adapters=adapters,
        stop_ids=stop_ids,
        long_length=long_length,
        sampling_defaults=sampling_defaults,
        transcription_prompt=transcription,
    )


def _check_without_weights(
    args: EngineArgs, config: PretrainedConfig, path: Path, processor: MultiModalProcessor | None
) -> list[ProcessedMedia]:
    """Check what names and shapes show, before weights are read; return media that need weights for the check."""
    model = load_meta_model(config)
    check_weights(model, read_headers(str(path), None, path), find_layout(path))
    blank = process_blank_media(processor, args.mm_processor_kwargs)
    return check_media(blank, processor, get_towers(model), is_meta=True)


def _check_limits(args: EngineArgs, modalities: frozenset[str]) -> None:
    limits = args.limit_mm_per_prompt or {}
    unknown = sorted({name for name, limit in limits.items() if limit > 0} - modalities)
    if unknown:
        takes = ", ".join(sorted(modalities)) or "text only"
        raise ConfigError(f"limit_mm_per_prompt names {', '.join(unknown)}; the model takes {takes}")


def _load_adapters(
    args: EngineArgs,
    model: Any,
    load: LoadAdapter,
    device: torch.device,
    default_paths: dict[str, str],
    model_path: Path,
) -> LoadedAdapters:
    registry = AdapterRegistry(args.lora_registry) if args.lora_registry is not None else None
    default_cache = HostCache(load)
    defaults = _load_defaults(default_paths, default_cache, model_path)
    default_load_s = {entry.name: entry.load_s for entry in default_cache.entries}
    host_cache = HostCache(load, max_cpu_loras=args.num_host_loras, max_pinned=args.max_pinned_loras, registry=registry)
    slots = LoRASlots(model, args.num_slots, device)
    lora = LoRAManager(host_cache, slots, [adapter for _, adapter in defaults.values()], registry)
    return LoadedAdapters(host_cache, slots, lora, defaults, default_load_s)


def _load_defaults(
    paths: dict[str, str], host_cache: HostCache, model_path: Path
) -> dict[str, tuple[LoRARequest, Adapter]]:
    """Load each default adapter once per path, in a separate cache so that their names stay free for others."""
    defaults: dict[str, tuple[LoRARequest, Adapter]] = {}
    loaded: dict[str, Adapter] = {}
    layout = find_layout(model_path)
    for index, (key, path) in enumerate(paths.items()):
        request = LoRARequest(key, DEFAULT_LORA_IDS + index, path)
        if path not in loaded:
            files = layout.embedded_adapter(model_path, path) if layout is not None else None
            loaded[path] = host_cache.add(request, files)
        defaults[key] = request, loaded[path]
    return defaults


def _generation_config(
    args: EngineArgs, path: Path, config: PretrainedConfig, tokenizer: Any
) -> tuple[frozenset[int], dict[str, Any], TranscriptionPrompt | None]:
    """Read end-of-text tokens, sampling defaults and the transcription prompt from `generation_config.json`.

    Raises:
        ConfigError: the file is not JSON, or its prompt is malformed.
    """
    file = path / "generation_config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}") from None
    eos = content.get("eos_token_id", config.get_text_config().eos_token_id)
    ids = set(eos if isinstance(eos, list) else [eos]) | {tokenizer.eos_token_id}
    defaults = {}
    if args.generation_config == "auto":
        defaults = {name: content[name] for name in GENERATION_DEFAULTS if content.get(name) is not None}
        if content.get("do_sample") is False:
            defaults["temperature"] = 0.0
    family, own_prompt = find_family(config), content.get(PROMPT_FIELD)
    prompt = family.transcription if family is not None else None
    if own_prompt is not None:
        prompt = read_checkpoint_prompt(own_prompt)
    return frozenset(ids - {None}), defaults, prompt
