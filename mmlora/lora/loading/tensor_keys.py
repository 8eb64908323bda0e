"""What the keys of a PEFT file say: which module a tensor belongs to, and which part it plays there."""

import re
from dataclasses import dataclass
from typing import Final

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
# State of training that inference never reads: VeLoRA's projections, MonteCLoRA's sampler.
_TRAINING = re.compile(r"(?P<module>.+)\.lora_(velora_embed|monteclora_sampler\..+)")


@dataclass(frozen=True)
class TensorKey:
    """One key of a file.

    Attributes:
        key: as it stands in the file.
        module: the module's name in the file, without what PEFT puts around it.
        role: lora_A, lora_B, lora_bias, magnitude, token_rows, parameter, or training (never read).
        parameter: for the role `parameter`, its name in the module.
        depth: wrappers of PEFT around the tensor's own: several low-rank parameters of one module are nested.
        origin: where a parameter was saved from. PEFT may write one several times; the lowest counts.
    """

    key: str
    module: str
    role: str
    parameter: str = ""
    depth: int = 0
    origin: int = 0

    @property
    def is_from_base(self) -> bool:
        """Whether it is a parameter of the base model that PEFT saved along."""
        return self.origin == _ORIGINS["original_module"]


def parse_key(key: str) -> TensorKey | None:
    """Read a key; None for one that names no parameter of any module."""
    name = key.removeprefix(PEFT_PREFIX)
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
