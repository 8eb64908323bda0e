"""Load a PEFT adapter for a model, strictly: every tensor lands on a Linear of the right shape, or loading fails."""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from mmlora.errors import AdapterMismatch
from mmlora.lora.adapter import PARTS, Adapter, AdapterReport, LoRAWeights
from mmlora.lora.files import CONFIG_FILE, AdapterFiles
from mmlora.lora.module_index import ModuleIndex
from mmlora.lora.peft_config import PeftConfig

logger = logging.getLogger(__name__)

_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_UNSUPPORTED = re.compile(r"(?P<module>.+)\.(?P<kind>lora_embedding_[AB]|lora_magnitude_vector.*|lora_[AB]\.bias)")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass
class _Pair:
    """The two tensors of one module: its name in the file, and their keys by side, A or B."""

    name: str
    keys: dict[str, str] = field(default_factory=dict)

    def other(self) -> str:
        return "B" if "A" in self.keys else "A"


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
    """Build an adapter for a model from what its files hold.

    Args:
        files: configuration and tensors, see `read_adapter`.
        name: for messages and reports.
        index: modules of the model that it is for.
        dtype: of the matrices, usually the model's.
        max_lora_rank: largest admitted rank; any without it.
        strict: fail when a tensor lands nowhere; False logs a warning with the same report.
        allow_media_parts: admit tensors on towers and connectors.

    Raises:
        AdapterMismatch: the adapter does not fit the model or uses something that is not supported.
    """
    try:
        config, tensors = PeftConfig.from_dict(files.config), files.tensors
        names, unmatched = _match(tensors, index, config, strict)
        modules = {}
        for module, pair in names.items():
            weights = _module_weights(tensors, pair, module, index, config)
            _admit(weights, module, index.part_of(module), max_lora_rank, allow_media_parts)
            modules[module] = _cast(weights, module, dtype)
    except AdapterMismatch as error:
        raise AdapterMismatch(f"adapter {name!r} ({files.origin}): {error}") from None
    if unmatched:
        logger.warning("adapter %r: %d modules matched, ignored %s", name, len(modules), _listed(unmatched))
    media = {module: weights for module, weights in modules.items() if index.part_of(module) != PARTS[0]}
    parts = {part: sum(index.part_of(module) == part for module in modules) for part in PARTS}
    report = AdapterReport(len(modules), parts, tuple(unmatched))
    return Adapter(name, _digest(config, tensors), _media_digest(media), files.path, modules, report)


def _group(tensors: Iterable[str]) -> tuple[dict[str, _Pair], list[str]]:
    """Sort keys into pairs by the module name in the file, and keys that are no LoRA matrices."""
    pairs: dict[str, _Pair] = {}
    stray = []
    for key in tensors:
        name = key.removeprefix("base_model.model.")
        if match := _UNSUPPORTED.fullmatch(name):
            raise AdapterMismatch(f"tensor {key}: {match['kind']} on {match['module']} is not supported")
        if match := _KEY.fullmatch(name):
            pair = pairs.setdefault(match["module"], _Pair(match["module"]))
            if match["side"] in pair.keys:
                raise AdapterMismatch(f"tensors {pair.keys[match['side']]} and {key} name the same matrix")
            pair.keys[match["side"]] = key
        else:
            stray.append(key)
    return pairs, stray


def _match(
    tensors: Mapping[str, torch.Tensor], index: ModuleIndex, config: PeftConfig, strict: bool
) -> tuple[dict[str, _Pair], list[str]]:
    """Return the tensors of each module of the model, sorted by its name, and the keys that match none."""
    pairs, stray = _group(tensors)
    resolved = index.resolve(list(pairs))
    unmatched = sorted(stray + [key for name in pairs.keys() - resolved.keys() for key in pairs[name].keys.values()])
    if not resolved:
        found = f"{len(tensors)} tensors, such as {_listed(unmatched)}" if tensors else "the file holds no tensors"
        raise AdapterMismatch(f"nothing matches a module of this model: {found}")
    if strict and unmatched:
        raise AdapterMismatch(
            f"{len(unmatched)} of {len(tensors)} tensors match no module of this model: {_listed(unmatched)} "
            "(strict=False ignores them)"
        )
    for name, module in resolved.items():
        if module not in index.linears:
            key = next(iter(pairs[name].keys.values()))
            raise AdapterMismatch(f"tensor {key}: {module} is a {index.others[module]}; only Linear can be adapted")
    excluded = [name for name, module in resolved.items() if not _is_selected(config, name, module)]
    if excluded:
        raise AdapterMismatch(
            f"{CONFIG_FILE} does not select {_listed(excluded)}, yet there are tensors for it "
            "(target_modules, exclude_modules, layers_to_transform, layers_pattern)"
        )
    if len(set(resolved.values())) != len(resolved):
        raise AdapterMismatch(f"several sets of tensors land on one module: {_listed(resolved)}")
    return {module: pairs[name] for name, module in sorted(resolved.items(), key=lambda item: item[1])}, unmatched


def _is_selected(config: PeftConfig, name: str, module: str) -> bool:
    """Tell whether the configuration selects a module, under its name in the file or in the model.

    A regular expression may also name it as the decoder does, without `model.`: Phi-4-multimodal's adapters were made
    by a model that wraps its decoder alone, but saved under the names of the whole.
    """
    if config.selects(name) or config.selects(module):
        return True
    is_pattern = isinstance(config.target_modules, str) and not config.exclude_modules
    return is_pattern and config.selects(module.removeprefix("model."))


def _admit(weights: LoRAWeights, module: str, part: str, max_lora_rank: int | None, allow_media_parts: bool) -> None:
    if not allow_media_parts and part != PARTS[0]:
        raise AdapterMismatch(
            f"there are tensors for {module} ({part}), but enable_tower_connector_lora=False admits only the "
            "language model"
        )
    if max_lora_rank is not None and weights.rank > max_lora_rank:
        raise AdapterMismatch(f"rank {weights.rank} of {module} exceeds max_lora_rank={max_lora_rank}")


def _module_weights(
    tensors: Mapping[str, torch.Tensor],
    pair: _Pair,
    module: str,
    index: ModuleIndex,
    config: PeftConfig,
) -> LoRAWeights:
    if len(pair.keys) != 2:
        key = next(iter(pair.keys.values()))
        raise AdapterMismatch(f"tensor {key} has no partner lora_{pair.other()} for {module}")
    lora_A, lora_B = tensors[pair.keys["A"]], tensors[pair.keys["B"]]
    for side, weight in (("A", lora_A), ("B", lora_B)):
        if weight.ndim != 2 or weight.dtype not in _DTYPES:
            raise AdapterMismatch(
                f"tensor {pair.keys[side]} on {module} is {list(weight.shape)} {weight.dtype}; it must be a matrix of "
                "a floating-point type of 16 to 64 bits"
            )
    rank = config.rank_of(pair.name, module)
    in_features, out_features = index.linears[module]
    if lora_A.shape[1] != in_features or lora_B.shape[0] != out_features:
        raise AdapterMismatch(
            f"it was made for another model: {module} is Linear({in_features}, {out_features}), "
            f"but lora_A is {list(lora_A.shape)} and lora_B is {list(lora_B.shape)}"
        )
    if lora_A.shape[0] != rank or lora_B.shape[1] != rank:
        raise AdapterMismatch(
            f"{CONFIG_FILE} says rank {rank} for {module}, "
            f"but lora_A is {list(lora_A.shape)} and lora_B is {list(lora_B.shape)}"
        )
    return LoRAWeights(lora_A, lora_B, config.scaling_of(pair.name, module))


def _cast(weights: LoRAWeights, module: str, dtype: torch.dtype) -> LoRAWeights:
    cast = {}
    for side, weight in (("A", weights.lora_A), ("B", weights.lora_B)):
        cast[side] = weight.to(dtype).contiguous()
        if not torch.isfinite(cast[side]).all():
            cause = f"overflows {dtype}" if torch.isfinite(weight).all() else "holds NaN or infinity"
            raise AdapterMismatch(f"lora_{side} of {module} {cause}; every value must be finite")
    return LoRAWeights(cast["A"], cast["B"], weights.scaling)


def _digest(config: PeftConfig, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(_canonical(config.digest_content()))
    for key in sorted(tensors):
        _update(digest, key, tensors[key])
    return digest.hexdigest()


def _media_digest(modules: Mapping[str, LoRAWeights]) -> str | None:
    if not modules:
        return None
    digest = hashlib.sha256(b"tower and connector")
    for module, weights in sorted(modules.items()):
        digest.update(_canonical([module, weights.scaling]))
        _update(digest, "A", weights.lora_A)
        _update(digest, "B", weights.lora_B)
    return digest.hexdigest()


def _update(digest: "hashlib._Hash", key: str, tensor: torch.Tensor) -> None:
    digest.update(_canonical([key, str(tensor.dtype), list(tensor.shape)]))
    if tensor.numel():
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _canonical(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _listed(names: Iterable[str], limit: int = 10) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more
