"""`MediaEncoder`: embeddings are cached once per key, and `num_bytes` is their size."""

import torch

from mmlora.processors.base import ProcessedMedia
from mmlora.towers.encoder import EncoderJob, MediaEncoder, encoder_key


class _Towers:
    """Returns three rows per item."""

    modalities = frozenset({"audio"})

    def part_of(self, module_name: str) -> str:
        return "audio_tower"

    def encode(self, modality: str, mode: str, items: list[ProcessedMedia]) -> list[torch.Tensor]:
        return [torch.full((3, 4), float(len(item.content_hash))) for item in items]


def job(content: str, slot: int | None, digest: str | None) -> EncoderJob:
    media = ProcessedMedia("audio", content, {}, 3)
    return EncoderJob(media, "audio", slot, encoder_key(media, "audio", digest))


def test_a_key_in_two_slots_is_encoded_and_counted_once() -> None:
    """Two adapters with equal tower tensors share embeddings within a step."""
    encoder = MediaEncoder(_Towers(), None, 1000)
    for content in ("a", "bb", "ccc", "dddd"):
        found = encoder.encode([job(content, 0, "same"), job(content, 1, "same")])
        assert len(found) == 1
    assert encoder.num_encoded == 4 and encoder.num_bytes == 4 * 3 * 4 * 4 == sum(
        rows.nbytes for rows in encoder._cache.values()
    )


def test_the_least_recently_used_are_evicted_first() -> None:
    encoder = MediaEncoder(_Towers(), None, 2 * 3 * 4 * 4)
    encoder.encode([job("a", None, None), job("bb", None, None)])
    encoder.encode([job("a", None, None)])
    encoder.encode([job("ccc", None, None)])
    before = encoder.num_hits
    encoder.encode([job("a", None, None), job("bb", None, None)])
    assert encoder.num_hits == before + 1
