"""`MediaEncoder`: from processed media to embeddings, each encoded once per content and tower adapter.

Items are grouped by modality, mode, adapter slot and tensor shapes; each group is one tower call with one adapter, so
no row needs a mapping and no clip is padded to the length of another (some towers' output depends on padding).
"""

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mmlora.errors import MediaError, MMLoRAError
from mmlora.lora.layers.state import LoRAState
from mmlora.processors.base import ProcessedMedia
from mmlora.towers.base import Towers

EncoderKey = tuple[tuple[str, object], ...]


@dataclass(frozen=True)
class EncoderJob:
    """One media item to encode, under the key of everything that its embeddings depend on.

    `slot` is the LoRA slot whose adapter has tower or connector tensors, None for the base towers.
    """

    media: ProcessedMedia
    mode: str
    slot: int | None
    key: EncoderKey


def encoder_key(
    media: ProcessedMedia, mode: str, media_digest: str | None, cache_salt: str | None = None
) -> EncoderKey:
    """Identity of a media item's embeddings: content and processor options, mode, tower part of the adapter.

    With a salt they are found only by requests with the same one.
    """
    return (
        ("modality", media.modality),
        ("content", media.content_hash),
        ("mode", mode),
        ("adapter", media_digest),
        ("salt", cache_salt),
    )


class MediaEncoder:
    """Run towers and keep embeddings of up to `max_bytes`, least recently used ones dropped first.

    Args:
        towers: of the model.
        lora_state: shared with the wrapped layers; None without LoRA.
        max_bytes: bound of the cache.
    """

    def __init__(self, towers: Towers, lora_state: LoRAState | None, max_bytes: int) -> None:
        self.towers = towers
        self._lora_state = lora_state
        self._max_bytes = max_bytes
        self._cache: OrderedDict[EncoderKey, torch.Tensor] = OrderedDict()
        self.num_bytes = 0
        self.num_hits = 0
        self.num_encoded = 0

    def encode(self, jobs: Sequence[EncoderJob]) -> dict[EncoderKey, torch.Tensor | MMLoRAError]:
        """Embeddings of every job under its key; a group that the tower refuses yields its error instead.

        Returns:
            Per key `[num_embeds, hidden_size]`, or the error: a `MediaError` unless it is for lack of memory.
        """
        results: dict[EncoderKey, torch.Tensor | MMLoRAError] = {}
        groups: dict[tuple[object, ...], list[EncoderJob]] = defaultdict(list)
        for job in {job.key: job for job in jobs}.values():  # one slot is as good as another that gives the same
            if job.key in self._cache:
                self._cache.move_to_end(job.key)
                results[job.key] = self._cache[job.key]
                self.num_hits += 1
            else:
                shapes = tuple(sorted((name, tuple(tensor.shape)) for name, tensor in job.media.tensors.items()))
                groups[job.media.modality, job.mode, job.slot, shapes].append(job)
        for group in groups.values():
            results.update(self._encode_group(group))
        return results

    def clear(self) -> None:
        """Forget all embeddings."""
        self._cache.clear()
        self.num_bytes = 0

    def _encode_group(self, jobs: list[EncoderJob]) -> dict[EncoderKey, torch.Tensor | MMLoRAError]:
        first = jobs[0]
        items = [job.media for job in jobs]
        try:
            if self._lora_state is None:
                embeds = self.towers.encode(first.media.modality, first.mode, items)
            else:
                with self._lora_state.uniform(first.slot):
                    embeds = self.towers.encode(first.media.modality, first.mode, items)
            for item, rows in zip(items, embeds, strict=True):
                if rows.shape[0] != item.num_embeds:
                    raise ValueError(f"the tower gives {rows.shape[0]} embeddings for {item.num_embeds} placeholders")
        except (ValueError, RuntimeError, IndexError) as error:
            if len(jobs) > 1:  # one item must not take the others with it
                return {key: result for job in jobs for key, result in self._encode_group([job]).items()}
            kind = MMLoRAError if isinstance(error, torch.OutOfMemoryError) else MediaError
            return {first.key: kind(f"the {first.media.modality} could not be encoded: {error}")}
        self.num_encoded += len(jobs)
        results: dict[EncoderKey, torch.Tensor | MMLoRAError] = {}
        for job, rows in zip(jobs, embeds, strict=True):
            own = rows.clone()  # a storage of its own, so that dropping it frees its memory
            self._store(job.key, own)
            results[job.key] = own
        return results

    def _store(self, key: EncoderKey, embeds: torch.Tensor) -> None:
        self._cache[key] = embeds
        self.num_bytes += embeds.nbytes
        while self.num_bytes > self._max_bytes:
            _, dropped = self._cache.popitem(last=False)
            self.num_bytes -= dropped.nbytes
