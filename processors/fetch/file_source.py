"""`FileSource`: reads `file:` URLs of regular files under one directory.

The text of a URL decides whether it leads into the directory, before the file system is asked: neither errors nor their
timing reveal what exists elsewhere.
"""

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Final
from urllib.parse import unquote, urlsplit

from mmlora.errors import ConfigError, MediaError
from mmlora.processors.media.items import MediaLimits
from mmlora.utils.text import shorten

MAX_FILE_URL_CHARS: Final = 3 * 4096  # the longest path, percent-encoded; its parts are opened one by one
MAX_LINKS: Final = 40  # of one path, as in Linux

_NOT_FOLLOWED: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class FileSource:
    """Reads files under one directory.

    Args:
        root: the directory; URLs may contain it as given here, or its real path. Symbolic links in it are followed if
            they lead to another place in it.
        limits: size limits of media.

    Raises:
        ConfigError: it is not a directory.
    """

    def __init__(self, root: str, limits: MediaLimits) -> None:
        given = Path(root).expanduser()
        self._root = given.resolve()
        self._names = (PurePosixPath(self._root), PurePosixPath(os.path.abspath(given)))
        if not self._root.is_dir():
            raise ConfigError(f"allowed_local_media_path={root!r} is not a directory")
        self._limits = limits

    def read(self, url: str) -> bytes:
        """Read a `file:` URL.

        Raises:
            MediaError: it does not lead to a regular file under the directory (the error does not reveal whether a
                file exists elsewhere), or the file is too large.
        """
        try:
            with open(self._open(self._resolve(self._parts_of(_path_of(url)))), "rb") as file:
                content = file.read(self._limits.max_bytes + 1)
        except (OSError, ValueError):
            message = f"media URL {shorten(url)} leads to no regular file under --allowed-local-media-path"
            raise MediaError(message) from None
        if len(content) > self._limits.max_bytes:
            raise MediaError(f"media URL {shorten(url)} has more than the allowed {self._limits.max_bytes} bytes")
        return content

    def _parts_of(self, path: str) -> tuple[str, ...]:
        """Return the components of an absolute path under the directory, from its text alone.

        Raises:
            ValueError: it leads elsewhere.
        """
        clean = PurePosixPath(os.path.normpath(f"/{path.lstrip('/')}"))
        for name in self._names:
            if clean.is_relative_to(name):
                return clean.relative_to(name).parts
        raise ValueError("outside of the directory")

    def _resolve(self, parts: Sequence[str]) -> list[str]:
        """Replace symbolic links by their targets; a link that leads elsewhere is not followed.

        Raises:
            ValueError: a link leads elsewhere.
            OSError: there are too many links, or one cannot be read.
        """
        pending, resolved, num_links = [*reversed(parts)], list[str](), 0
        while pending:
            part = pending.pop()
            path = self._root.joinpath(*resolved, part)
            if not path.is_symlink():
                resolved.append(part)
                continue
            num_links += 1
            if num_links > MAX_LINKS:
                raise OSError(errno.ELOOP, "too many links")
            target = self._parts_of(os.path.join(path.parent, os.readlink(path)))
            pending, resolved = [*pending, *reversed(target)], []
        return resolved

    def _open(self, parts: Sequence[str]) -> int:
        """Open a file part by part, so that links created after `_resolve` are not followed."""
        folder = os.open(self._root, _NOT_FOLLOWED | os.O_DIRECTORY)
        try:
            for part in parts[:-1]:
                inner = os.open(part, _NOT_FOLLOWED | os.O_DIRECTORY, dir_fd=folder)
                os.close(folder)
                folder = inner
            # Non-blocking, since opening a named pipe waits for a writer.
            file = os.open(parts[-1] if parts else ".", _NOT_FOLLOWED | os.O_NONBLOCK, dir_fd=folder)
        finally:
            os.close(folder)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise ValueError("not a regular file")
        return file


def _path_of(url: str) -> str:
    """Return the path of a `file:` URL.

    Raises:
        ValueError: it has a host or a query, or its path is not absolute, contains NUL, or is too long.
    """
    if len(url) > MAX_FILE_URL_CHARS:
        raise ValueError("too long")
    parts = urlsplit(url)
    path = unquote(parts.path, errors="strict")
    if parts.netloc.lower() not in ("", "localhost") or parts.query or not path.startswith("/") or "\0" in path:
        raise ValueError(url)
    return path
