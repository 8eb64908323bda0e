"""`MediaEncoder`: runs the towers on processed media, and caches embeddings per content and tower adapter.

Items are grouped by modality, mode, adapter slot and tensor shapes. Each group is one tower call with one adapter, so
no row-to-slot mapping is needed, and no clip is padded to the length of another (the output of some towers depends on
padding).
"""

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mmlora.errors import MediaError, MMLoRAError
from mmlora.lora.layers.base import LoRAState
from mmlora.processors.base import ProcessedMedia
from mmlora.towers.base import Towers, check_num_embeds

EncoderKey = tuple[tuple[str, object], ...]


@dataclass(frozen=True)
class EncoderJob:
    """One media item to encode.

    Attributes:
        media: the item.
        mode: encoding mode, see `Towers.joint_modes`.
        slot: LoRA slot of an adapter with tower or connector tensors; None for the base towers.
        key: identity of the embeddings, see `encoder_key`.
    """

    media: ProcessedMedia
    mode: str
    slot: int | None
    key: EncoderKey


def encoder_key(
    media: ProcessedMedia, mode: str, media_digest: str | None, cache_salt: str | None = None
) -> EncoderKey:
    """Return the identity of a media item's embeddings: everything that they depend on.

    Args:
        media: the item; its content hash covers the processor options.
        mode: encoding mode, see `Towers.joint_modes`.
        media_digest: of the adapter's tower and connector tensors, None for the base towers.
        cache_salt: of the request; only requests with the same salt share embeddings.
    """
    return (
        ("modality", media.modality),
        ("content", media.content_hash),
        ("mode", mode),
        ("adapter", media_digest),
        ("salt", cache_salt),
    )


class MediaEncoder:
    """Run a model's towers and cache their embeddings, with LRU eviction.

    Args:
        towers: of the model.
        lora_state: shared with the LoRA layers; None without LoRA.
        max_bytes: size limit of the cache.

    Attributes:
        num_bytes: size of the cached embeddings.
        num_hits: items found in the cache.
        num_encoded: items that a tower encoded.
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
        """Encode the jobs whose embeddings are not cached.

        Returns:
            Per key `[num_embeds, hidden_size]`, or the error of an item that cannot be encoded: a `MediaError`, or a
            plain `MMLoRAError` when memory ran out.
        """
        results: dict[EncoderKey, torch.Tensor | MMLoRAError] = {}
        groups: dict[tuple[object, ...], list[EncoderJob]] = defaultdict(list)
        for job in {job.key: job for job in jobs}.values():  # slots with equal tower tensors share a key
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
        """Drop all cached embeddings."""
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
                check_num_embeds(rows.shape[0], item.num_embeds)
        except (ValueError, RuntimeError, IndexError) as error:
            if len(jobs) > 1:  # retry one by one, so that only the item at fault fails
                return {key: result for job in jobs for key, result in self._encode_group([job]).items()}
            kind = MMLoRAError if isinstance(error, torch.OutOfMemoryError) else MediaError
            return {first.key: kind(f"the {first.media.modality} could not be encoded: {error}")}
        self.num_encoded += len(jobs)
        results: dict[EncoderKey, torch.Tensor | MMLoRAError] = {}
        for job, rows in zip(jobs, embeds, strict=True):
            copy = rows.clone()  # not a view of the batch: eviction frees the memory
            self._store(job.key, copy)
            results[job.key] = copy
        return results

    def _store(self, key: EncoderKey, embeds: torch.Tensor) -> None:
        self._cache[key] = embeds
        self.num_bytes += embeds.nbytes
        while self.num_bytes > self._max_bytes:
            _, dropped = self._cache.popitem(last=False)
            self.num_bytes -= dropped.nbytes
