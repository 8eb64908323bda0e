"""Settings of a processor that follow from the model's configuration, where a checkpoint's files lack them.

LLaVA checkpoints older than transformers 4.45, for example, have no `patch_size` in their processor's files.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

import torch
from transformers import AutoModel, PretrainedConfig

from mmlora.utils.library_errors import LIBRARY_ERRORS


def find_settings(names: Collection[str], config: PretrainedConfig, tokenizer: Any) -> dict[str, Any]:
    """Return the settings that a model's configuration determines.

    Args:
        names: of the settings to find; others than those of `SETTINGS` are not found.
        config: of the model.
        tokenizer: of the model.
    """
    found = {name: SETTINGS[name](config, tokenizer) for name in names if name in SETTINGS}
    return {name: value for name, value in found.items() if value is not None}


def _of_model(*names: str) -> Callable[[Any, Any], Any]:
    """Return a function that looks names up in the configuration."""
    return lambda config, tokenizer: _first(config, names)


def _of_vision(*names: str) -> Callable[[Any, Any], Any]:
    """Return a function that looks names up in the vision tower's configuration."""
    return lambda config, tokenizer: _first(getattr(config, "vision_config", None), names)


def _first(config: Any, names: Collection[str]) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _token(modality: str) -> Callable[[Any, Any], str | None]:
    """Return a function that returns the text of the token that embeddings of a modality replace."""

    def find(config: Any, tokenizer: Any) -> str | None:
        token_id = _first(config, (f"{modality}_token_id", f"{modality}_token_index"))
        text = tokenizer.convert_ids_to_tokens(token_id) if isinstance(token_id, int) else None
        return text if isinstance(text, str) else None

    return find


def _num_patches(config: Any) -> int | None:
    vision = getattr(config, "vision_config", None)
    size, patch_size = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    return (size // patch_size) ** 2 if isinstance(size, int) and isinstance(patch_size, int) else None


def _num_embeds(config: Any, tokenizer: Any) -> int | None:
    """Return the number of embeddings of one image, or of one of its crops."""
    fixed = _first(config, ("mm_tokens_per_image", "vision_soft_tokens_per_image", "image_seq_length"))
    return fixed if fixed is not None else _num_patches(config)


def _num_shuffled(config: Any, tokenizer: Any) -> int | None:
    """Return the number of embeddings of a crop whose patches are joined in squares of `scale_factor`."""
    patches, factor = _num_patches(config), getattr(config, "scale_factor", None)
    return patches // factor**2 if patches is not None and isinstance(factor, int) else None


def _num_additional_tokens(config: Any, tokenizer: Any) -> int | None:
    """Return the number of positions of the vision tower that are not patches, like CLIP's class token."""
    patches = _num_patches(config)
    if patches is None:
        return None
    try:
        with torch.device("meta"):
            tower: Any = AutoModel.from_config(config.vision_config)  # type: ignore[no-untyped-call]
    except LIBRARY_ERRORS:
        return None
    tables = [table for name, table in tower.named_parameters() if "position_embedding" in name]
    return max(tables[0].numel() // config.vision_config.hidden_size - patches, 0) if tables else 0


SETTINGS: Final[Mapping[str, Callable[[Any, Any], Any]]] = {
    "patch_size": _of_vision("patch_size"),
    "merge_size": _of_vision("spatial_merge_size"),
    "temporal_patch_size": _of_vision("temporal_patch_size"),
    "vision_feature_select_strategy": _of_model("vision_feature_select_strategy"),
    "num_additional_image_tokens": _num_additional_tokens,
    "image_seq_length": _num_embeds,
    "image_seq_len": _num_shuffled,
    "audio_seq_length": _of_model("audio_soft_tokens_per_image"),
    "image_grid_pinpoints": _of_model("image_grid_pinpoints"),
    "downsample_rate": _of_model("downsample_rate"),
    "image_token": _token("image"),
    "audio_token": _token("audio"),
}
"""Names that the processors of `transformers` use, with functions of the model's configuration and its tokenizer."""
