"""`GeneralTowers`: any family with `get_image_features` or `get_audio_features` in `transformers`."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from mmlora.processors.base import ProcessedMedia
from mmlora.processors.modalities import AUDIO, MODALITIES
from mmlora.towers.base import BidirectionalSpan, PromptLayout, Towers, check_num_embeds

CONNECTOR = re.compile(r"merger|projector")  # of families that have it inside a tower
TOWER_CONFIGS = {m.config_name: m.tower for m in MODALITIES.values()} | {"encoder_config": AUDIO.tower}


class GeneralTowers:
    """Encode media with a model's own functions; find its parts by their configurations.

    Args:
        model: the loaded model.
        bidirectional: which tokens attend to each other: those of each `picture`, or of a whole `prompt` with media;
            None for causal attention everywhere.
        first_position: rotary position of a prompt's first token, for models without `get_rope_index`.
    """

    modalities: frozenset[str] = (
        frozenset()
    )  # set by subclasses for models without functions such as `get_image_features`
    joint_modes: Mapping[str, str] = {}
    has_token_inputs = False

    def __init__(self, model: Any, *, bidirectional: str | None = None, first_position: int = 0) -> None:
        self.model = model
        inner = getattr(model, "model", model)
        self._encoders = {
            modality.name: getattr(owner, modality.features_method)
            for modality in MODALITIES.values()
            for owner in (inner, model)
            if hasattr(owner, modality.features_method)
        }
        self.modalities = self.modalities or frozenset(self._encoders)
        self._rope_index = getattr(inner, "get_rope_index", getattr(model, "get_rope_index", None))
        self.num_position_rows = 3 if self._rope_index is not None else 1
        self._bidirectional, self._first_position = bidirectional, first_position
        self._deep_layers: tuple[int, ...] = ()
        self._parts = _parts_by_prefix(model)

    def part_of(self, module_name: str) -> str:
        """See `Towers.part_of`."""
        if CONNECTOR.search(module_name):
            return "connector"
        prefixes = (prefix for prefix in self._parts if f"{module_name}.".startswith(prefix))
        longest = max(prefixes, key=len, default=None)
        return self._parts[longest] if longest is not None else "connector"

    def layout(self, token_ids: Sequence[int], media: Sequence[tuple[int, ProcessedMedia]]) -> PromptLayout:
        """See `Towers.layout`; positions come from the model's `get_rope_index` where it has one."""
        spans = self._bidirectional_spans(len(token_ids), media)
        if self._rope_index is None:
            start, end = self._first_position, self._first_position + len(token_ids)
            return PromptLayout((tuple(range(start, end)),) if start else None, start, spans)
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
        positions = [start + position for start, item in media for position in embed_positions_of(item)]
        return tuple(BidirectionalSpan(start, end) for start, end in _join_runs(positions))

    def rope_arguments(
        self, token_ids: Sequence[int], media: Sequence[tuple[int, ProcessedMedia]]
    ) -> dict[str, torch.Tensor]:
        """Return the arguments of `get_rope_index` other than the token ids."""
        is_media = torch.zeros(1, len(token_ids), dtype=torch.int)
        for start, item in media:
            is_media[0, torch.tensor(embed_positions_of(item)) + start] = 1
        grids = [item.tensors["image_grid_thw"] for _, item in media if "image_grid_thw" in item.tensors]
        return {"mm_token_type_ids": is_media, **({"image_grid_thw": torch.cat(grids)} if grids else {})}

    def encode(self, modality: str, mode: str, items: Sequence[ProcessedMedia]) -> list[torch.Tensor]:
        """See `Towers.encode`."""
        features = self.features(modality, self.batch_tensors(items))
        counts = [item.num_embeds for item in items]
        check_num_embeds(features.shape[0], sum(counts))
        return list(torch.split(features, counts))

    def batch_tensors(self, items: Sequence[ProcessedMedia]) -> dict[str, torch.Tensor]:
        """Return the tensors of all items as a batch, on the model's device and in its dtype."""
        tensors = {}
        for name in items[0].tensors:
            batch = torch.cat([item.tensors[name] for item in items]).to(self.model.device)
            tensors[name] = batch.to(self.model.dtype) if batch.is_floating_point() else batch
        return tensors

    def features(self, modality: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the features of a batch of items, concatenated: `[num_embeds, hidden_size]`, or more columns."""
        output = self.encoder_output(modality, tensors)
        deep = {layer: flatten_features(features) for layer, features in deepstack_features(output).items()}
        if not deep:
            return flatten_features(output.pooler_output)
        self._deep_layers, rows = tuple(deep), list(deep.values())
        # A model may have deepstack features only: the decoder's input is 0 there.
        first = torch.zeros_like(rows[0]) if output.pooler_output is None else flatten_features(output.pooler_output)
        return torch.cat([first, *rows], dim=-1)

    def encoder_output(self, modality: str, tensors: Mapping[str, torch.Tensor]) -> Any:
        """Return the output of the model's own function for a batch of items."""
        return self._encoders[modality](**tensors)

    def decoder_inputs(self, token_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `Towers.decoder_inputs`."""
        return {"inputs_embeds": embed_tokens(self.model, token_ids)}

    def deepstack(self, mask: torch.Tensor, features: torch.Tensor) -> AbstractContextManager[None]:
        """See `Towers.deepstack`."""
        decoder = self.model.get_decoder()
        rows = features.chunk(len(self._deep_layers), dim=-1)
        return add_features(decoder, mask, dict(zip(self._deep_layers, rows, strict=True)))


def decoder_inputs(model: Any, towers: Towers | None, token_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the inputs of any model, as `Towers.decoder_inputs` does; `towers` is None for a text-only model."""
    return {"inputs_embeds": embed_tokens(model, token_ids)} if towers is None else towers.decoder_inputs(token_ids)


def embed_tokens(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    """Return `[1, num_tokens, hidden_size]` for `token_ids [num_tokens]`; ids outside the vocabulary count as 0."""
    embedding = model.get_input_embeddings()
    embeds: torch.Tensor = embedding(torch.where(token_ids < embedding.weight.shape[0], token_ids, 0)[None])
    return embeds


def deepstack_features(output: Any) -> dict[int, Any]:
    """Return deepstack features by the layer before which they are added; empty for a model without them.

    Source: https://arxiv.org/abs/2406.04334

    Args:
        output: of `get_image_features`. Its `deepstack_features` are pairs of a layer and features, or only features,
            which are added after each of the first layers.
    """
    found: Sequence[Any] = getattr(output, "deepstack_features", None) or ()
    has_layers = bool(found) and isinstance(found[0][0], int)
    return dict(found if has_layers else enumerate(found, start=1))


@contextmanager
def add_features(decoder: Any, mask: torch.Tensor, features: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """Add features to a decoder's hidden states during the forward inside the block.

    Args:
        decoder: has `layers` and, after them, `norm`.
        mask: `[num_tokens]` bool, the tokens that take features.
        features: `[num_masked, hidden_size]` by the layer before which they are added.
    """

    def make_hook(rows: torch.Tensor) -> Any:
        def add(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            hidden_states = args[0].clone()  # [1, num_tokens, hidden_size]
            hidden_states[:, mask] += rows.to(hidden_states.dtype)
            return (hidden_states, *args[1:])

        return add

    modules = [*decoder.layers, decoder.norm]
    with ExitStack() as stack:
        for layer, rows in features.items():
            stack.callback(modules[layer].register_forward_pre_hook(make_hook(rows)).remove)
        yield


def flatten_features(features: Any) -> torch.Tensor:
    """Concatenate a family's features, one tensor or a list of one per item, to `[num_embeds, hidden_size]`."""
    parts = features if isinstance(features, list | tuple) else [features]
    return torch.cat([part.flatten(0, -2) for part in parts])


def embed_positions_of(item: ProcessedMedia) -> Sequence[int]:
    """Return which of an item's tokens take an embedding."""
    return item.embed_positions if item.embed_positions is not None else range(item.num_tokens)


def _join_runs(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Join consecutive numbers of an ascending sequence to ranges: `[3, 4, 8]` are `[(3, 5), (8, 9)]`."""
    runs: list[tuple[int, int]] = []
    for position in positions:
        start = runs.pop()[0] if runs and runs[-1][1] == position else position
        runs.append((start, position + 1))
    return runs


def _parts_by_prefix(model: nn.Module) -> dict[str, str]:
    """Return a model's parts by prefixes of module names, found by the configuration that a module has."""
    config: Any = model.config
    part_of_config = {
        id(found): part for name, part in TOWER_CONFIGS.items() if (found := getattr(config, name, None)) is not None
    }
    part_of_config[id(config.get_text_config())] = "language_model"
    parts: dict[str, str] = {}
    for name, module in model.named_modules():
        part = part_of_config.get(id(getattr(module, "config", None)))
        if name and part is not None and not any(f"{name}.".startswith(known) for known in parts):
            parts[f"{name}."] = part
    return {**parts, "lm_head.": "language_model"}
