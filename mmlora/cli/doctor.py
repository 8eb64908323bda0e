"""Reports on models and adapters from configurations and file headers, without reading the model's weights."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PretrainedConfig

from mmlora.attention.kv_cache import KVLayout, fit_max_model_len, kv_cache_bytes, num_kv_blocks
from mmlora.cli.model_table import Parity, read_parity
from mmlora.cli.options import DOCTOR_OPTIONS
from mmlora.config import EngineArgs
from mmlora.errors import ConfigError
from mmlora.lora.loading.files import CONFIG_FILE, read_adapter, resolve_adapter_path
from mmlora.lora.loading.inspection import Inspection, count_modules, inspect_adapter
from mmlora.lora.loading.module_index import ModuleIndex, linear_shape
from mmlora.models.config import check_config, class_name, load_config, read_config
from mmlora.models.default_adapters import find_default_adapters
from mmlora.models.families import FAMILIES, family_key, find_layout, get_key_mapping, get_processor, get_towers
from mmlora.models.loader import (
    CONFIG_FILES,
    MODEL_FILES,
    load_meta_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
    resolve_max_model_len,
    resolve_model_path,
)
from mmlora.models.media_check import check_media, process_blank_media
from mmlora.models.weights import check_weights, count_bytes, read_headers
from mmlora.utils.library_errors import LIBRARY_ERRORS
from mmlora.utils.text import one_line, printable, size_text

FILES: Final = [pattern for pattern in MODEL_FILES if pattern != "*.safetensors"]


@dataclass(frozen=True)
class Diagnosis:
    """Report on one model. Fields that are determined after the problem keep their defaults.

    Attributes:
        model: directory or Hub id.
        model_class: class named by its configuration.
        family: name in the table of families; None for a text decoder that is not in the table.
        proof: how the family was verified.
        problem: why it cannot be served, the same message as when loading fails; None if it can be served.
        adapters: subdirectories with adapters, each with the modalities it is the default for.
        default_mm_loras: value of the option that enables these defaults.
        command: command line that serves the model.
        modalities: supported modalities besides text.
        parts: number of modules that LoRA can target in each part.
        context_length: the model's context length in tokens.
        max_model_len: maximum sequence length in tokens with the given options.
        dtype: type of weights and KV cache.
        stored_bytes: size of the weights on disk by type.
        weight_bytes: size of the weights in memory.
        kv_token_bytes: size of the KV cache per token.
        kv_bytes: size of the KV cache for one sequence of `max_model_len`.
        rank_bytes: size of an adapter on every linear module, per rank.
    """

    model: str
    model_class: str
    family: str | None
    proof: str
    problem: str | None
    adapters: dict[str, tuple[str, ...]]
    default_mm_loras: dict[str, str]
    command: str | None
    modalities: tuple[str, ...] = ()
    parts: dict[str, int] | None = None
    context_length: int | None = None
    max_model_len: int | None = None
    dtype: str | None = None
    stored_bytes: dict[str, int] | None = None
    weight_bytes: int | None = None
    kv_token_bytes: int | None = None
    kv_bytes: int | None = None
    rank_bytes: int | None = None

    def as_text(self) -> str:
        """Return the report as text for a terminal."""
        verdict = "can be served" if self.problem is None else "CANNOT be served"
        lines = [f"{self.model} {verdict}", *([f"  reason: {self.problem}"] if self.problem is not None else [])]
        lines += [f"  {name:<15} {fact}" for name, fact in self._facts().items() if fact]
        return "\n".join(map(printable, lines))

    def _facts(self) -> dict[str, str | None]:
        """Return everything but the verdict by label, None where unknown."""
        parts = [f"{name.replace('_', ' ')} {count} modules" for name, count in (self.parts or {}).items() if count]
        adapters = [name + (f" (for {', '.join(keys)})" if keys else "") for name, keys in self.adapters.items()]
        stored = ", ".join(f"{size_text(count)} of {dtype}" for dtype, count in (self.stored_bytes or {}).items())
        modalities = ", ".join(("text", *self.modalities))
        return {
            "class": f"{self.model_class}, {self.family or 'not in the table of families'}",
            "verified": self.proof,
            "modalities": modalities if self.parts is not None else None,
            "LoRA targets": ", ".join(parts),
            "adapters": ", ".join(adapters) or "none in the directory",
            "context": f"{self.max_model_len} of {self.context_length} tokens" if self.max_model_len else None,
            "on disk": stored,
            "weights": f"{size_text(self.weight_bytes)} in {self.dtype}" if self.weight_bytes is not None else None,
            "KV cache": self._kv_text(),
            "adapter size": f"{size_text(self.rank_bytes)} per rank, on all linear modules"
            if self.rank_bytes
            else None,
            "command": self.command,
        }

    def _kv_text(self) -> str | None:
        if self.kv_token_bytes is None or self.kv_bytes is None:
            return None
        return f"{size_text(self.kv_token_bytes)} per token, {size_text(self.kv_bytes)} for {self.max_model_len} tokens"


def diagnose(args: EngineArgs) -> Diagnosis:
    """Report on a model without reading its weights.

    Args:
        args: options that it would be loaded with.

    Raises:
        ConfigError: its configuration cannot be read.
    """
    path = resolve_model_path(args.model, args.revision, FILES)
    config = read_config(path)
    facts: dict[str, Any] = {}
    problem = None
    try:
        _examine(args, path, config, facts)
    except ConfigError as error:
        problem = one_line(str(error))
    except LIBRARY_ERRORS as error:  # raised by libraries on malformed files
        problem = one_line(f"{type(error).__name__}: {error}")
    key = family_key(config)
    defaults = _as_given(args, path, find_default_adapters(config, path))
    return Diagnosis(
        model=args.model,
        model_class=printable(str(class_name(config))),
        family=FAMILIES[key].name if key is not None else None,
        proof=_proof(read_parity().get(key) if key is not None else None),
        problem=problem,
        adapters=_adapters(config, path),
        default_mm_loras=defaults,
        command=_command(args, defaults) if problem is None else None,
        **facts,
    )


def examine_adapter(adapter: str, model: str) -> Inspection:
    """Report on an adapter for a model without reading the model's weights.

    Args:
        adapter: directory or Hub id of a PEFT adapter.
        model: directory or Hub id.

    Raises:
        AdapterError: the adapter cannot be read.
        ConfigError: the model's configuration cannot be read.
    """
    files = read_adapter(resolve_adapter_path(adapter))
    path = resolve_model_path(model, None, CONFIG_FILES)
    return inspect_adapter(files, _module_index(load_meta_model(load_config(path)), path))


def _module_index(model: torch.nn.Module, path: Path) -> ModuleIndex:
    towers = get_towers(model)
    return ModuleIndex(model, towers.part_of if towers is not None else None, get_key_mapping(path))


def _proof(parity: Parity | None) -> str:
    if parity is None:
        return "not compared yet; the decoder check runs when the model is loaded"
    return f"{parity}, compared with transformers {parity.transformers} and PEFT {parity.peft}"


def _examine(args: EngineArgs, path: Path, config: PretrainedConfig, facts: dict[str, Any]) -> None:
    """Fill in facts in the order of loading, up to the first problem.

    Raises:
        ConfigError: the problem, with the same message as when loading fails.
    """
    check_config(config)
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, config, device)
    facts["dtype"] = str(dtype).removeprefix("torch.")
    facts["context_length"] = resolve_max_model_len(None, config)
    max_model_len = resolve_max_model_len(args.max_model_len, config)
    processor = get_processor(config, path, load_tokenizer(args, path))
    blank = process_blank_media(processor, args.mm_processor_kwargs)
    facts["modalities"] = tuple(sorted(processor.modalities)) if processor is not None else ()
    model = load_meta_model(config)
    index = _module_index(model, path)
    facts["parts"] = count_modules(index)
    facts["rank_bytes"] = dtype.itemsize * sum(
        sum(linear_shape(module)) for name, module in index.modules.items() if index.kind_of(name) == "linear"
    )
    weight_bytes = facts["weight_bytes"] = sum(p.numel() * _itemsize(p, dtype) for p in model.parameters())
    block_bytes = KVLayout.from_config(config, args.block_size, dtype).block_bytes
    num_bytes = kv_cache_bytes(args, device, weight_bytes)
    max_model_len = facts["max_model_len"] = fit_max_model_len(args, block_bytes, num_bytes, max_model_len)
    facts["kv_token_bytes"] = block_bytes // args.block_size
    facts["kv_bytes"] = facts["kv_token_bytes"] * -(-max_model_len // args.block_size) * args.block_size
    tensors = read_headers(args.model, args.revision, path)
    facts["stored_bytes"] = count_bytes(tensors)
    check_weights(model, tensors, find_layout(path))
    check_media(blank, processor, get_towers(model), is_meta=True)
    num_kv_blocks(args, block_bytes, num_bytes, max_model_len)


def _itemsize(parameter: torch.Tensor, dtype: torch.dtype) -> int:
    return dtype.itemsize if parameter.is_floating_point() else parameter.itemsize


def _adapters(config: PretrainedConfig, path: Path) -> dict[str, tuple[str, ...]]:
    """Return the adapter directories up to two levels deep, with the modalities that each is the default for."""
    folders = {file.parent for pattern in ("", "*/", "*/*/") for file in path.glob(pattern + CONFIG_FILE)}
    meant: dict[str, list[str]] = {}
    for key, folder in find_default_adapters(config, path).items():
        meant.setdefault(folder, []).append(key)
    folders |= set(map(Path, meant))  # includes adapters whose tensors are in the model's own files
    return {printable(str(folder.relative_to(path))): tuple(meant.get(str(folder), ())) for folder in sorted(folders)}


def _as_given(args: EngineArgs, path: Path, defaults: dict[str, str]) -> dict[str, str]:
    """Return the default adapters by Hub id if the model was given by its Hub id."""
    if Path(args.model).expanduser().is_dir():
        return defaults
    revision = f"@{args.revision}" if args.revision else ""
    folders = {key: Path(folder).relative_to(path).as_posix() for key, folder in defaults.items()}
    return {key: args.model + (f"/{folder}" if folder != "." else "") + revision for key, folder in folders.items()}


def _command(args: EngineArgs, defaults: dict[str, str]) -> str:
    words = ["mmlora", "serve", args.model]
    for name in DOCTOR_OPTIONS:
        if (value := getattr(args, name)) not in (None, "auto"):
            words += [f"--{name.replace('_', '-')}", str(value).removeprefix("torch.")]
    if defaults:
        words += ["--enable-lora", "--default-mm-loras", json.dumps(defaults)]
    return shlex.join(words)
