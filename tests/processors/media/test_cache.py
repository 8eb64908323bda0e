"""`MediaCache`: eviction, replacement, and isolation of tenants."""

import pytest

from mmlora.errors import MediaError, MediaNotFound
from mmlora.processors.media.audio import AudioItem
from mmlora.processors.media.cache import ENTRY_BYTES, CachedMedia, MediaCache
from mmlora.processors.media.loader import MAX_UUID_CHARS, MediaLoader, MediaReference, PromptMedia


def entry(tone, num_samples=250, url=None):
    return CachedMedia(AudioItem.from_samples(tone(num_samples), 16000), url)


def load(loader, caller, reference):
    return PromptMedia(loader, [reference], caller).load()[reference.modality][0]


def test_the_least_recently_used_items_are_evicted(tone):
    entries = {name: entry(tone) for name in "abcd"}
    size = entries["a"].num_bytes
    assert size == 1000 + ENTRY_BYTES
    cache = MediaCache(3 * size)
    for name in "abc":
        cache.put("", name, entries[name])
    assert cache.get("", "a") is entries["a"] and cache.num_bytes == 3 * size
    cache.put("", "d", entries["d"])
    assert [name for name in "abcd" if cache.get("", name)] == ["a", "c", "d"]
    cache.put("", "a", entry(tone, 500))  # 1000 bytes more
    assert [name for name in "abcd" if cache.get("", name)] == ["a", "d"]
    assert cache.num_bytes == 3000 + 2 * ENTRY_BYTES


def test_an_item_that_is_too_large_only_removes_the_former_one(tone):
    cache = MediaCache(5000)
    cache.put("", "a", entry(tone))
    cache.put("", "a", entry(tone, 2000))
    assert cache.get("", "a") is None and cache.num_bytes == 0
    nothing = MediaCache(0)
    nothing.put("", "a", entry(tone))
    assert nothing.get("", "a") is None and nothing.num_bytes == 0


def test_tenants_do_not_see_each_others_items(tone):
    loader = MediaLoader()
    first = load(loader, "alice", MediaReference("audio", (tone(), 16000), "object", uuid="x"))
    assert load(loader, "alice", MediaReference("audio", None, uuid="x")) is first
    with pytest.raises(MediaNotFound, match="no media item is held for the uuid 'x'"):
        load(loader, "bob", MediaReference("audio", None, uuid="x"))
    load(loader, "bob", MediaReference("audio", (tone(100), 16000), "object", uuid="x"))
    assert load(loader, "alice", MediaReference("audio", None, uuid="x")) is first


def test_other_content_under_the_same_uuid_replaces_it(tone):
    loader = MediaLoader()
    first, second = (
        load(loader, "", MediaReference("audio", (tone(number), 16000), "object", uuid="x")) for number in (100, 200)
    )
    assert first.content_hash != second.content_hash
    assert load(loader, "", MediaReference("audio", None, uuid="x")) is second


def test_an_item_of_the_other_modality_is_refused(tone):
    loader = MediaLoader()
    load(loader, "", MediaReference("audio", (tone(), 16000), "object", uuid="x"))
    with pytest.raises(MediaError, match="is audio, but image was expected"):
        load(loader, "", MediaReference("image", None, uuid="x"))


@pytest.mark.parametrize("uuid", ["", "x" * (MAX_UUID_CHARS + 1), 5, ["x"], {}])
def test_a_uuid_is_short_text(uuid):
    with pytest.raises(MediaError, match="it must be text of 1 to 256 characters"):
        MediaReference("image", "data:,x", uuid=uuid)
