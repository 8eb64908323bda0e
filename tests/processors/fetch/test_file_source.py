"""Media from file: URLs: only regular files under one directory."""

import os
from contextlib import suppress
from pathlib import Path

import pytest

from mmlora.errors import ConfigError, MediaError
from mmlora.processors.fetch import file_source
from mmlora.processors.fetch.file_source import FileSource
from mmlora.processors.media.items import MediaLimits
from mmlora.processors.media.loader import MediaLoader, load_media


@pytest.fixture
def png(picture, encode_image):
    return encode_image(picture())


@pytest.fixture
def root(tmp_path, png):
    """A directory with `a.png`, `sub/ü b.png` and links, next to `outside.png` and a directory with the same prefix."""
    root = tmp_path / "media"
    (root / "sub").mkdir(parents=True)
    for file in (root / "a.png", root / "sub" / "ü b.png", tmp_path / "outside.png"):
        file.write_bytes(png)
    (tmp_path / "media-private").mkdir()
    (tmp_path / "media-private" / "a.png").write_bytes(png)
    (root / "inside-link.png").symlink_to("sub/ü b.png")
    (root / "outside-link.png").symlink_to("../outside.png")
    (root / "outside-folder").symlink_to("..")
    (root / "hosts.png").symlink_to("/etc/hosts")
    os.mkfifo(root / "pipe.png")
    return root


@pytest.mark.parametrize(
    "path",
    ["/a.png", "/sub/%C3%BC%20b.png", "/sub/../a.png", "/sub/ü b.png", "/inside-link.png", "//a.png", "/./a.png"],
)
def test_files_in_the_directory_are_read(root, png, path):
    loader = MediaLoader(local_path=str(root))
    for url in (f"file://{root}{path}", f"FILE:{root}{path}", f"file://localhost{root}{path}"):
        assert loader.load_url(url).content_hash == load_media(png).content_hash


@pytest.mark.parametrize(
    "url",
    [
        "file://{root}/../outside.png", "file://{root}/%2e%2e/outside.png", "file://{root}/%2E%2E%2Foutside.png",
        "file://{root}/sub/..%2f..%2foutside.png", "file://{root}/..\\outside.png", "file://{root}/../media-private/a.png",
        "file://{root}-private/a.png", "file://{root}/outside-link.png", "file://{root}/outside-folder/outside.png",
        "file://{root}/hosts.png", "file:///etc/passwd", "file:///etc/../etc/passwd", "file:///dev/zero",
        "file:///proc/self/environ", "file://{root}/pipe.png", "file://{root}/sub", "file://{root}", "file:///",
        "file://{root}/a.png%00.txt", "file://{root}/missing.png", "file://{root}/" + "a/" * 20000, "file://{root}/a.png/b",
        "file:a.png", "file:", "file://example.com{root}/a.png", "file://127.0.0.1{root}/a.png", "file://{root}/a.png?x",
        "file://{root}/%ff%fe.png", "file://{root}/" + "a" * 300, "file://[", "file://{root}/%2522a.png",
    ],
)  # fmt: skip
def test_all_other_urls_are_refused_with_the_same_message(root, url):
    url = url.format(root=root)
    with pytest.raises(MediaError) as refusal:
        MediaLoader(local_path=str(root)).load_url(url)
    assert str(refusal.value).endswith("leads to no regular file under --allowed-local-media-path")


def test_devices_under_the_directory_are_refused():
    for url in ("file:///dev/zero", "file:///dev/tty", "file:///dev/null"):
        with pytest.raises(MediaError, match="no regular file"):
            FileSource("/dev", MediaLimits()).read(url)


def test_without_a_directory_no_file_is_read(root):
    with pytest.raises(MediaError, match="file: URLs are not allowed; --allowed-local-media-path"):
        MediaLoader().load_url(f"file://{root}/a.png")


@pytest.mark.parametrize("swapped", ["sub", "sub/file.png"])
def test_a_link_created_after_the_check_is_not_followed(root, png, monkeypatch, swapped):
    """After the check of the path, the file or a parent directory becomes a link to another place."""
    (root / "sub" / "file.png").write_bytes(png)
    (root.parent / "file.png").write_bytes(png)
    realpath = os.path.realpath

    def look_and_swap(path):
        found = realpath(path)
        place = root / swapped
        place.rename(root / "moved")
        place.symlink_to(root.parent if swapped == "sub" else root.parent / "file.png")
        return found

    source = FileSource(str(root), MediaLimits())
    monkeypatch.setattr(file_source.os.path, "realpath", look_and_swap)
    with pytest.raises(MediaError, match="no regular file"):
        source.read(f"file://{root}/sub/file.png")


def test_content_is_limited_and_not_quoted(root):
    (root / "big.png").write_bytes(bytes(2000))
    (root / "secret.txt").write_text("the secret word")
    loader = MediaLoader(MediaLimits(max_bytes=1000), local_path=str(root))
    with pytest.raises(MediaError, match="more than the allowed 1000 bytes"):
        loader.load_url(f"file://{root}/big.png")
    with pytest.raises(MediaError, match="neither audio nor an image") as refusal:
        loader.load_url(f"file://{root}/secret.txt")
    assert "the secret word" not in str(refusal.value)


def test_reading_leaves_no_descriptor_open(root):
    source = FileSource(str(root), MediaLimits())
    before = len(os.listdir("/proc/self/fd"))
    for path in ("a.png", "sub/ü b.png", "pipe.png", "sub", "missing"):
        for _ in range(5):
            with suppress(MediaError):
                source.read(f"file://{root}/{path}")
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_directory_must_exist(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "missing"):
        with pytest.raises(ConfigError, match="is not a directory"):
            FileSource(str(path), MediaLimits())
    (tmp_path / "link").symlink_to("/tmp")
    assert FileSource(str(tmp_path / "link"), MediaLimits())._root == Path("/tmp").resolve()
