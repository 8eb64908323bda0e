"""The independent reference: transformers and PEFT with greedy decoding, one request at a time, without padding.

Audio features come from transformers. Picture tensors come from `mmlora.processors.families.phi4_images`, since
transformers' class needs torchvision; tests/processors compares the two.
"""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import pad
from transformers import AutoTokenizer, Phi4MultimodalFeatureExtractor

from mmlora.processors.families.phi4_images import ImageSettings, process_image
from tests.checkpoints import AUDIO_ID, IMAGE_ID, load_reference

NUM_TOKENS = 8
Audio = tuple[np.ndarray, int]


@dataclass(frozen=True)
class ReferenceOutput:
    """A prompt and its greedy continuation, with their logits."""

    prompt_ids: list[int]
    token_ids: list[int]
    logits: torch.Tensor  # [len(prompt_ids) + len(token_ids) - 1, vocab_size]: row i predicts token i + 1


@dataclass(frozen=True)
class Media:
    """The media of one prompt, in the order of its placeholders. All clips of a prompt have the same length."""

    audios: Sequence[Audio] = field(default=())
    images: Sequence[Image.Image] = field(default=())

    @property
    def as_prompt_data(self) -> dict[str, Any]:
        """The media in the form of `multi_modal_data`."""
        found = {"audio": list(self.audios), "image": list(self.images)}
        return {modality: items for modality, items in found.items() if items}


class Reference:
    """A checkpoint run by transformers and PEFT in one precision; adapters are loaded on first use.

    Args:
        path: of the model.
        dtype: of weights and activations, including adapters.
        is_adapter_upcast: keep adapters in float32, which is PEFT's default.
    """

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32, *, is_adapter_upcast: bool = False) -> None:
        self.path = path
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self._base = load_reference(path, dtype)
        self._is_adapter_upcast = is_adapter_upcast
        self._models: dict[Path, PeftModel] = {}

    @torch.inference_mode()
    def generate(
        self, prompt: str, media: Media | None = None, adapter: Path | None = None, max_tokens: int = NUM_TOKENS
    ) -> ReferenceOutput:
        """Continue a prompt greedily by `max_tokens` tokens; end-of-text tokens do not stop it."""
        model = self._base if adapter is None else self._with_adapter(adapter)
        tensors, counts = self._tensors(media or Media())
        prompt_ids = _expand(self.tokenizer(prompt).input_ids, counts)
        output = model(input_ids=torch.tensor([prompt_ids]), use_cache=True, **tensors)
        rows, tokens = [output.logits[0].float()], [int(output.logits[0, -1].float().argmax())]
        while len(tokens) < max_tokens:
            output = model(
                input_ids=torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True
            )
            rows.append(output.logits[0].float())
            tokens.append(int(rows[-1][-1].argmax()))
        return ReferenceOutput(prompt_ids, tokens, torch.cat(rows))

    @torch.inference_mode()
    def logits(self, token_ids: list[int], media: Media | None = None, adapter: Path | None = None) -> torch.Tensor:
        """Return float32 logits `[num_tokens, vocab_size]` of tokens, placeholders already expanded."""
        model = self._base if adapter is None else self._with_adapter(adapter)
        tensors, _ = self._tensors(media or Media())
        return model(input_ids=torch.tensor([token_ids]), use_cache=False, **tensors).logits[0].float()

    def _with_adapter(self, path: Path) -> PeftModel:
        if path not in self._models:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = PeftModel.from_pretrained(
                    copy.deepcopy(self._base), path, autocast_adapter_dtype=self._is_adapter_upcast
                ).eval()
            _check_loaded(model, path)
            self._models[path] = model
        return self._models[path]

    def _tensors(self, media: Media) -> tuple[dict[str, torch.Tensor], dict[int, list[int]]]:
        """Return arguments of `forward`, and the number of placeholders of each item by placeholder id."""
        tensors: dict[str, torch.Tensor] = {}
        counts: dict[int, list[int]] = {AUDIO_ID: [], IMAGE_ID: []}
        if media.audios:
            extractor = Phi4MultimodalFeatureExtractor(
                audio_compression_rate=self._base.config.audio_config.time_reduction
            )
            found = [extractor(samples, sampling_rate=rate, return_tensors="pt") for samples, rate in media.audios]
            for name in ("audio_input_features", "audio_embed_sizes"):
                tensors[name] = torch.cat([features[name] for features in found])
            counts[AUDIO_ID] = tensors["audio_embed_sizes"].tolist()
        if media.images:
            vision = self._base.config.vision_config
            settings = ImageSettings(vision.crop_size, vision.patch_size, dynamic_hd=4)
            pictures = [process_image(image, settings) for image in media.images]
            num_crops = max(len(found["image_pixel_values"]) for found, _ in pictures)
            for name in ("image_pixel_values", "image_attention_mask", "image_sizes"):
                items = [found[name] for found, _ in pictures]
                if name != "image_sizes":  # padding crops are not read
                    items = [pad(x, (0, 0) * (x.ndim - 1) + (0, num_crops - len(x)), value=1) for x in items]
                tensors[name] = torch.stack(items)
            counts[IMAGE_ID] = [count for _, count in pictures]
        return tensors, counts


def _expand(token_ids: list[int], counts: dict[int, list[int]]) -> list[int]:
    waiting = {token: iter(found) for token, found in counts.items()}
    return [token for token in token_ids for _ in range(next(waiting[token]) if token in waiting else 1)]


def _check_loaded(model: PeftModel, path: Path) -> None:
    """Check that all tensors of an adapter were loaded: PEFT only warns about keys that match nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = get_peft_model_state_dict(model)
    tensors = load_file(path / "adapter_model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name].float(), tensors[name].float()) for name in tensors)
