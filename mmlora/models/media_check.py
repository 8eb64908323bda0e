"""Check at load that a model's processor and its towers agree on blank media.

A processor whose settings do not fit the model gives more or fewer placeholders than the towers return embeddings.
Without this check, the pictures and clips of all clients would be refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mmlora.errors import ConfigError, RequestError
from mmlora.processors.base import MultiModalProcessor, ProcessedMedia
from mmlora.processors.media.loader import load_media
from mmlora.processors.modalities import MODALITIES
from mmlora.towers.base import EmbeddingCountError, Towers, check_num_embeds
from mmlora.utils.library_errors import LIBRARY_ERRORS
from mmlora.utils.text import shorten


def process_blank_media(
    processor: MultiModalProcessor | None, options: Mapping[str, Any] | None
) -> list[ProcessedMedia]:
    """Compute the tensors of one blank item of each modality; empty for a text-only model.

    Args:
        processor: of the model.
        options: `mm_processor_kwargs` of all requests.

    Raises:
        ConfigError: the processor fails.
    """
    blank = []
    for modality in sorted(processor.modalities) if processor is not None else ():
        assert processor is not None
        try:
            blank.append(processor.process(load_media(MODALITIES[modality].blank()), options))
        except RequestError as error:
            reason = f"the model's processor cannot process blank {modality}: {error}"
            raise ConfigError(f"{reason}{_described(processor)}") from error
    return blank


def check_media(
    blank: Sequence[ProcessedMedia], processor: MultiModalProcessor | None, towers: Towers | None, *, is_meta: bool
) -> list[ProcessedMedia]:
    """Encode blank media, and compare the number of embeddings with that of placeholders.

    Args:
        blank: from `process_blank_media`.
        processor, towers: of the model; None for a text-only model.
        is_meta: the model is on the meta device, where only shapes are computed: in no time, but not for towers that
            depend on values.

    Returns:
        The items that could not be checked on the meta device.

    Raises:
        ConfigError: the numbers differ, or the towers cannot encode what the processor returns.
    """
    unchecked = []
    for item in blank:
        assert processor is not None and towers is not None
        try:
            with torch.inference_mode():
                (embeds,) = towers.encode(item.modality, item.modality, [item])
            check_num_embeds(embeds.shape[0], item.num_embeds)
        except EmbeddingCountError as error:
            raise _misfit(item, processor, error) from error
        except torch.OutOfMemoryError:
            raise
        except LIBRARY_ERRORS as error:
            if not is_meta:
                raise _misfit(item, processor, error) from error
            unchecked.append(item)
    return unchecked


def _misfit(item: ProcessedMedia, processor: MultiModalProcessor, error: Exception) -> ConfigError:
    shapes = ", ".join(f"{name} {[*tensor.shape]}" for name, tensor in item.tensors.items())
    return ConfigError(
        f"the model's processor does not fit its {item.modality} tower: blank {item.modality} has {item.num_embeds} "
        f"placeholders and the tensors {shapes}, but {error}{_described(processor)}"
    )


def _described(processor: MultiModalProcessor) -> str:
    """Return the settings that may be at fault, for a message."""
    settings = ", ".join(f"{name}={shorten(value)}" for name, value in processor.settings.items())
    return f"; settings of the processor: {settings}" if settings else ""
