"""Load a PEFT adapter for a model. Loading is strict: every tensor must match a module that accepts it."""

import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import torch

from mmlora.errors import AdapterMismatch
from mmlora.lora.adapter import PARTS, Adapter, AdapterReport, digest_adapter, digest_media_modules
from mmlora.lora.loading.conversions import Target
from mmlora.lora.loading.files import CONFIG_FILE, AdapterFiles
from mmlora.lora.loading.foreign_keys import explain
from mmlora.lora.loading.module_index import ModuleIndex
from mmlora.lora.loading.module_reader import ModuleReader
from mmlora.lora.loading.peft_config import PeftConfig, ignored_keys, selects_parent
from mmlora.lora.loading.tensor_keys import TensorKey, parse_key
from mmlora.lora.weights import ModuleWeights

logger = logging.getLogger(__name__)
LANGUAGE_MODEL = PARTS[0]


def load_adapter(
    files: AdapterFiles,
    name: str,
    index: ModuleIndex,
    *,
    dtype: torch.dtype,
    max_lora_rank: int | None = None,
    strict: bool = True,
    allow_media_parts: bool = True,
) -> Adapter:
    """Build an adapter for a model from its files.

    Args:
        files: configuration and tensors, see `read_adapter`.
        name: for errors and reports.
        index: modules of the model.
        dtype: of the matrices, usually the model's.
        max_lora_rank: largest allowed rank; unlimited by default.
        strict: fail when a tensor matches no module; False logs a warning with the same report.
        allow_media_parts: allow tensors of towers and connectors.

    Raises:
        AdapterMismatch: the adapter does not fit the model or uses an unsupported feature.
    """
    try:
        config = PeftConfig.from_dict(files.config)
        options = index, config, dtype, max_lora_rank, strict, allow_media_parts
        if files.weights_file is not None:
            _read_modules(files.outline, *options)  # a file that does not fit is refused before its values are read
        modules, unmatched, max_rank = _read_modules(files.tensors, *options)
        _check_invocation(modules, index, config)
    except AdapterMismatch as error:
        raise AdapterMismatch(f"adapter {name!r} ({files.origin}): {error}") from None
    if ignored := ignored_keys(files.config):
        logger.warning("adapter %r: ignored unknown keys of %s: %s", name, CONFIG_FILE, listed(ignored))
    if unmatched:
        logger.warning("adapter %r: %d modules matched, ignored %s", name, len(modules), listed(unmatched))
    return _build(files, name, index, config, modules, unmatched, max_rank)


def _read_modules(
    tensors: Mapping[str, torch.Tensor],
    index: ModuleIndex,
    config: PeftConfig,
    dtype: torch.dtype,
    max_lora_rank: int | None,
    strict: bool,
    allow_media_parts: bool,
) -> tuple[dict[str, ModuleWeights], list[str], int]:
    """Return the weights of each module, the keys that match no module, and the largest rank.

    Tensors on the meta device are checked as far as types and shapes allow.
    """
    _check_gathered(tensors)
    keys, targets, unmatched = _match(tensors, index, strict)
    reader = ModuleReader(tensors, targets, index, config, dtype, max_lora_rank)
    modules = {}
    for module in sorted(keys):
        _check_part(module, index.part_of(module), config, allow_media_parts)
        modules[module] = reader.read(module, keys[module])
    _tie_token_rows(modules, index)
    _check_complete(modules, targets, index, config)
    return modules, unmatched, reader.max_rank


def _build(
    files: AdapterFiles,
    name: str,
    index: ModuleIndex,
    config: PeftConfig,
    modules: Mapping[str, ModuleWeights],
    unmatched: list[str],
    max_rank: int,
) -> Adapter:
    part_of = {module: index.part_of(module) for module in modules}
    changed = {module: weights for module, weights in modules.items() if not weights.is_empty}
    return Adapter(
        name,
        digest_adapter(config.digest_content(), files.tensors),
        digest_media_modules({module: modules[module] for module in modules if part_of[module] != LANGUAGE_MODEL}),
        files.path,
        changed,
        AdapterReport(
            len(modules), {part: list(part_of.values()).count(part) for part in PARTS}, tuple(unmatched), max_rank
        ),
        invocation_tokens=config.alora_invocation_tokens,
        needs_own_pass=any(
            part_of[module] == LANGUAGE_MODEL and index.kind_of(module) in ("other", "convolution")
            for module in changed
        ),
    )


def _check_gathered(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors of shape `[0]`, which stand for partitions of ZeRO-3 that were not gathered before saving."""
    empty = [key for key, tensor in tensors.items() if tensor.shape == (0,)]
    if empty:
        raise AdapterMismatch(
            f"{len(empty)} of {len(tensors)} tensors are empty (shape [0]), such as {listed(empty)}. DeepSpeed ZeRO-3 "
            "and FSDP save them so when the partitions are not gathered; save the adapter again with "
            "stage3_gather_16bit_weights_on_model_save or a full state dict, or convert the checkpoint with "
            "zero_to_fp32.py"
        )


def _match(
    tensors: Mapping[str, torch.Tensor], index: ModuleIndex, strict: bool
) -> tuple[dict[str, list[TensorKey]], dict[str, Target], list[str]]:
    """Return the parsed keys by the model's module name, the place of each module, and the keys without a module."""
    found = _find_modules(tensors, index)
    unmatched = sorted(tensors.keys() - found.keys())
    keys: dict[str, list[TensorKey]] = defaultdict(list)
    for key, target in found.values():
        if key.role != "training":
            keys[target.module].append(key)
    if not keys or (strict and unmatched):
        raise AdapterMismatch(_describe(tensors, unmatched, index, is_nothing=not keys))
    return keys, {key.module: target for key, target in found.values()}, unmatched


def _find_modules(keys: Iterable[str], index: ModuleIndex) -> dict[str, tuple[TensorKey, Target]]:
    """Return the parsed keys with the places of their modules; those that match no module are left out."""
    parsed = {key: found for key in keys if (found := parse_key(key)) is not None}
    resolved = index.resolve({found.module for found in parsed.values()})
    return {
        key: (found, resolved[found.module])
        for key, found in parsed.items()
        if found.module in resolved and _has_parameter(found, resolved[found.module], index)
    }


def _describe(tensors: Collection[str], unmatched: list[str], index: ModuleIndex, *, is_nothing: bool) -> str:
    """Return the error for tensors that match no module, with the cause if it is obvious."""
    if not tensors:
        return "nothing matches a module of this model: the file contains no tensors"
    cause = explain(unmatched, lambda keys: _find_modules(keys, index))
    if is_nothing:
        reason = f"nothing matches a module of this model: {len(tensors)} tensors, such as {listed(unmatched)}"
        return f"{reason}; {cause}" if cause else reason
    reason = f"{len(unmatched)} of {len(tensors)} tensors match no module of this model: {listed(unmatched)}"
    return f"{reason}; {cause}" if cause else f"{reason} (strict=False ignores them)"


def _has_parameter(key: TensorKey, target: Target, index: ModuleIndex) -> bool:
    if key.role != "parameter":
        return True
    if target.parameter:
        return key.parameter == "weight"
    return index.parameter(target.module, key.parameter) is not None


def _check_part(module: str, part: str, config: PeftConfig, allow_media_parts: bool) -> None:
    if part == LANGUAGE_MODEL:
        return
    if not allow_media_parts:
        raise AdapterMismatch(
            f"there are tensors for {module} ({part}), but enable_tower_connector_lora=False allows only the "
            "language model"
        )
    if config.alora_invocation_tokens:
        raise AdapterMismatch(f"alora_invocation_tokens: {module} ({part}) has no tokens that could invoke it")


def _tie_token_rows(modules: dict[str, ModuleWeights], index: ModuleIndex) -> None:
    """Copy the embedding's new rows to an output layer that shares its weight, unless that layer has its own."""
    source = modules.get(index.input_embedding or "")
    if not index.is_tied or source is None or source.token_rows is None or index.output_layer is None:
        return
    target = modules.get(index.output_layer, ModuleWeights())
    if target.token_rows is None:
        modules[index.output_layer] = replace(target, token_rows=source.token_rows)


def _check_complete(
    modules: Mapping[str, ModuleWeights], targets: Mapping[str, Target], index: ModuleIndex, config: PeftConfig
) -> None:
    """Refuse a file without the tensors that its configuration lists."""
    for entry in config.modules_to_save:
        saved = [name for name in index.modules if name.endswith(entry)]
        saved += [target.module for name, target in targets.items() if selects_parent(entry, name)]
        owners = [owner for name in saved for owner in index.modules if owner == name or owner.startswith(f"{name}.")]
        missing = [name for name in owners if index.has_parameters(name) and name not in modules]
        if not saved or missing:
            lack = f"there are no tensors for {listed(missing)}" if missing else "this model has no such module"
            raise AdapterMismatch(f"{CONFIG_FILE}: modules_to_save has {entry!r}, but {lack}")
    for entry in config.trainable_token_indices:
        found = [
            name
            for name, weights in modules.items()
            if weights.token_rows is not None and config.names_embedding(entry, name, index.input_embedding)
        ]
        if not found:
            where = entry or "the input embedding"
            raise AdapterMismatch(f"{CONFIG_FILE}: trainable_token_indices names {where}, but has no tensor for it")


def _check_invocation(modules: Mapping[str, ModuleWeights], index: ModuleIndex, config: PeftConfig) -> None:
    """Refuse an activated LoRA with other changes than lora_A and lora_B of Linears, as PEFT does."""
    if not config.alora_invocation_tokens:
        return
    for name, weights in modules.items():
        is_plain = weights.lora is not None and weights.lora.magnitude is None and not weights.parameters
        if index.kind_of(name) != "linear" or not is_plain:
            raise AdapterMismatch(
                f"alora_invocation_tokens: an activated LoRA may change only lora_A and lora_B of a Linear, not {name}"
            )


def listed(names: Iterable[str]) -> str:
    """Join the first ten names in alphabetical order, with the number of the others, for a message."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 10} more" if len(ordered) > 10 else ""
    return ", ".join(ordered[:10]) + more
