"""`data:` URLs and base64, and their limits before anything is decoded."""

import base64
from urllib.parse import quote

import pytest

from mmlora.errors import MediaError
from mmlora.processors.media.items import MediaLimits
from mmlora.processors.media.loader import MediaLoader, load_base64, load_data_url, load_media


@pytest.fixture
def png(picture, encode_image):
    return encode_image(picture())


@pytest.mark.parametrize(
    "head",
    ["data:image/png;base64,", "data:;base64,", "DATA:text/plain;charset=utf-8;BASE64,", "data:audio/wav;base64,"],
)
def test_the_mime_type_of_a_data_url_is_ignored(head, png):
    assert load_data_url(head + base64.b64encode(png).decode()).content_hash == load_media(png).content_hash


def test_percent_encoded_urls_are_read(png):
    expected = load_media(png).content_hash
    assert load_data_url("data:image/png," + quote(png)).content_hash == expected
    assert (
        load_data_url("data:image/png;base64," + quote(base64.b64encode(png).decode(), safe="")).content_hash
        == expected
    )


def test_variants_of_base64_are_accepted_and_errors_are_not(png):
    expected, text = load_media(png).content_hash, base64.b64encode(png).decode()
    variants = [
        text.rstrip("="),
        base64.encodebytes(png).decode(),
        base64.urlsafe_b64encode(png).decode(),
        text.encode(),
    ]
    assert [load_base64(v).content_hash for v in variants] == [expected] * 4
    for broken in (text[:-9] + "*" + text[-8:], "é" + text, "A"):
        with pytest.raises(MediaError):
            load_base64(broken)


@pytest.mark.parametrize(
    "url, named",
    [
        ("ftp://example.com/a.png", "'ftp'"),
        ("/etc/passwd", "no scheme"),
        ("", "no scheme"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,", "0 bytes"),
        ("data:,hello%20there", "neither audio nor an image"),
        (b"data:,x", "must be a string"),
    ],
)
def test_other_urls_are_refused_by_name(url, named):
    with pytest.raises(MediaError, match=named):
        load_data_url(url)


def test_expected_modality_reaches_the_content(png, encode_audio):
    with pytest.raises(MediaError, match="is audio, but image"):
        load_data_url("data:image/png;base64," + base64.b64encode(encode_audio()).decode(), expected="image")
    with pytest.raises(MediaError, match="is image, but audio"):
        load_base64(base64.b64encode(png).decode(), expected="audio")


@pytest.fixture(scope="module")
def loader():
    loader = MediaLoader(MediaLimits(max_bytes=100_000))
    yield loader
    loader.workers.close()


def test_base64_that_a_worker_decodes_has_the_same_content_and_errors(loader, encode_image, picture):
    png = encode_image(picture())
    expected, text = load_media(png).content_hash, base64.b64encode(png).decode()
    accepted = [
        text,
        text.rstrip("="),
        base64.encodebytes(png).decode(),
        base64.urlsafe_b64encode(png).decode(),
        text.encode(),
        " " * 5000 + text,
        "\n".join(text),
    ]
    assert [loader.load_base64(variant, expected="image").content_hash for variant in accepted] == [expected] * 7
    refused = [text[:-9] + "*" + text[-8:], "*" + text, text + "é", "A", "", text[:-30], text[:40], "aGVsbG8h" * 200]
    for variant in refused:
        with pytest.raises(MediaError) as here:
            load_base64(variant, loader.limits, expected="image")
        with pytest.raises(MediaError) as there:
            loader.load_base64(variant, expected="image")
        assert str(there.value) == str(here.value)
    with pytest.raises(MediaError, match="is image, but audio was expected"):
        loader.load_base64(text, expected="audio")


@pytest.mark.parametrize("extra", [0, 1])
def test_the_size_of_base64_is_limited_before_a_worker_decodes_it(loader, encode_image, picture, extra):
    png = encode_image(picture())
    text = base64.encodebytes(png.ljust(loader.limits.max_bytes + extra, b"\0")).decode()
    if extra:
        with pytest.raises(MediaError, match="claims about 100001 bytes, more than the allowed 100000"):
            loader.load_base64(text, expected="image")
    else:
        assert loader.load_base64(text, expected="image").modality == "image"


class ClaimedLength(str):
    """A string whose length is 4 billion, in place of a real URL of 3 GB."""

    def __len__(self) -> int:
        return 4_000_000_000


@pytest.mark.parametrize("head", ["data:image/png;base64,", "data:image/png,"])
def test_three_gigabytes_are_refused_before_decoding(head, monkeypatch):
    for name in (
        "base64.b64decode",
        "mmlora.processors.media.loader.unquote",
        "mmlora.processors.media.loader.unquote_to_bytes",
    ):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("decoded before the check"))
    with pytest.raises(MediaError, match=r"claims about [234]\d{9} bytes, more than the allowed"):
        load_data_url(ClaimedLength(head + "AAAA"))


@pytest.mark.parametrize("extra", [0, 1])
def test_the_claim_is_exact_at_the_limit(extra, png):
    limits = MediaLimits(max_bytes=len(png) - extra)
    lines = base64.encodebytes(png).decode()
    urls = [f"data:;base64,{lines}", f"data:;base64,{quote(lines, safe='')}", f"data:,{quote(png)}"]
    for url in urls:
        if extra:
            with pytest.raises(MediaError, match="than the allowed"):
                load_data_url(url, limits)
        else:
            assert load_data_url(url, limits).modality == "image"
