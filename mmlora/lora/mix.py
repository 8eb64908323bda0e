"""`LoRAMix`: weighted sum of several adapters on one request, and the virtual adapter built from it."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TypeVar
from weakref import WeakValueDictionary

import torch

from mmlora.errors import AdapterError, RequestError
from mmlora.lora.adapter import Adapter, AdapterIdentity, AdapterReport, canonical_json
from mmlora.lora.request import LoRARequest
from mmlora.lora.weights import LoRAWeights, ModuleWeights
from mmlora.utils.text import is_finite_number

MAX_MIX_PARTS = 16
K = TypeVar("K")


@dataclass(frozen=True)
class LoRAMix:
    """Weighted sum of several adapters, as with PEFT's `combination_type="cat"`.

    Args:
        parts: `[(request, scale), …]`; a scale of 1 applies the adapter unchanged, a negative scale subtracts it.

    Raises:
        AdapterError: `parts` has the wrong form, or names an adapter twice.
    """

    parts: Sequence[tuple[LoRARequest, float]]

    def __post_init__(self) -> None:
        is_listed = isinstance(self.parts, Sequence) and 1 <= len(self.parts) <= MAX_MIX_PARTS
        if not is_listed or not all(isinstance(part, tuple | list) and len(part) == 2 for part in self.parts):
            is_sequence = isinstance(self.parts, Sequence)
            found = f"; it contains {len(self.parts)}" if is_sequence else f", not a {type(self.parts).__name__}"
            raise AdapterError(f"LoRAMix must contain 1 to {MAX_MIX_PARTS} pairs (LoRARequest, scale){found}")
        for request, scale in self.parts:
            if not isinstance(request, LoRARequest):
                raise AdapterError(f"LoRAMix contains {request!r}; it must be a LoRARequest")
            if not is_finite_number(scale):
                raise AdapterError(f"LoRAMix: the scale of {request.lora_name!r} is {scale!r}; it must be finite")
        names = [request.lora_name for request, _ in self.parts]
        if len(set(names)) != len(names):
            raise AdapterError(f"LoRAMix names an adapter twice: {', '.join(names)}; add up their scales")
        object.__setattr__(self, "parts", tuple((request, float(scale)) for request, scale in self.parts))

    @property
    def lora_name(self) -> str:
        """The parts with their scales, for display, such as `0.7*a+0.3*b`."""
        return "+".join(f"{scale:g}*{request.lora_name}" for request, scale in self.parts)


class MixCache:
    """Virtual adapters of mixes; each is built once and shared for as long as a request uses it. Thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._known: WeakValueDictionary[tuple[tuple[AdapterIdentity, float], ...], Adapter] = WeakValueDictionary()

    def get(self, mix: LoRAMix, adapters: Sequence[Adapter]) -> Adapter:
        """Return the virtual adapter of a mix.

        Args:
            mix: the requested mix.
            adapters: its loaded adapters, in its order.

        Raises:
            RequestError: an adapter has parts that cannot be added up.
        """
        key = tuple((adapter.identity, scale) for adapter, (_, scale) in zip(adapters, mix.parts, strict=True))
        known = self._known.get(key)
        if known is None:
            built = mix_adapters(mix, adapters)  # outside the lock, so that other mixes are not blocked
            with self._lock:
                known = self._known.setdefault(key, built)
        return known


def mix_adapters(mix: LoRAMix, adapters: Sequence[Adapter]) -> Adapter:
    """Concatenate the ranks of adapters, with their scales folded into lora_B.

    Raises:
        RequestError: an adapter has parts that cannot be added up.
    """
    scales = [scale for _, scale in mix.parts]
    for adapter in adapters:
        _check_addable(adapter)
    names = sorted({name for adapter in adapters for name in adapter.modules})
    modules = {}
    for name in names:
        found = [(a.modules[name], scale) for a, scale in zip(adapters, scales, strict=True) if name in a.modules]
        modules[name] = _add_up(found)
    # The digest covers contents only, so that clients see the same digest of a mix in every process.
    contents = [[adapter.digest, scale] for adapter, scale in zip(adapters, scales, strict=True)]
    media = [[a.media_digest, scale] for a, scale in zip(adapters, scales, strict=True) if a.media_digest is not None]
    report = AdapterReport(
        len(modules),
        {part: max(adapter.report.parts.get(part, 0) for adapter in adapters) for part in adapters[0].report.parts},
        max_rank=sum(adapter.report.max_rank for adapter in adapters),
    )
    return Adapter(
        mix.lora_name,
        _digest(contents),
        _digest(media) if media else None,
        None,
        modules,
        report,
        needs_own_pass=any(adapter.needs_own_pass for adapter in adapters),
    )


def _check_addable(adapter: Adapter) -> None:
    for name, weights in adapter.modules.items():
        lora = weights.lora
        if any(found.magnitude is not None for _, found in weights.loras):
            raise RequestError(f"adapter {adapter.name!r} uses DoRA, whose magnitudes cannot be added up in a mix")
        if lora is not None and lora.lora_B.shape[1] != lora.lora_A.shape[0]:
            raise RequestError(f"adapter {adapter.name!r} adapts {name} by groups, which cannot be added up in a mix")
        if weights.parameters or weights.token_rows is not None:
            raise RequestError(
                f"adapter {adapter.name!r} replaces parameters of {name}, which cannot be added up in a mix"
            )
    if adapter.invocation_tokens:
        raise RequestError(f"adapter {adapter.name!r} waits for its invocation tokens and cannot be in a mix")


def _add_up(parts: Sequence[tuple[ModuleWeights, float]]) -> ModuleWeights:
    loras = [(weights.lora, scale) for weights, scale in parts if weights.lora is not None]
    return ModuleWeights(
        _concatenate(loras) if loras else None,
        parameter_loras=_add_up_by_key([(weights.parameter_loras, scale) for weights, scale in parts]),
        expert_loras=_add_up_by_key([(weights.expert_loras, scale) for weights, scale in parts]),
    )


def _add_up_by_key(parts: Sequence[tuple[Mapping[K, LoRAWeights], float]]) -> dict[K, LoRAWeights]:
    found: dict[K, list[tuple[LoRAWeights, float]]] = defaultdict(list)
    for loras, scale in parts:
        for key, lora in loras.items():
            found[key].append((lora, scale))
    return {key: _concatenate(same) for key, same in found.items()}


def _concatenate(parts: Sequence[tuple[LoRAWeights, float]]) -> LoRAWeights:
    """Concatenate the ranks, those of each expert for a parameter of several matrices."""
    num_experts = parts[0][0].num_experts
    factors = [scale * lora.scaling for lora, scale in parts]
    ranks_A = [lora.lora_A.reshape(num_experts, -1, *lora.lora_A.shape[1:]) for lora, _ in parts]
    ranks_B = [lora.lora_B.reshape(len(lora.lora_B), -1, num_experts, *lora.lora_B.shape[2:]) for lora, _ in parts]
    lora_A = torch.cat(ranks_A, dim=1).flatten(0, 1)
    lora_B = torch.cat([ranks * factor for ranks, factor in zip(ranks_B, factors, strict=True)], dim=1).flatten(1, 2)
    if not torch.isfinite(lora_B).all():
        raise RequestError(f"the scales {[scale for _, scale in parts]} are too large for {lora_B.dtype} matrices")
    biases = [factor * lora.bias for (lora, _), factor in zip(parts, factors, strict=True) if lora.bias is not None]
    return LoRAWeights(lora_A, lora_B, 1.0, sum(biases[1:], biases[0]) if biases else None, num_experts=num_experts)


def _digest(content: object) -> str:
    return hashlib.sha256(b"mix" + canonical_json(content)).hexdigest()
