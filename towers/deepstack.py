"""Families whose towers feed features to deeper layers of the decoder, too (deepstack).

Source: https://arxiv.org/abs/2406.04334.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from mmlora.towers.general import GeneralTowers, flat


class DeepstackTowers(GeneralTowers):
    """Keep the features of deeper layers beside those of the first, and hand them to the decoder.

    Args:
        model: the loaded model.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._decoder_arguments: dict[str, Any] = {}
        # The outer forward computes these arguments from pictures; it is called with embeddings.
        model.model.language_model.register_forward_pre_hook(self._add_arguments, with_kwargs=True)

    @abstractmethod
    def decoder_arguments(self, mask: torch.Tensor, features: torch.Tensor) -> dict[str, Any]:
        """Return what the decoder takes beside embeddings, for `mask` and `features` as of `deepstack`."""

    @contextmanager
    def deepstack(self, mask: torch.Tensor, features: torch.Tensor) -> Iterator[None]:
        """See `Towers.deepstack`."""
        self._decoder_arguments = self.decoder_arguments(mask, features)
        try:
            yield
        finally:
            self._decoder_arguments = {}

    def _add_arguments(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, **self._decoder_arguments}


class Qwen3VLTowers(DeepstackTowers):
    """Features that are added after each of the first layers."""

    def features(self, modality: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `GeneralTowers.features`."""
        output = self.encoder_output(modality, tensors)
        return torch.cat([flat(output.pooler_output), *map(flat, output.deepstack_features)], dim=-1)

    def decoder_arguments(self, mask: torch.Tensor, features: torch.Tensor) -> dict[str, Any]:
        """See `DeepstackTowers.decoder_arguments`."""
        hidden_size = self.model.config.get_text_config().hidden_size
        return {
            "visual_pos_masks": mask[None],
            "deepstack_visual_embeds": list(torch.split(features, hidden_size, dim=-1)),
        }


class Granite4VisionTowers(DeepstackTowers):
    """Features that are added before certain layers; at the first, placeholders are zeros."""

    def features(self, modality: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `GeneralTowers.features`."""
        found = [flat(features) for _, features in self.encoder_output(modality, tensors).deepstack_features]
        return torch.cat([torch.zeros_like(found[0]), *found], dim=-1)

    def decoder_arguments(self, mask: torch.Tensor, features: torch.Tensor) -> dict[str, Any]:
        """See `DeepstackTowers.decoder_arguments`."""
        config = self.model.config
        parts = torch.split(features, config.get_text_config().hidden_size, dim=-1)
        layers = [layer for _, layer in config.deepstack_layer_map]
        layers += config.spatial_target_layers
        return {"vision_mask": mask[None, :, None], "deepstack_features": dict(zip(layers, parts, strict=True))}
