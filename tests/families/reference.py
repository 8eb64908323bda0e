"""transformers and PEFT as the reference for a family: its own processor, and a full forward per token."""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch.nn.functional import pad
from transformers import PreTrainedModel

from tests.checkpoints import AUDIO_ID, load_reference
from tests.families.spec import FamilySpec
from tests.processors.families import granite_features
from tests.reference import NUM_TOKENS, Media, ReferenceOutput

TEXT_KEYS = ("input_ids", "attention_mask")


class FamilyReference:
    """A checkpoint run by transformers and PEFT, with a full forward for each token.

    Args:
        path: of the checkpoint.
        family: builds the processor, which is not read from the checkpoint's files.
        dtype: of weights, adapters and activations.
    """

    def __init__(self, path: Path, family: FamilySpec, dtype: torch.dtype = torch.float32) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self._processor = family.processor(self.tokenizer) if family.processor is not None else None
        self._family = family
        self._base: PreTrainedModel = load_reference(path, dtype)
        self._models: dict[Path | None, Any] = {None: self._base}

    @torch.inference_mode()
    def generate(
        self, prompt: str, media: Media | None = None, adapter: Path | None = None, max_tokens: int = NUM_TOKENS
    ) -> ReferenceOutput:
        """Continue a prompt greedily by `max_tokens` tokens; end-of-text tokens do not stop it."""
        if adapter not in self._models:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._models[adapter] = PeftModel.from_pretrained(
                    copy.deepcopy(self._base), adapter, autocast_adapter_dtype=False
                ).eval()
        inputs = self._inputs(prompt, media or Media())
        ids = inputs.pop("input_ids")
        prompt_ids = ids[0].tolist()
        kinds = {name: inputs.pop(name) for name in self._family.token_kinds if name in inputs}
        tensors = {
            name: value.to(self._base.dtype) if value.is_floating_point() else value
            for name, value in inputs.items()
            if name not in ("attention_mask", "labels")
        }
        for _ in range(max_tokens):
            logits = self._models[adapter](input_ids=ids, use_cache=False, **tensors, **kinds).logits[0].float()
            ids = torch.cat([ids, logits[-1:].argmax(-1, keepdim=True)], dim=1)
            kinds = {
                name: pad(kinds[name], (0, 1), value=kind)
                for name, kind in self._family.token_kinds.items()
                if name in kinds
            }
        return ReferenceOutput(prompt_ids, ids[0, len(prompt_ids) :].tolist(), logits)

    def _inputs(self, prompt: str, media: Media) -> dict[str, Any]:
        arguments = _arguments(media)
        if arguments and self._processor is not None:
            if self._family.is_single:
                return self._joined(prompt, media)
            return dict(self._processor(text=prompt, return_tensors="pt", **arguments))
        ids, tensors = self.tokenizer(prompt).input_ids, {}
        if media.audios:  # of equal lengths
            features = [granite_features.features(samples) for samples, _ in media.audios]
            count = granite_features.num_embeds(len(media.audios[0][0]))
            ids = [token for known in ids for token in [known] * (count if known == AUDIO_ID else 1)]
            tensors = {
                "input_features": torch.cat(features),
                "input_features_mask": torch.ones(len(features), count, dtype=torch.bool),
            }
        return {"input_ids": torch.tensor([ids]), **tensors}

    def _joined(self, prompt: str, media: Media) -> dict[str, Any]:
        """Process one item at a time, with the text that follows it; all items have equal lengths."""
        mark = self._family.placeholder
        before, *texts = prompt.split(mark)
        texts = [f"{before}{mark}{texts[0]}", *(f"{mark}{text}" for text in texts[1:])]
        pieces = [
            self._processor(text=text, return_tensors="pt", **_arguments(Media(audios=[clip])))
            for text, clip in zip(texts, media.audios, strict=True)
        ]
        return {
            name: torch.cat([piece[name] for piece in pieces], dim=1 if name in TEXT_KEYS else 0) for name in pieces[0]
        }


def _arguments(media: Media) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if media.images:
        arguments["images"] = list(media.images)
    if media.audios:
        arguments["audio"] = [samples for samples, _ in media.audios]
        arguments["sampling_rate"] = media.audios[0][1]
    return arguments
