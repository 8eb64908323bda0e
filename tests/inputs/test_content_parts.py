"""Content parts in every form that OpenAI, vLLM, transformers and Qwen use, and malformed ones."""

import base64
import io
import itertools
import json
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from PIL import Image

from mmlora.errors import MediaError, RequestError
from mmlora.inputs.content_parts import read_part
from mmlora.processors.media.loader import MediaLoader, MediaReference, load_media

PICTURE = Image.new("RGB", (8, 6), "red")
CLIP = (np.zeros(1600, np.float32), 16000)


def encoded(format: str) -> str:
    buffer = io.BytesIO()
    PICTURE.save(buffer, format)
    return base64.b64encode(buffer.getvalue()).decode()


PNG, JPEG = encoded("PNG"), encoded("JPEG")
DATA, WEB, FILE, PATH = f"data:image/png;base64,{PNG}", "https://example.org/a.png", "file:///a/b.png", "/a/b.png"
FORMS = {DATA: (DATA, "url"), WEB: (WEB, "url"), FILE: (FILE, "url"), PATH: (FILE, "url"), PNG: (PNG, "base64")}


def summary(part):
    reference = read_part(part)
    assert isinstance(reference, MediaReference)
    return reference.modality, reference.content, reference.form, reference.uuid


@pytest.mark.parametrize("given", FORMS, ids=["data", "web", "file", "path", "base64"])
@pytest.mark.parametrize("modality", ["image", "audio"])
@pytest.mark.parametrize("with_type", [True, False])
def test_any_form_is_taken_by_the_fields_of_transformers(given, modality, with_type):
    expected = (modality, *FORMS[given], None)
    assert summary({"type": modality, modality: given} if with_type else {modality: given}) == expected
    assert summary({"type": modality, "url": given}) == expected
    assert summary({"type": modality, modality: {"url": given}}) == expected if "://" in given else True
    assert summary({"type": modality, "path": given}) == expected
    if given in (DATA, PNG):
        assert summary({"type": modality, "base64": given}) == expected


@pytest.mark.parametrize("modality", ["image", "audio"])
@pytest.mark.parametrize("given", [DATA, WEB, FILE, "ftp://a/b", "a.png"])
def test_url_fields_take_a_string_or_an_object(modality, given):
    field = f"{modality}_url"
    expected = (modality, given, "url", None)
    for value in (given, {"url": given}, {"url": given, "detail": "high", "format": "x"}):
        assert summary({"type": field, field: value}) == expected
        assert summary({"type": modality, field: value}) == expected
        assert summary({field: value}) == expected  # as vLLM
    if modality == "image":
        assert summary({"type": "input_image", "image_url": given, "detail": "auto"}) == expected


def test_input_audio_takes_base64_or_a_data_url():
    for value in ({"data": PNG, "format": "wav"}, {"data": PNG}, {"data": PNG, "format": None}):
        assert summary({"type": "input_audio", "input_audio": value}) == ("audio", PNG, "base64", None)
        assert summary({"input_audio": value}) == ("audio", PNG, "base64", None)
    assert summary({"type": "input_audio", "input_audio": {"data": DATA}}) == ("audio", DATA, "url", None)


@pytest.mark.parametrize("content", [PICTURE, np.zeros((4, 4, 3), np.uint8), b"bytes"], ids=["PIL", "array", "bytes"])
@pytest.mark.parametrize("kind", ["image", "image_pil"])
def test_python_objects_are_taken_in_python_only(content, kind):
    reference = read_part({"type": kind, kind: content, "uuid": "u"})
    assert reference.content is content and reference.form == "object" and reference.uuid == "u"
    assert read_part({kind: content}).content is content
    named = "is an? .*; it must be a URL" if kind == "image" else "type 'image_pil'; allowed"
    with pytest.raises(RequestError, match=named):
        read_part({"type": kind, kind: content}, allows_objects=False)


def test_clips_are_taken_in_python_only():
    assert read_part({"type": "audio", "audio": CLIP}).content is CLIP
    for content in (CLIP, [[0.0, 0.1], 16000]):
        with pytest.raises(RequestError, match="is a list; it must be a URL"):
            read_part({"type": "audio", "audio": content}, allows_objects=False)


def test_a_path_object_is_a_path():
    for field in ("image", "url", "path"):
        assert summary({"type": "image", field: Path("/a/ü b.png")}) == (
            "image",
            "file:///a/%C3%BC%20b.png",
            "url",
            None,
        )


@pytest.mark.parametrize(
    "path", ["/9j/cat.png", "/a b/ü%41#?.png", "/proc/self/cwd/x", "/" + "a" * 200, "/../x", "//h/x"]
)
def test_paths_are_quoted_so_that_they_are_read_as_they_are_written(path):
    _, url, form, _ = summary({"type": "image", "path": path})
    assert form == "url" and unquote(urlsplit(url).path) == path and urlsplit(url).netloc == ""


def test_base64_of_a_jpeg_is_not_a_path():
    assert JPEG.startswith("/9j/")
    for field in ("image", "url", "path", "base64"):
        assert summary({"type": "image", field: JPEG}) == ("image", JPEG, "base64", None)
    wrapped = "\n".join(JPEG[at : at + 76] for at in range(0, len(JPEG), 76))
    assert summary({"type": "image", "image": wrapped})[2] == "base64"
    assert summary({"type": "image", "image": JPEG.replace("+", "-").replace("/", "_")})[2] == "base64"


@pytest.mark.parametrize(
    "kind", ["image", "image_url", "input_image", "image_pil", "audio", "audio_url", "input_audio"]
)
def test_a_uuid_without_content_refers_to_the_cached_item(kind):
    modality = "audio" if "audio" in kind else "image"
    expected = (modality, None, "object", "u")
    field = "image_url" if kind == "input_image" else kind
    for content in ({}, {field: None}, {field: {}}, {field: {"url": None}}, {field: {"url": None, "detail": "low"}}):
        assert summary({"type": kind, "uuid": "u", **content}) == expected
    assert summary({"type": "input_audio", "input_audio": {"data": None, "format": "wav"}, "uuid": "u"})[1] is None
    for content in ({}, {field: None}, {field: {}}, {field: {"url": None}}) if kind != "image_pil" else ():
        with pytest.raises(RequestError, match="lacks its content|null as|is an object"):
            read_part({"type": kind, **content}, allows_objects=False)


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text", "refusal"])
def test_text_in_every_form(kind):
    assert read_part({"type": kind, "refusal" if kind == "refusal" else "text": "a"}) == "a"
    assert read_part("a") == read_part({"text": "a"}) == "a"


@pytest.mark.parametrize(
    "part, named",
    [
        (5, "content part is a number; it must be a string or an object"),
        (None, "content part is null"),
        ([], "content part is a list"),
        (True, "content part is a boolean"),
        ({}, "content part of type null; allowed: text, .*image_url"),
        ({"type": 5, "text": "a"}, "content part of type a number; allowed"),
        ({"type": ["image"]}, "content part of type a list; allowed"),
        ({"type": "Image", "image": DATA}, "content part of type 'Image'; allowed"),
        ({"type": "file", "file": {"file_id": "x"}}, "content part of type 'file'; allowed"),
        ({"type": "video", "video": WEB}, "'video'; videos are not supported: send their frames"),
        ({"type": "video_url", "video_url": {"url": WEB}}, "videos are not supported"),
        ({"type": "input_video"}, "videos are not supported"),
        ({"video": [WEB, WEB]}, "videos are not supported"),
        ({"type": "image_embeds", "image_embeds": "x"}, "precomputed embeddings are not supported"),
        ({"type": "text", "text": None}, "lacks its 'text' field"),
        ({"type": "refusal", "text": "a"}, "lacks its 'refusal' field"),
        ({"type": "text", "text": {"a": 1}}, "'text' has an object; it must be a string"),
        ({"type": "image"}, "'image' lacks its content: it needs image or image_url or url or path or base64"),
        ({"type": "image", "source": {"type": "base64", "data": PNG}}, "'image' lacks its content"),
        ({"type": "input_image", "file_id": "f"}, "lacks its content: it needs image_url$"),
        ({"type": "image", "image": DATA, "url": WEB}, "'image' has image and url; send one of them"),
        ({"type": "image_url", "image_url": 5}, "is a number; it must be a string, or an object with 'url'"),
        ({"type": "image_url", "image_url": [DATA]}, "is a list; it must be a string"),
        ({"type": "image_url", "image_url": {"url": 5}}, "has a number as 'url'"),
        ({"type": "image_url", "image_url": {"uri": WEB}}, "has null as 'url'"),
        ({"type": "input_audio", "input_audio": PNG}, "is a string; it must be an object with 'data'"),
        ({"type": "input_audio", "input_audio": {"data": 5}}, "has a number as 'data'"),
        ({"type": "input_audio", "input_audio": {"url": WEB}}, "has null as 'data'"),
        ({"type": "image", "image": {"bytes": PNG}}, "has null as 'url'; it must be a URL"),
        ({"type": "image", "image": "cat.png"}, '"cat.png"; it must be a URL .*, an absolute path, or base64'),
        ({"type": "image", "url": ""}, 'url .* is ""; it must be a URL'),
        ({"type": "image", "path": "C:\\cat.png"}, "it must be a URL"),
        ({"type": "image", "path": 5}, "path .* is a number; it must be a URL"),
        ({"type": "image", "base64": {"a": 1}}, "has null as 'url'"),
        ({"type": "image_pil", "image_pil": DATA}, "is a string; use image_url"),
        ({"type": "image_url", "image_url": DATA, "uuid": 5}, "uuid 5 of a media item: it must be text"),
        ({"type": "image_url", "uuid": ""}, "uuid '' of a media item"),
    ],
)  # fmt: skip
def test_malformed_parts_are_refused_by_name(part, named):
    with pytest.raises(RequestError, match=named):
        read_part(part)


def test_no_error_speaks_of_python():
    """Every field of every type with every kind of JSON value."""
    values = json.loads('[null, true, 5, 1.5, "", "x", [], ["x"], [5], {}, {"a": 1}, {"url": 5}, {"data": []}]')
    fields = ("text", "image", "image_url", "audio", "audio_url", "input_audio", "url", "path", "base64", "image_pil")
    kinds = (
        "image",
        "image_url",
        "input_image",
        "image_pil",
        "audio",
        "audio_url",
        "input_audio",
        "text",
        "video",
        None,
    )
    messages = set()
    for kind, field, value in itertools.product(kinds, fields, values):
        try:
            read_part({"type": kind, field: value}, allows_objects=False)
        except RequestError as error:
            messages.add(str(error))
    assert len(messages) > 90
    python = re.compile(r"\b(dict|None|NoneType|tuple|PIL|array|bytes,|str|int|bool|float|load_\w+)\b")
    assert not [message for message in messages if python.search(message)]


def test_unusable_python_objects_are_named_when_they_are_decoded():
    reference = read_part({"type": "image", "image": 5})
    with pytest.raises(MediaError, match="media content is a int"):
        load_media(reference.content, expected="image")


def test_a_path_that_is_not_unicode_leads_to_no_file(tmp_path):
    for path in ("/\ud800.png", "/a/\udc80"):
        reference = read_part({"type": "image", "path": path})
        with pytest.raises(MediaError, match="leads to no regular file"):
            MediaLoader(local_path=str(tmp_path)).load_url(reference.content)
