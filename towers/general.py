"""`GeneralTowers`: any family with `get_image_features` or `get_audio_features` in `transformers`."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from mmlora.processors.base import ProcessedMedia

FEATURES = {"image": "get_image_features", "audio": "get_audio_features"}
TOWERS = {"vision_config": "vision_tower", "audio_config": "audio_tower", "encoder_config": "audio_tower"}


class GeneralTowers:
    """Encode media with a model's own functions, and tell its parts by their configurations.

    Args:
        model: the loaded model.
    """

    def __init__(self, model: Any) -> None:
        inner = getattr(model, "model", model)
        owners = (model, inner)
        self._encoders = {
            modality: getattr(owner, name)
            for modality, name in FEATURES.items()
            for owner in owners[::-1]
            if hasattr(owner, name)
        }
        self.modalities = frozenset(self._encoders)
        self._parts = _parts(model)

    def part_of(self, module_name: str) -> str:
        """See `Towers.part_of`."""
        prefixes = (prefix for prefix in self._parts if f"{module_name}.".startswith(prefix))
        longest = max(prefixes, key=len, default=None)
        return self._parts[longest] if longest is not None else "connector"

    def mode(self, modality: str, modalities: Iterable[str]) -> str:
        """Return the modality: it is encoded alike whatever stands beside it."""
        return modality

    def encode(self, modality: str, mode: str, items: Sequence[ProcessedMedia]) -> list[torch.Tensor]:
        """See `Towers.encode`."""
        parameter = next(self._encoders[modality].__self__.parameters())
        tensors = {}
        for name in items[0].tensors:
            joined = torch.cat([item.tensors[name] for item in items]).to(parameter.device)
            tensors[name] = joined.to(parameter.dtype) if joined.is_floating_point() else joined
        features = self._encoders[modality](**tensors).pooler_output
        return list(torch.split(_flat(features), [item.num_embeds for item in items]))


def _flat(features: Any) -> torch.Tensor:
    """Join what a family returns, a list of items or one tensor, into `[num_embeds, hidden_size]`."""
    parts = features if isinstance(features, list | tuple) else [features]
    return torch.cat([part.flatten(0, -2) for part in parts])


def _parts(model: nn.Module) -> dict[str, str]:
    """Return the part of every module by its prefix: towers have a configuration of their own, decoders `layers`."""
    config: Any = model.config
    kinds = {id(found): part for name, part in TOWERS.items() if (found := getattr(config, name, None)) is not None}
    kinds[id(config.get_text_config())] = "language_model"
    parts: dict[str, str] = {}
    for name, module in model.named_modules():
        part = kinds.get(id(getattr(module, "config", None)))
        if name and part is not None and not any(f"{name}.".startswith(known) for known in parts):
            parts[f"{name}."] = part
    return {**parts, "lm_head.": "language_model"}
