"""`GeneralTowers`: any family with `get_image_features` or `get_audio_features` in `transformers`."""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from mmlora.processors.base import ProcessedMedia
from mmlora.towers.base import BidirectionalSpan, PromptLayout, Towers
from mmlora.towers.deepstack import added_features, deep_layers

FEATURES = {"image": "get_image_features", "audio": "get_audio_features"}
CONNECTOR = re.compile(r"merger|projector")  # where a family has it inside a tower
TOWER_CONFIGS = {"vision_config": "vision_tower", "audio_config": "audio_tower", "encoder_config": "audio_tower"}


class GeneralTowers:
    """Encode media with a model's own functions, and tell its parts by their configurations.

    Args:
        model: the loaded model.
        bidirectional: which tokens attend to each other: those of each `picture`, or of a whole `prompt` with media;
            None for causal attention everywhere.
        first_position: of every prompt, where the model has no `get_rope_index`.
    """

    modalities: frozenset[str]

    def __init__(self, model: Any, *, bidirectional: str | None = None, first_position: int = 0) -> None:
        self.model = model
        inner = getattr(model, "model", model)
        self._encoders = {
            modality: getattr(owner, name)
            for modality, name in FEATURES.items()
            for owner in (inner, model)
            if hasattr(owner, name)
        }
        self.modalities = frozenset(self._encoders)
        self._rope_index = getattr(inner, "get_rope_index", getattr(model, "get_rope_index", None))
        self.num_position_rows = 3 if self._rope_index is not None else 1
        self._bidirectional, self._first_position = bidirectional, first_position
        self._deep_layers: tuple[int, ...] = ()
        self._parts = _parts(model)

    def part_of(self, module_name: str) -> str:
        """See `Towers.part_of`."""
        if CONNECTOR.search(module_name):
            return "connector"
        prefixes = (prefix for prefix in self._parts if f"{module_name}.".startswith(prefix))
        longest = max(prefixes, key=len, default=None)
        return self._parts[longest] if longest is not None else "connector"

    def mode(self, modality: str, modalities: Iterable[str]) -> str:
        """Return the modality: it is encoded alike whatever stands beside it."""
        return modality

    def layout(self, token_ids: Sequence[int], media: Sequence[tuple[int, ProcessedMedia]]) -> PromptLayout:
        """See `Towers.layout`; the positions are the model's own where it has `get_rope_index`."""
        spans = self._bidirectional_spans(len(token_ids), media)
        if self._rope_index is None:
            start, end = self._first_position, self._first_position + len(token_ids)
            return (
                PromptLayout((tuple(range(start, end)),), start, spans)
                if start
                else PromptLayout(bidirectional_spans=spans)
            )
        if not media:
            return PromptLayout(bidirectional_spans=spans)
        positions, _ = self._rope_index(torch.tensor([token_ids]), **self.rope_arguments(token_ids, media))
        shift = int(positions.max()) + 1 - len(token_ids)
        return PromptLayout(tuple(map(tuple, positions[:, 0].tolist())), shift, spans)

    def _bidirectional_spans(
        self, num_tokens: int, media: Sequence[tuple[int, ProcessedMedia]]
    ) -> tuple[BidirectionalSpan, ...]:
        if self._bidirectional is None or not media:
            return ()
        if self._bidirectional == "prompt":
            return (BidirectionalSpan(0, num_tokens, ignores_window=True),)
        return tuple(
            BidirectionalSpan(*run) for run in _runs([start + i for start, item in media for i in places_of(item)])
        )

    def rope_arguments(
        self, token_ids: Sequence[int], media: Sequence[tuple[int, ProcessedMedia]]
    ) -> dict[str, torch.Tensor]:
        """Return what `get_rope_index` takes beside the token ids."""
        kinds = torch.zeros(1, len(token_ids), dtype=torch.int)
        for start, item in media:
            kinds[0, torch.tensor(places_of(item)) + start] = 1
        return {"mm_token_type_ids": kinds, **_joined(media, "image_grid_thw")}

    def encode(self, modality: str, mode: str, items: Sequence[ProcessedMedia]) -> list[torch.Tensor]:
        """See `Towers.encode`."""
        features = self.features(modality, self.joined(items))
        return list(torch.split(features, [item.num_embeds for item in items]))

    def joined(self, items: Sequence[ProcessedMedia]) -> dict[str, torch.Tensor]:
        """Return the tensors of all items as a batch, on the model's device and in its type."""
        tensors = {}
        for name in items[0].tensors:
            joined = torch.cat([item.tensors[name] for item in items]).to(self.model.device)
            tensors[name] = joined.to(self.model.dtype) if joined.is_floating_point() else joined
        return tensors

    def features(self, modality: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the features of all items, one after the other: `[num_embeds, hidden_size]`, or more columns."""
        output = self.encoder_output(modality, tensors)
        deep = {layer: flat(found) for layer, found in deep_layers(output).items()}
        if not deep:
            return flat(output.pooler_output)
        self._deep_layers, rows = tuple(deep), list(deep.values())
        # A model without features at the entry has zeros there.
        first = torch.zeros_like(rows[0]) if output.pooler_output is None else flat(output.pooler_output)
        return torch.cat([first, *rows], dim=-1)

    def encoder_output(self, modality: str, tensors: Mapping[str, torch.Tensor]) -> Any:
        """Return what the model's own function makes of some items."""
        return self._encoders[modality](**tensors)

    def decoder_inputs(self, token_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `Towers.decoder_inputs`."""
        return {"inputs_embeds": embed_tokens(self.model, token_ids)}

    def deepstack(self, mask: torch.Tensor, features: torch.Tensor) -> AbstractContextManager[None]:
        """See `Towers.deepstack`."""
        decoder = self.model.get_decoder()
        rows = features.chunk(len(self._deep_layers), dim=-1)
        return added_features(decoder, mask, dict(zip(self._deep_layers, rows, strict=True)))


def decoder_inputs(model: Any, towers: Towers | None, token_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what a model takes for tokens, as of `Towers.decoder_inputs`; a text-only one has no towers."""
    return {"inputs_embeds": embed_tokens(model, token_ids)} if towers is None else towers.decoder_inputs(token_ids)


def embed_tokens(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    """Return `[1, num_tokens, hidden_size]` for `token_ids [num_tokens]`; ids that the vocabulary lacks count as 0."""
    embedding = model.get_input_embeddings()
    embeds: torch.Tensor = embedding(torch.where(token_ids < embedding.weight.shape[0], token_ids, 0)[None])
    return embeds


def flat(features: Any) -> torch.Tensor:
    """Join what a family returns, a list of items or one tensor, into `[num_embeds, hidden_size]`."""
    parts = features if isinstance(features, list | tuple) else [features]
    return torch.cat([part.flatten(0, -2) for part in parts])


def places_of(item: ProcessedMedia) -> Sequence[int]:
    """Return which of an item's tokens take an embedding."""
    return item.places if item.places is not None else range(item.num_tokens)


def _runs(places: Sequence[int]) -> list[tuple[int, int]]:
    """Join neighbours among ascending places: `[3, 4, 8]` are `[(3, 5), (8, 9)]`."""
    runs: list[tuple[int, int]] = []
    for place in places:
        start = runs.pop()[0] if runs and runs[-1][1] == place else place
        runs.append((start, place + 1))
    return runs


def _joined(media: Sequence[tuple[int, ProcessedMedia]], name: str) -> dict[str, torch.Tensor]:
    found = [item.tensors[name] for _, item in media if name in item.tensors]
    return {name: torch.cat(found)} if found else {}


def _parts(model: nn.Module) -> dict[str, str]:
    """Return the part of every module by its prefix: towers have a configuration of their own, decoders `layers`."""
    config: Any = model.config
    kinds = {
        id(found): part for name, part in TOWER_CONFIGS.items() if (found := getattr(config, name, None)) is not None
    }
    kinds[id(config.get_text_config())] = "language_model"
    parts: dict[str, str] = {}
    for name, module in model.named_modules():
        part = kinds.get(id(getattr(module, "config", None)))
        if name and part is not None and not any(f"{name}.".startswith(known) for known in parts):
            parts[f"{name}."] = part
    return {**parts, "lm_head.": "language_model"}
