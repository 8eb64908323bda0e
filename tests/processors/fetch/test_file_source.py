"""Media from file: URLs: only regular files under one directory."""

import os
from contextlib import suppress
from pathlib import Path

import pytest

from mmlora.errors import ConfigError, MediaError
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
    (root / "absolute-link.png").symlink_to(root / "a.png")
    (root / "sub" / "up").symlink_to("..")
    (root / "sub" / "around.png").symlink_to("../../media/a.png")
    (root / "chain").symlink_to("sub/up/sub")
    (root / "loop").symlink_to("loop")
    (root / "proc").symlink_to("/proc/self/root")
    (root / "dangling.png").symlink_to("missing.png")
    (root / "hosts.png").symlink_to("/etc/hosts")
    os.mkfifo(root / "pipe.png")
    return root


@pytest.mark.parametrize(
    "path",
    [
        "/a.png", "/sub/%C3%BC%20b.png", "/sub/../a.png", "/sub/ü b.png", "/inside-link.png", "//a.png", "/./a.png",
        "/%61.png", "/sub%2f..%2fa.png", "/missing/../a.png", "/../media/a.png", "/absolute-link.png", "/sub/up/a.png",
        "/sub/around.png", "/chain/up/chain/ü b.png", "/a.png#fragment",
    ],
)  # fmt: skip
def test_files_in_the_directory_are_read(root, png, path):
    loader = MediaLoader(local_path=str(root))
    for start in ("file://", "FILE:", "file://localhost", "file://LOCALHOST", "file:///"):
        url = f"{start}{root}{path}"
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
        "file://{root}/loop", "file://{root}/loop/a.png", "file://{root}/proc{root}/a.png", "file://{root}/dangling.png",
        "file://{root}/sub/up/../../outside.png", "file://{root}/chain/../../outside.png",
    ],
)  # fmt: skip
def test_all_other_urls_are_refused_with_the_same_message(root, url):
    url = url.format(root=root)
    with pytest.raises(MediaError) as refusal:
        MediaLoader(local_path=str(root)).load_url(url)
    assert str(refusal.value).endswith("leads to no regular file under --allowed-local-media-path")


OUTSIDE = [
    "/", "//", "/etc/passwd", "/etc/missing", "/dev/zero", "/root", "/proc/self/cwd/a.png", "/proc/1/root{root}/a.png",
    "/proc/self/root{root}/a.png", "/proc/self/fd/0", "/bin/sh/..{root}/../a.png", "{root}/../outside.png",
    "{root}/%2e%2e/outside.png", "{root}/..%2f..%2foutside.png", "{root}/sub/..%2F../../outside.png",
    "{root}-private/a.png", "/tmp{root}/a.png", "{root}/../media-private/../outside.png", "{root}/a.png%00",
    "{root}/%00", "{root}/sub/%00/a.png", "/.{root}x/a.png", "{root}/..", "{root}/../..", "/%2e%2e/etc/passwd",
    "/C:/Windows/win.ini", "/C|/a.png", "\\\\host\\a.png",
]  # fmt: skip
HOSTS = ["example.org", "127.0.0.1", "localhost.", "localhost:80", "user@localhost", "%6cocalhost", "C:", ".", "[::1]"]


@pytest.mark.parametrize(
    "url", [f"file://{path}" for path in OUTSIDE] + [f"file://{host}{{root}}/a.png" for host in HOSTS]
)
def test_the_file_system_is_not_asked_about_other_places(root, url, monkeypatch):
    """Neither errors nor timing reveal what exists there."""
    source, asked = FileSource(str(root), MediaLimits()), []
    for name in ("open", "stat", "lstat", "readlink", "access", "listdir", "scandir", "getcwd", "fstat"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, real=real, **options: asked.append(args) or real(*args, **options))
    with pytest.raises(MediaError, match="leads to no regular file under --allowed-local-media-path$"):
        source.read(url.format(root=root))
    assert asked == []
    with suppress(MediaError):
        source.read(f"file://{root}/a.png")
    assert asked, "the functions are watched"


@pytest.mark.parametrize("path", ["proc/etc/passwd", "outside-folder/outside.png", "hosts.png", "outside-link.png"])
def test_links_that_lead_elsewhere_are_not_followed(root, path, monkeypatch):
    """Only the link is read, in the directory."""
    source, asked = FileSource(str(root), MediaLimits()), []
    for name in ("open", "stat", "lstat", "readlink"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda place, *args, real=real, **options: asked.append(place) or real(place, *args, **options)
        )
    with pytest.raises(MediaError):
        source.read(f"file://{root}/{path}")
    assert {Path(place) for place in asked} == {root / path.partition("/")[0]}


def test_the_directory_may_be_named_by_a_link_or_by_its_real_path(root, png, tmp_path, monkeypatch):
    (tmp_path / "named").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    for given in ("named", str(tmp_path / "named"), f"{tmp_path}/media/../named/"):
        source = FileSource(given, MediaLimits())
        for place in (root, tmp_path / "named", tmp_path / "x" / ".." / "named"):
            assert source.read(f"file://{place}/a.png") == png
    with pytest.raises(MediaError):  # only the names that were given
        FileSource(str(root), MediaLimits()).read(f"file://{tmp_path}/named/a.png")


def test_a_file_without_permission_is_like_a_missing_one(root, monkeypatch):
    def refuse(path, *args, real=os.open, **options):
        if path in ("a.png", "sub"):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *args, **options)

    source = FileSource(str(root), MediaLimits())
    monkeypatch.setattr(os, "open", refuse)
    messages = set()
    for path in ("a.png", "sub/ü b.png", "missing.png", "pipe.png", ""):
        with pytest.raises(MediaError) as refusal:
            source.read(f"file://{root}/{path}")
        messages.add(str(refusal.value).partition(" leads ")[2])
    assert messages == {"to no regular file under --allowed-local-media-path"}


@pytest.mark.parametrize("num_links, is_read", [(40, True), (41, False)])
def test_the_number_of_links_is_limited(root, png, num_links, is_read):
    for index in range(num_links):
        (root / f"link{index}").symlink_to(f"link{index + 1}" if index < num_links - 1 else "a.png")
    source = FileSource(str(root), MediaLimits())
    if is_read:
        assert source.read(f"file://{root}/link0") == png
    else:
        with pytest.raises(MediaError, match="no regular file"):
            source.read(f"file://{root}/link0")


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
    resolve = FileSource._resolve

    def look_and_swap(self, parts):
        found = resolve(self, parts)
        place = root / swapped
        place.rename(root / "moved")
        place.symlink_to(root.parent if swapped == "sub" else root.parent / "file.png")
        return found

    source = FileSource(str(root), MediaLimits())
    monkeypatch.setattr(FileSource, "_resolve", look_and_swap)
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
