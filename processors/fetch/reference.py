"""`MediaReference`: what a request says about one of its media, before anything is fetched or decoded."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from mmlora.errors import MediaError
from mmlora.processors.media.decoding import check_counts, why_unsupported
from mmlora.utils.text import shorten

MAX_UUID_CHARS: Final = 256
HTTP_SCHEMES: Final = ("http", "https")


@dataclass(frozen=True, eq=False)
class MediaReference:
    """One item.

    Attributes:
        modality: that it must be of.
        content: a URL, base64, or what `load_media` takes; None for the item that the uuid stands for.
        form: of the content.
        uuid: the client's name for the item.
    """

    modality: str
    content: Any
    form: Literal["url", "base64", "object"] = "url"
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
        """The URL, if it is one that has to be fetched."""
        is_http = self.form == "url" and isinstance(self.content, str) and scheme_of(self.content) in HTTP_SCHEMES
        return self.content if is_http else None


def references_of(
    data: Mapping[str, object],
    uuids: Mapping[str, object],
    modalities: Collection[str],
    limit_mm_per_prompt: Mapping[str, int] | None = None,
) -> dict[str, list[MediaReference]]:
    """Read the URLs and uuids of one prompt.

    Args:
        data: by modality, one URL or a list of them, None for an item whose uuid is known.
        uuids: by modality, one uuid or a list of them, None for an item without.
        modalities: what the model takes.
        limit_mm_per_prompt: most items by modality.

    Raises:
        MediaError: too many, of a modality that the model does not take, or not as many uuids as items.
    """
    for name in (*data, *uuids):
        if name not in modalities:
            takes = f"the model takes {', '.join(sorted(modalities)) or 'text only'}"
            raise MediaError(f"multi_modal_data holds {shorten(name)}; {why_unsupported(name) or takes}")
    references = {}
    for name in dict.fromkeys((*data, *uuids)):
        names = _as_list(uuids.get(name))
        urls = _as_list(data.get(name)) or [None] * len(names)
        check_counts({name: len(urls)}, modalities, limit_mm_per_prompt)
        if names and len(names) != len(urls):
            raise MediaError(f"multi_modal_uuids holds {len(names)} for the {len(urls)} items of {name}")
        pairs = zip(urls, names or [None] * len(urls), strict=True)
        references[name] = [MediaReference(name, url, uuid=uuid) for url, uuid in pairs]
    return references


def scheme_of(url: str) -> str:
    """The scheme of a URL, in small letters."""
    return url[:8].partition(":")[0].lower()


def _as_list(contents: object) -> list[Any]:
    if contents is None:
        return []
    return contents if isinstance(contents, list) else [contents]
