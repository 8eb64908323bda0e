"""`GeneralProcessor`: any family whose own `transformers` processor runs without torchvision and torchaudio.

The processor is called for one item at a time, with the placeholder as the text. It returns the tensors of the item and
its tokens in a prompt, including row separators and newlines where the family has them.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from mmlora.errors import ConfigError, MediaError, RequestError
from mmlora.processors.base import MultiModalProcessor, ProcessedMedia, placeholder_id
from mmlora.processors.media.audio import RESAMPLER, AudioItem, resample
from mmlora.processors.media.image import ImageItem
from mmlora.processors.media.items import MediaItem
from mmlora.processors.modalities import IMAGE, MODALITIES
from mmlora.processors.pretrained import load_processor
from mmlora.processors.settings import SETTINGS

TEXT_KEYS: Final = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels")
MAX_REMAINDER_S: Final = 0.1  # the end of a clip, which does not fill a frame
INPUT_ERRORS: Final = (
    *(ValueError, TypeError, RuntimeError, LookupError, ArithmeticError, AttributeError, AssertionError, OSError),
    StrictDataclassError,
)
SIZES: Final = ("size", "pixels", "patches", "crops", "pinpoints")  # parts of the names of options that scale the cost
MAX_FACTOR, MAX_PIXELS = 2, 2**24


class GeneralProcessor(MultiModalProcessor):
    """`MultiModalProcessor` on top of a model's own processor.

    Args:
        config: of the model, with the placeholder ids (`image_token_id` or `image_token_index`).
        model_path: its directory, with the processor's files.
        tokenizer: must have the placeholder tokens.
        load: builds the model's own processor from these three.

    Raises:
        ConfigError: there is no processor, or the tokenizer does not fit the model.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        model_path: str | Path,
        tokenizer: Any,
        *,
        load: Callable[[PretrainedConfig, Path, Any], Any] = load_processor,
    ) -> None:
        self._processor = load(config, Path(model_path), tokenizer)
        self._parts = {
            modality.name: getattr(self._processor, modality.processor_part)
            for modality in MODALITIES.values()
            if getattr(self._processor, modality.processor_part, None) is not None
        }
        modalities = list(self._parts)
        self._embed_ids = {modality: placeholder_id(config, modality) for modality in modalities}
        super().__init__({modality: self.prompt_token_id(modality, tokenizer) for modality in modalities}, tokenizer)
        # Whitespace may be added tokens, too (Gemma has line breaks); it belongs to the text around an item.
        added = {i: str(token).replace("▁", " ") for i, token in tokenizer.added_tokens_decoder.items()}
        self._own_ids = {i for i, text in added.items() if text.strip()} | set(self._embed_ids.values())

    def prompt_token_id(self, modality: str, tokenizer: Any) -> int:
        """Return the placeholder token of prompts; in most families it is the one that embeddings replace."""
        token = getattr(self._processor, f"{modality}_token", None)
        if token is None:
            return self._embed_ids[modality]
        token_id = tokenizer.convert_tokens_to_ids(str(token))
        if token_id in (None, tokenizer.unk_token_id):
            raise ConfigError(f"the processor has {modality}_token={str(token)!r}, which the tokenizer lacks")
        return int(token_id)

    @property
    def settings(self) -> Mapping[str, Any]:
        """See `MultiModalProcessor.settings`: those of the processor and its parts, under the names of `SETTINGS`."""
        owners = (self._processor, *self._parts.values())
        values = ((name, getattr(owner, name, None)) for name in SETTINGS for owner in owners)
        return {name: value for name, value in values if value is not None}

    def process(self, item: MediaItem, options: Mapping[str, Any] | None = None) -> ProcessedMedia:
        """See `MultiModalProcessor.process`; only images have options, those of the model's image processor."""
        modality, chosen = item.modality, self._checked_options(item.modality, options or {})
        try:
            output = self.compute_inputs(item, chosen)
        except INPUT_ERRORS as error:
            kind = RequestError if chosen else MediaError
            raise kind(f"the {modality} cannot be processed: {error}") from error
        all_ids = output["input_ids"][0].tolist()
        own = [i for i, token in enumerate(all_ids) if token in self._own_ids]
        start, end = (own[0], own[-1] + 1) if own else (0, 0)
        token_ids = all_ids[start:end]
        embed_positions = tuple(i for i, token in enumerate(token_ids) if token == self._embed_ids[modality])
        if not embed_positions:
            raise MediaError(f"the {modality} is too small or too short for a single embedding")
        tensors = {name: value for name, value in output.items() if name not in TEXT_KEYS and torch.is_tensor(value)}
        if isinstance(item, AudioItem) and "input_features" in tensors:
            self._check_complete(item, tensors["input_features"])
        settings = json.dumps({"options": chosen, "resampler": RESAMPLER}, sort_keys=True, default=str)
        digest = hashlib.sha256(f"{item.content_hash}\n{settings}".encode()).hexdigest()
        return ProcessedMedia(
            modality,
            digest,
            tensors,
            len(token_ids),
            tuple(token_ids),
            embed_positions,
            text_before=self.detokenize(all_ids[:start]),
            text_after=self.detokenize(all_ids[end:]),
        )

    def compute_inputs(self, item: MediaItem, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return an item's tensors under the argument names of the model's forward, and `input_ids [1, num_tokens]`."""
        output: Mapping[str, Any] = self._processor(
            text=self.placeholder_token(item.modality),
            **self._media_arguments(item),
            **options,
            add_special_tokens=False,
            return_tensors="pt",
        )
        return output

    def _media_arguments(self, item: MediaItem) -> dict[str, Any]:
        if isinstance(item, ImageItem):
            return {"images": [item.image]}
        assert isinstance(item, AudioItem)
        rate = self._parts[item.modality].sampling_rate
        return {"audio": [resample(item, rate)], "sampling_rate": rate}

    def _check_complete(self, item: AudioItem, features: torch.Tensor) -> None:
        """Refuse a clip whose end transformers' extractor has cut off; the order of the dimensions varies."""
        extractor = self._parts[item.modality]
        covered_s = features.numel() / extractor.feature_size * extractor.hop_length / extractor.sampling_rate
        if item.duration_s > covered_s + MAX_REMAINDER_S:
            raise MediaError(f"audio is {item.duration_s:.1f} s long; this model accepts at most {covered_s:.0f} s")

    def _checked_options(self, modality: str, options: Mapping[str, Any]) -> dict[str, Any]:
        kwargs = getattr(self._parts.get(IMAGE.name), "valid_kwargs", None)
        allowed = sorted(getattr(kwargs, "__annotations__", {}))
        unknown = sorted(str(name) for name in options if name not in allowed)
        if unknown:
            takes = ", ".join(allowed) or "none"
            raise RequestError(f"unknown processor option {', '.join(unknown)}: allowed are {takes}")
        if modality != IMAGE.name:
            return {}
        for name, value in options.items():
            self._check_size(name, value)
        return dict(options)

    def _check_size(self, name: str, value: Any) -> None:
        """Refuse an option that costs far more than the checkpoint's own settings."""
        if not any(part in name for part in SIZES):
            return
        own = list(_numbers(getattr(self._parts[IMAGE.name], name, None)))
        limit = MAX_FACTOR * max(own) if own else MAX_PIXELS
        for number in _numbers(value):
            if not number <= limit:
                raise RequestError(f"{name} contains {number}: numbers up to {limit} are allowed")


def _numbers(value: Any) -> Iterator[float]:
    """Yield the numbers in an option's value, which may be nested."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, str):
        return
    elif isinstance(value, Mapping) or hasattr(value, "keys"):
        for key in value.keys():  # noqa: SIM118  SizeDict is not iterable
            yield from _numbers(value[key])
    elif isinstance(value, Iterable):
        for entry in value:
            yield from _numbers(entry)
