"""Loading of media: references in a request, URLs, bytes and objects become decoded items, within limits."""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import unquote, unquote_to_bytes

from mmlora.errors import MediaError, MediaNotFound
from mmlora.processors.fetch.file_source import FileSource
from mmlora.processors.media.audio import AudioItem
from mmlora.processors.media.cache import CachedMedia, MediaCache
from mmlora.processors.media.items import (
    DEFAULT_CACHE_BYTES,
    DEFAULT_DECODE_TIMEOUT_S,
    DEFAULT_FETCH_TIMEOUT_S,
    DEFAULT_LIMITS,
    MediaItem,
    MediaLimits,
    is_array,
)
from mmlora.processors.media.worker_pool import DecodeBudget, WorkerPool
from mmlora.processors.modalities import AUDIO, MODALITIES, ContentForm, Modality
from mmlora.utils.base64_text import decode_base64, decode_head, decoded_size
from mmlora.utils.text import describe_type, shorten

if TYPE_CHECKING:
    from mmlora.processors.fetch.http_source import HTTPSource

MAX_URLS: Final = 128  # http(s) URLs of one prompt, so that a request cannot flood another server
MAX_UUID_CHARS: Final = 256
HTTP_SCHEMES: Final = ("http", "https")
SCHEMES: Final = "data:, http:, https: and file:"

_MAX_SCHEME_CHARS: Final = 32
_SUPPORTED: Final = "supported are " + " and ".join(
    f"{', '.join(modality.formats)} {modality.name}" for modality in MODALITIES.values()
)
_FORMS: Final = "bytes, a PIL image, a [height, width, 3] uint8 array, or audio as (array, sample_rate)"
_UNSUPPORTED: Final[Mapping[str, str]] = {
    "embeds": "precomputed embeddings are not supported: send the image or the audio itself",
    "video": "videos are not supported: send their frames as images",
}
_UNSUPPORTED_MAGIC: Final = {
    b"FORM": "an AIFF file",
    b"#!AMR": "an AMR file",
    b"0&\xb2u\x8ef\xcf\x11": "a Windows Media file",
    b"II*\x00": "a TIFF image",
    b"MM\x00*": "a TIFF image",
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "gzip data",
    b".snd": "an AU file",
    b"caff": "a CAF file",
    b"RIFF": "a RIFF container that is neither WAVE nor WEBP",
}
_TEXT_CONTROL = frozenset(b"\t\n\r\f\x1b")


class Decode(Protocol):
    """Decodes a file, see `WorkerPool.decode`."""

    def __call__(self, modality: Modality, data: bytes, *, is_base64: bool = False) -> MediaItem: ...


@dataclass(frozen=True, eq=False)
class MediaReference:
    """A media item of a request, before it is downloaded or decoded.

    Attributes:
        modality: that the content must have.
        content: a URL, base64, or an object that `load_media` accepts; None for the cached item of the uuid.
        form: of the content.
        uuid: the client's name for the item in the media cache.
    """

    modality: str
    content: Any
    form: ContentForm = "url"
    uuid: str | None = None

    def __post_init__(self) -> None:
        if self.uuid is not None and not (isinstance(self.uuid, str) and 0 < len(self.uuid) <= MAX_UUID_CHARS):
            raise MediaError(
                f"uuid {shorten(self.uuid)} of a media item: it must be text of 1 to {MAX_UUID_CHARS} characters"
            )
        if self.content is None and self.uuid is None:
            raise MediaError(f"a media item ({self.modality}) has neither content nor a uuid")

    @property
    def http_url(self) -> str | None:
        """The URL, if it has to be downloaded."""
        is_http = self.form == "url" and isinstance(self.content, str) and _scheme_of(self.content) in HTTP_SCHEMES
        return self.content if is_http else None


class MediaLoader:
    """Loads media within limits, from allowed places only, and caches items under the uuids of clients.

    Args:
        limits: on each item and each prompt.
        local_path: the directory that `file:` URLs may point into; None refuses them.
        domains: allowed hosts of http(s) URLs, see `HTTPSource`; None allows all.
        networks: allowed addresses of http(s) URLs besides public ones.
        timeout_s: of one http(s) URL.
        cache_bytes: capacity of the media cache.
        num_workers: maximum number of processes that decode.
        decode_timeout_s: for decoding all media of one prompt.

    Attributes:
        workers: decode encoded content; started on first use.

    Raises:
        ConfigError: the directory does not exist.
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
        num_workers: int = 1,
        decode_timeout_s: float = DEFAULT_DECODE_TIMEOUT_S,
    ) -> None:
        self.limits = limits
        self.workers = WorkerPool(limits, num_workers=num_workers, timeout_s=decode_timeout_s)
        self.cache = MediaCache(cache_bytes)
        self._files = FileSource(local_path, limits) if local_path is not None else None
        self._domains = domains
        self._networks = networks
        self._timeout_s = timeout_s

    @cached_property
    def http(self) -> "HTTPSource":
        """The source of http(s) URLs, created on first use.

        Raises:
            ConfigError: an allowed network is not a network.
            MediaError: httpx is not installed.
        """
        try:
            from mmlora.processors.fetch.checked_network import parse_networks
            from mmlora.processors.fetch.http_source import HTTPSource
        except ImportError as error:
            raise MediaError("reading media from http(s) URLs needs the package httpx") from error
        return HTTPSource(self._domains, parse_networks(self._networks), self._timeout_s, self.limits)

    def load(self, content: object, *, expected: str | None = None, budget: DecodeBudget | None = None) -> MediaItem:
        """Decode one item of any form that `load_media` accepts; encoded content in a worker process.

        Args:
            content, expected: see `load_media`.
            budget: time for decoding, shared by the media of a prompt; by default a new one.

        Raises:
            MediaError: the content is unusable, or decoding takes too long.
        """
        return load_media(content, self.limits, expected=expected, decode=self._decode(budget))

    def load_base64(self, data: str | bytes, *, expected: str | None, budget: DecodeBudget | None = None) -> MediaItem:
        """Load base64 content; see `load_base64` and `load`."""
        return load_base64(data, self.limits, expected=expected, decode=self._decode(budget))

    def load_url(self, url: str, *, expected: str | None = None, budget: DecodeBudget | None = None) -> MediaItem:
        """Load a `data:`, `http:`, `https:` or `file:` URL; downloads block the calling thread.

        Args:
            url: names and MIME types in it are ignored; the content decides.
            expected: the modality that the content must have, None for any.
            budget: see `load`.

        Raises:
            MediaError: it is not allowed, cannot be read, is too large, or its content is unusable.
        """
        if not isinstance(url, str):
            raise MediaError(f"a media URL must be a string, got {describe_type(url)}")
        scheme = _scheme_of(url)
        if scheme in HTTP_SCHEMES:
            return self.load_url_content(url, self.http.read([url]).result()[url], expected, budget)
        if scheme == "file" and self._files is not None:
            return self.load_url_content(url, self._files.read(url), expected, budget)
        if scheme == "file":
            raise MediaError("file: URLs are not allowed; --allowed-local-media-path DIRECTORY allows those in it")
        return load_data_url(url, self.limits, expected=expected, decode=self._decode(budget))

    def load_url_content(
        self, url: str, content: bytes, expected: str | None, budget: DecodeBudget | None = None
    ) -> MediaItem:
        """Decode the content of a URL. Errors do not quote the content, which the client may not be allowed to read.

        Raises:
            MediaError: it is unusable.
        """
        if sniff_modality(content[:64]) is None:
            raise MediaError(f"media URL {shorten(url)} leads to content that is neither audio nor an image")
        return self.load(content, expected=expected, budget=budget)

    def _decode(self, budget: DecodeBudget | None) -> Decode:
        if budget is not None:
            self.workers.check_open(budget)  # before base64 is decoded
        return partial(self.workers.decode, budget=budget or self.workers.new_budget())


class PromptMedia:
    """The media of one prompt: fetched without blocking a thread, then decoded within the limits of a prompt.

    Attributes:
        audio_duration_s: of all clips in seconds, when they have been loaded.

    Args:
        loader: of the engine.
        references: the media in order.
        caller: the tenant; uuids of other tenants are not visible to it.
    """

    def __init__(self, loader: MediaLoader, references: Sequence[MediaReference], caller: str = "") -> None:
        self._loader = loader
        self._references = references
        self._caller = caller
        self.audio_duration_s = 0.0
        self._fetched: dict[str, bytes] = {}
        self._budget = loader.workers.new_budget()

    async def fetch(self) -> None:
        """Download the http(s) URLs that are not in the media cache; cancelling stops the downloads.

        Raises:
            MediaError: there are too many, or one cannot be read.
        """
        remote = [reference for reference in self._references if reference.http_url is not None]
        if len(remote) > MAX_URLS:
            raise MediaError(f"the prompt has {len(remote)} http(s) URLs; the limit is {MAX_URLS}")
        urls = {url for reference in remote if (url := reference.http_url) and self._cached_item(reference) is None}
        if urls:
            self._fetched = await asyncio.wrap_future(self._loader.http.read(urls))

    def load(self) -> dict[str, list[MediaItem]]:
        """Decode the media and return them by modality; downloads URLs that `fetch` has not downloaded, blocking.

        Raises:
            MediaError: an item is unusable, or they are too large together.
            MediaNotFound: an item has no content, and its uuid is not cached.
        """
        items: dict[str, list[MediaItem]] = {}
        num_bytes = 0
        for reference in self._references:
            item = self._load_item(reference)
            num_bytes += item.num_bytes
            check_decoded_bytes(num_bytes, self._loader.limits)
            items.setdefault(reference.modality, []).append(item)
        self.audio_duration_s = sum(
            item.duration_s for item in items.get(AUDIO.name, ()) if isinstance(item, AudioItem)
        )
        return items

    def cancel(self) -> None:
        """End the decoding of this prompt's media: `load` raises a `MediaError`, now or when it is called."""
        self._loader.workers.cancel(self._budget)

    def _load_item(self, reference: MediaReference) -> MediaItem:
        cached = self._cached_item(reference)
        if cached is not None:
            return load_media(cached, expected=reference.modality)
        item = self._decode(reference)
        if reference.uuid is not None:
            self._loader.cache.put(self._caller, reference.uuid, CachedMedia(item, reference.http_url))
        return item

    def _cached_item(self, reference: MediaReference) -> MediaItem | None:
        """Return the cached item of a reference's uuid, unless the reference comes with other content."""
        if reference.uuid is None:
            return None
        entry = self._loader.cache.get(self._caller, reference.uuid)
        is_same = entry is not None and entry.url is not None and entry.url == reference.http_url
        return entry.item if entry is not None and (is_same or reference.content is None) else None

    def _decode(self, reference: MediaReference) -> MediaItem:
        content: Any = reference.content
        if content is None:
            raise MediaNotFound(
                f"no media item is held for the uuid {reference.uuid!r} (any more); send it with its content"
            )
        loader, expected, budget = self._loader, reference.modality, self._budget
        if reference.form == "base64":
            return loader.load_base64(content, expected=expected, budget=budget)
        if reference.form == "object":
            return loader.load(content, expected=expected, budget=budget)
        if reference.http_url in self._fetched:
            return loader.load_url_content(content, self._fetched[content], expected, budget)
        return loader.load_url(content, expected=expected, budget=budget)


def parse_references(
    data: Mapping[str, object],
    uuids: Mapping[str, object],
    modalities: Collection[str],
    limit_mm_per_prompt: Mapping[str, int] | None = None,
) -> list[MediaReference]:
    """Return the media references of one prompt's `multi_modal_data` and `multi_modal_uuids`.

    Args:
        data: one URL or a list of them by modality; None for an item whose uuid is cached.
        uuids: one uuid or a list of them by modality; None for an item without one.
        modalities: that the model supports.
        limit_mm_per_prompt: maximum number of items by modality.

    Raises:
        MediaError: too many items, an unsupported modality, or not as many uuids as items.
    """
    for name in (*data, *uuids):
        if name not in modalities:
            takes = f"the model takes {', '.join(sorted(modalities)) or 'text only'}"
            raise MediaError(f"multi_modal_data holds {shorten(name)}; {why_unsupported(name) or takes}")
    references: list[MediaReference] = []
    for name in dict.fromkeys((*data, *uuids)):
        names = _as_list(uuids.get(name))
        urls = _as_list(data.get(name)) or [None] * len(names)
        check_counts({name: len(urls)}, modalities, limit_mm_per_prompt)
        if names and len(names) != len(urls):
            raise MediaError(f"multi_modal_uuids holds {len(names)} for the {len(urls)} items of {name}")
        pairs = zip(urls, names or [None] * len(urls), strict=True)
        references += [MediaReference(name, url, uuid=uuid) for url, uuid in pairs]
    return references


def why_unsupported(name: str) -> str | None:
    """Return a hint on a kind of content that only other engines support (`image_embeds`, `video_url`), or None."""
    return next((reason for part, reason in _UNSUPPORTED.items() if part in name), None)


def sniff_modality(data: bytes) -> Modality | None:
    """Return the modality of encoded content by its magic bytes, or None if its format is not supported."""
    return next((modality for modality in MODALITIES.values() if modality.recognizes(data)), None)


def load_media(
    content: object,
    limits: MediaLimits = DEFAULT_LIMITS,
    *,
    expected: str | None = None,
    decode: Decode | None = None,
) -> MediaItem:
    """Decode one audio clip or image of any accepted form.

    Args:
        content: encoded bytes, `(array, sample_rate)`, a PIL image, or a `[height, width, 3] uint8` array. Paths and
            URLs are not content and are refused.
        limits: byte, pixel and duration limits; what an item claims is checked before it is decoded.
        expected: the modality that the content must have, None for any.
        decode: decodes bytes; by default this process does.

    Raises:
        MediaError: unusable content, or content of another modality than `expected`.
    """
    modality = _expected_modality(content, expected)
    if isinstance(content, MediaItem):
        return content
    if isinstance(content, bytes | bytearray | memoryview):
        data = bytes(content)
        if len(data) > limits.max_bytes:
            raise MediaError(f"media content of {len(data)} bytes is larger than the allowed {limits.max_bytes} bytes")
        return modality.decode(data, limits) if decode is None else decode(modality, data)
    return modality.convert(content, limits)


def check_counts(counts: Mapping[str, int], modalities: Collection[str], limits: Mapping[str, int] | None) -> None:
    """Refuse media that the model does not support, or too many items.

    Args:
        counts: number of items by modality.
        modalities: that the model supports.
        limits: maximum number of items by modality (`limit_mm_per_prompt`); others are not limited.

    Raises:
        MediaError: names the modality, the number and what is allowed.
    """
    for modality, count in counts.items():
        if count and modality not in modalities:
            takes = ", ".join(sorted(modalities)) or "text only"
            raise MediaError(f"the prompt holds {modality}; the model takes {takes}")
        limit = (limits or {}).get(modality)
        if limit is not None and count > limit:
            raise MediaError(f"the prompt has {count} {modality} items; limit_mm_per_prompt allows {limit}")


def check_decoded_bytes(num_bytes: int, limits: MediaLimits) -> None:
    """Raise `MediaError` if the decoded media of one prompt exceed the limit."""
    if num_bytes > limits.max_decoded_bytes:
        raise MediaError(
            f"the media of the prompt have {num_bytes} bytes or more when decoded; "
            f"allowed are {limits.max_decoded_bytes}"
        )


def load_data_url(
    url: str, limits: MediaLimits = DEFAULT_LIMITS, *, expected: str | None = None, decode: Decode | None = None
) -> MediaItem:
    """Load a `data:` URL (RFC 2397), base64 or percent-encoded; its MIME type is ignored.

    Raises:
        MediaError: another scheme, malformed, too large, or unusable content.
    """
    if not isinstance(url, str):
        raise MediaError(f"a media URL must be a string, got {describe_type(url)}")
    scheme, colon, _ = url[:_MAX_SCHEME_CHARS].partition(":")
    if not colon or scheme.lower() != "data":
        named = f"scheme {scheme.lower()!r}" if colon else "no scheme"
        raise MediaError(f"media URL with {named} ({shorten(url)}): allowed are {SCHEMES} URLs")
    comma = url.find(",", 0, 1024)
    if comma < 0:
        raise MediaError(f"malformed data: URL ({shorten(url)}): no comma after the media type")
    if url[5:comma].rstrip().lower().endswith(";base64"):
        if url.find("%", comma) < 0:
            _check_size(decoded_size(url, comma + 1, limits.max_bytes), limits)
            return load_base64(url[comma + 1 :], limits, expected=expected, decode=decode)
        _check_size((len(url) - comma - 1) // 4, limits)  # a lower bound: each character may be written as three
        return load_base64(unquote(url[comma + 1 :]), limits, expected=expected, decode=decode)
    _check_size(len(url) - comma - 1 - 2 * url.count("%", comma), limits)
    return load_media(unquote_to_bytes(url[comma + 1 :]), limits, expected=expected, decode=decode)


def load_base64(
    data: str | bytes,
    limits: MediaLimits = DEFAULT_LIMITS,
    *,
    expected: str | None = None,
    decode: Decode | None = None,
) -> MediaItem:
    """Load base64 content; whitespace, missing padding and the URL-safe alphabet are accepted.

    Raises:
        MediaError: not base64, too large, or unusable content.
    """
    if not isinstance(data, str | bytes):
        raise MediaError(f"base64 media must be a string, got {describe_type(data)}")
    if not data.isascii():
        raise MediaError(f"malformed base64 media ({shorten(data)}): it has characters outside of ASCII")
    text = data.decode("ascii") if isinstance(data, bytes) else data
    _check_size(decoded_size(text, 0, limits.max_bytes), limits)
    head = decode_head(text)
    if decode is None or not head:
        return load_media(decode_base64(text), limits, expected=expected, decode=decode)
    return decode(_expected_modality(head, expected), text.encode("ascii"), is_base64=True)


def _check_size(num_bytes: int, limits: MediaLimits) -> None:
    if num_bytes > limits.max_bytes:
        raise MediaError(f"media URL claims about {num_bytes} bytes, more than the allowed {limits.max_bytes} bytes")


def _scheme_of(url: str) -> str:
    return url[:8].partition(":")[0].lower()


def _as_list(contents: object) -> list[Any]:
    if contents is None:
        return []
    return contents if isinstance(contents, list) else [contents]


def _expected_modality(content: object, expected: str | None) -> Modality:
    modality = _modality_of(content)
    if expected is not None and modality.name != expected:
        raise MediaError(f"the content is {modality.name}, but {expected} was expected here")
    return modality


def _modality_of(content: object) -> Modality:
    if isinstance(content, MediaItem):
        return MODALITIES[content.modality]
    if isinstance(content, bytes | bytearray | memoryview):
        return _modality_of_bytes(bytes(content[:512]))
    for modality in MODALITIES.values():
        if modality.accepts(content):
            return modality
    if is_array(content):
        raise MediaError(
            f"a bare array of shape {tuple(content.shape)} is not supported: an image is a [height, width, 3] uint8 "
            "array, audio is (array, sample_rate), and precomputed embeddings are not supported"
        )
    raise MediaError(f"media content is a {type(content).__name__}; allowed are {_FORMS}{_hint(content)}")


def _modality_of_bytes(head: bytes) -> Modality:
    if not head:
        raise MediaError(f"media content of 0 bytes; {_SUPPORTED}")
    modality = sniff_modality(head)
    if modality is None:
        raise MediaError(f"the content is neither audio nor an image but {_describe_content(head)}; {_SUPPORTED}")
    return modality


def _describe_content(head: bytes) -> str:
    """Describe unsupported content for an error message."""
    if head[4:8] == b"ftyp":
        return f"an MP4-family image (brand {head[8:12].decode('ascii', 'replace').strip()!r}: HEIC or AVIF)"
    for magic, name in _UNSUPPORTED_MAGIC.items():
        if head.startswith(magic):
            return name
    if _is_text(head):
        return f"text beginning with {head[:32].decode('utf-8', 'replace')!r}"
    return f"unknown bytes beginning with {head[:12].hex(' ')}"


def _is_text(head: bytes) -> bool:
    if head.startswith((b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf")):
        return True
    # A UTF-8 character may be cut at the end of the window.
    text = head.decode("utf-8", "ignore").encode()
    return len(head) - len(text) <= 3 and all(byte >= 32 or byte in _TEXT_CONTROL for byte in head)


def _hint(content: object) -> str:
    if isinstance(content, str):
        return "; URLs are accepted in chat messages"
    if hasattr(content, "__fspath__"):
        return "; read the file and pass its bytes"
    return ""
