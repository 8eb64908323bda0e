"""`MediaLoader` and `PromptMedia`: from what requests say about their media to decoded items.

A loader belongs to an engine. Each prompt gets a `PromptMedia` of it, which first fetches what other servers have,
without holding a thread, and then decodes, in a thread that may be blocked for it.
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from mmlora.errors import MediaError, MediaNotFound
from mmlora.processors.fetch.addresses import parse_networks
from mmlora.processors.fetch.data_url import load_base64, load_data_url
from mmlora.processors.fetch.file_source import FileSource
from mmlora.processors.fetch.reference import HTTP_SCHEMES, MediaReference, scheme_of
from mmlora.processors.media.cache import CachedMedia, MediaCache
from mmlora.processors.media.decoding import check_decoded_bytes, load_media, sniff_modality
from mmlora.processors.media.items import (
    DEFAULT_CACHE_BYTES,
    DEFAULT_FETCH_TIMEOUT_S,
    DEFAULT_LIMITS,
    MediaItem,
    MediaLimits,
)
from mmlora.utils.text import shorten

if TYPE_CHECKING:
    from mmlora.processors.fetch.http_source import HTTPSource

MAX_URLS: Final = 128  # of one prompt: a request must not become a flood somewhere else


class MediaLoader:
    """Knows what media may cost, where they may come from, and those that are kept by uuid.

    Args:
        limits: of the media.
        local_path: the directory that `file:` URLs may lead to; None for none.
        domains: hosts that http(s) URLs may lead to, see `HTTPSource`; None for any.
        networks: addresses that they may lead to beside public ones.
        timeout_s: of one http(s) URL.
        cache_bytes: memory of the items that are kept by uuid.

    Raises:
        ConfigError: the directory or a network is none.
    """

    def __init__(
        self,
        limits: MediaLimits = DEFAULT_LIMITS,
        *,
        local_path: str | None = None,
        domains: Sequence[str] | None = None,
        networks: Sequence[str] = (),
        timeout_s: float = DEFAULT_FETCH_TIMEOUT_S,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        self.limits = limits
        self.cache = MediaCache(cache_bytes)
        self._files = FileSource(local_path, limits) if local_path is not None else None
        self._domains = domains
        self._networks = parse_networks(networks)
        self._timeout_s = timeout_s

    @cached_property
    def http(self) -> "HTTPSource":
        """Reads http(s) URLs.

        Raises:
            MediaError: the package for it is missing.
        """
        try:
            from mmlora.processors.fetch.http_source import HTTPSource
        except ImportError as error:
            raise MediaError("reading media from http(s) URLs needs the package httpx") from error
        return HTTPSource(self._domains, self._networks, self._timeout_s, self.limits)

    def begin(self, caller: str = "") -> "PromptMedia":
        """Return what loads the media of one prompt.

        Args:
            caller: whose uuids are meant; callers do not see each other's.
        """
        return PromptMedia(self, caller)

    def load_url(self, url: str, *, expected: str | None = None) -> MediaItem:
        """Load a `data:`, `http:`, `https:` or `file:` URL; the caller's thread waits for other servers.

        Args:
            url: its content is told by magic bytes; names and MIME types are not trusted.
            expected: `"audio"` or `"image"` where it must be one of them.

        Raises:
            MediaError: it is not allowed, cannot be read, is too large, or its content is unusable.
        """
        if not isinstance(url, str):
            raise MediaError(f"a media URL must be a string, got a {type(url).__name__}")
        scheme = scheme_of(url)
        if scheme in HTTP_SCHEMES:
            return self.decode(url, self.http.read([url]).result()[url], expected)
        if scheme == "file" and self._files is not None:
            return self.decode(url, self._files.read(url), expected)
        if scheme == "file":
            raise MediaError("file: URLs are not allowed; --allowed-local-media-path DIRECTORY allows those in it")
        return load_data_url(url, self.limits, expected=expected)

    def decode(self, url: str, content: bytes, expected: str | None) -> MediaItem:
        """Decode what a URL led to. Content that is no media is not quoted: it may not be the client's to read.

        Raises:
            MediaError: it is unusable.
        """
        if sniff_modality(content[:64]) is None:
            raise MediaError(f"media URL {shorten(url)} leads to what is neither audio nor an image")
        return load_media(content, self.limits, expected=expected)


class PromptMedia:
    """Loads the media of one prompt, together within what a prompt may hold.

    Args:
        loader: of the engine.
        caller: whose uuids are meant.
    """

    def __init__(self, loader: MediaLoader, caller: str) -> None:
        self._loader = loader
        self._caller = caller
        self._fetched: dict[str, bytes] = {}
        self._num_bytes = 0

    async def fetch(self, references: Iterable[MediaReference]) -> None:
        """Read http(s) URLs, except those that a held uuid stands for; to cancel it stops it.

        Args:
            references: the media of the prompt; those without an `http_url` have nothing to read.

        Raises:
            MediaError: there are too many, or one cannot be read.
        """
        remote = [reference for reference in references if reference.http_url is not None]
        if len(remote) > MAX_URLS:
            raise MediaError(f"the prompt has {len(remote)} http(s) URLs; allowed are {MAX_URLS}")
        urls = {url for reference in remote if (url := reference.http_url) and self._held(reference) is None}
        if urls:
            self._fetched = await asyncio.wrap_future(self._loader.http.read(urls))

    def load(self, reference: MediaReference) -> MediaItem:
        """Decode one item. A URL that `fetch` has not read is read now, and the thread waits.

        Raises:
            MediaError: it is unusable, or the media of the prompt are too large.
            MediaNotFound: it has no content, and its uuid stands for none.
        """
        held = self._held(reference)
        item = load_media(held, expected=reference.modality) if held is not None else self._load(reference)
        if reference.uuid is not None and held is None:
            self._loader.cache.put(self._caller, reference.uuid, CachedMedia(item, reference.http_url))
        self._num_bytes += item.num_bytes
        check_decoded_bytes(self._num_bytes, self._loader.limits)
        return item

    def _held(self, reference: MediaReference) -> MediaItem | None:
        """The item that the uuid stands for, unless the reference comes with other content."""
        if reference.uuid is None:
            return None
        entry = self._loader.cache.get(self._caller, reference.uuid)
        is_same = entry is not None and entry.url is not None and entry.url == reference.http_url
        return entry.item if entry is not None and (is_same or reference.content is None) else None

    def _load(self, reference: MediaReference) -> MediaItem:
        content: Any = reference.content
        if content is None:
            raise MediaNotFound(
                f"no media item is held for the uuid {reference.uuid!r} (any more); send it with its content"
            )
        if reference.form == "base64":
            return load_base64(content, self._loader.limits, expected=reference.modality)
        if reference.form == "object":
            return load_media(content, self._loader.limits, expected=reference.modality)
        if reference.http_url in self._fetched:
            return self._loader.decode(content, self._fetched[content], reference.modality)
        return self._loader.load_url(content, expected=reference.modality)


@dataclass(frozen=True, eq=False)
class PendingMedia:
    """The media of one prompt, still to be fetched and decoded.

    Attributes:
        references: the media in order.
        loader: fetches and decodes them.
    """

    references: Sequence[MediaReference]
    loader: PromptMedia

    async def fetch(self) -> None:
        """Fetch the media at http(s) URLs; `load` would block its thread for that.

        Raises:
            MediaError: there are too many URLs, or one cannot be fetched.
        """
        await self.loader.fetch(self.references)

    def load(self) -> dict[str, list[MediaItem]]:
        """Decode the media and return them by modality.

        Raises:
            MediaError: an item cannot be used, or they are too large together.
        """
        items: dict[str, list[MediaItem]] = {}
        for reference in self.references:
            items.setdefault(reference.modality, []).append(self.loader.load(reference))
        return items
