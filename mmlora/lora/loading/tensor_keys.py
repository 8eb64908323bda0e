"""Keys of the tensors in a PEFT file, parsed into the name of a module and the role of the tensor in it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from mmlora.errors import AdapterMismatch

PEFT_PREFIX: Final = "base_model.model."
_BASE: Final = ".base_layer"
_ROLES: Final = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_B.bias": "lora_bias",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "token_adapter.trainable_tokens_delta": "token_rows",
    "trainable_tokens_delta": "token_rows",
}
_ORIGINS: Final = {"modules_to_save": 1, "base_layer": 2, "original_module": 2}
_LORA = re.compile(rf"(?P<module>.+?)\.(?P<role>{'|'.join(map(re.escape, _ROLES))})")
# The name that PEFT gives to the only adapter of a model is in the keys of a state_dict(), which PEFT reads, too.
_DEFAULT_NAME = re.compile(r"(?<=\.)(lora_(?:embedding_)?[AB]|lora_magnitude_vector)\.default(?=\.|$)")
# Training state that inference never reads: VeLoRA's projections, MonteCLoRA's sampler.
_TRAINING = re.compile(r"(?P<module>.+)\.lora_(velora_embed|monteclora_sampler\..+)")


@dataclass(frozen=True)
class TensorKey:
    """Parsed key of one tensor in a PEFT file.

    Attributes:
        key: the key in the file.
        module: the module's name in the file, without PEFT's prefix and wrappers.
        role: lora_A, lora_B, lora_bias, magnitude, token_rows, parameter, or training (never read).
        parameter: name of the parameter in the module, for the role `parameter`.
        depth: number of outer PEFT wrappers; PEFT nests one wrapper per low-rank parameter of a module.
        origin: where a parameter was saved from. PEFT may write it several times; the lowest origin is used.
    """

    key: str
    module: str
    role: str
    parameter: str = ""
    depth: int = 0
    origin: int = 0

    @property
    def is_from_base(self) -> bool:
        """Whether it is a parameter of the base model that PEFT saved with the adapter."""
        return self.origin == _ORIGINS["original_module"]


def parse_key(key: str) -> TensorKey | None:
    """Parse a key; return None when it names no parameter of a module."""
    name = _DEFAULT_NAME.sub(r"\1", key.removeprefix(PEFT_PREFIX))
    if match := _TRAINING.fullmatch(name):
        return TensorKey(key, match["module"], "training")
    if match := _LORA.fullmatch(name):
        module = match["module"]
        depth = module.count(_BASE)
        return TensorKey(key, module.replace(_BASE, ""), _ROLES[match["role"]], depth=depth)
    module, _, parameter = name.rpartition(".")
    if not module or "lora_" in parameter or ".lora_" in module:
        return None
    last = module.rpartition(".")[2]
    plain = module.removesuffix(f".{last}") if last in _ORIGINS else module
    return TensorKey(key, plain.replace(_BASE, ""), "parameter", parameter, origin=_ORIGINS.get(last, 0))


def group_keys(keys: Sequence[TensorKey]) -> tuple[dict[int, dict[str, TensorKey]], dict[str, TensorKey]]:
    """Return the low-rank keys of a module by depth and role, and the keys of its parameters by parameter name.

    Raises:
        AdapterMismatch: two tensors have the same purpose.
    """
    by_depth: dict[int, dict[str, TensorKey]] = {}
    parameters: dict[str, TensorKey] = {}
    for key in sorted(keys, key=lambda key: key.origin):
        known = parameters if key.role == "parameter" else by_depth.setdefault(key.depth, {})
        first = known.setdefault(key.parameter if key.role == "parameter" else key.role, key)
        if first is not key and first.origin == key.origin:
            raise AdapterMismatch(f"tensors {first.key} and {key.key} name the same matrix")
    return by_depth, parameters
