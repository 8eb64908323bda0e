"""`FileSource`: reads `file:` URLs of regular files under one directory."""

import os
import stat
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from mmlora.errors import ConfigError, MediaError
from mmlora.processors.media.items import MediaLimits
from mmlora.utils.text import shorten

MAX_FILE_URL_CHARS: Final = 3 * 4096  # the longest path, percent-encoded; its parts are opened one by one

_NOT_FOLLOWED: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class FileSource:
    """Reads files under one directory.

    Args:
        root: the directory; symbolic links must not lead out of it.
        limits: size limits of media.

    Raises:
        ConfigError: it is not a directory.
    """

    def __init__(self, root: str, limits: MediaLimits) -> None:
        self._root = Path(root).expanduser().resolve()
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
            with open(self._open(_path_of(url)), "rb") as file:
                content = file.read(self._limits.max_bytes + 1)
        except (OSError, ValueError):  # ValueError: a NUL in the path, a host, or a path outside
            message = f"media URL {shorten(url)} leads to no regular file under --allowed-local-media-path"
            raise MediaError(message) from None
        if len(content) > self._limits.max_bytes:
            raise MediaError(f"media URL {shorten(url)} has more than the allowed {self._limits.max_bytes} bytes")
        return content

    def _open(self, path: str) -> int:
        """Open a file by its real path, part by part, so that links created after the check are not followed."""
        parts = Path(os.path.realpath(path)).relative_to(self._root).parts
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
        ValueError: it has a host or a query, its path is not absolute, or it is too long.
    """
    if len(url) > MAX_FILE_URL_CHARS:
        raise ValueError("too long")
    parts = urlsplit(url)
    path = unquote(parts.path, errors="strict")
    if parts.netloc not in ("", "localhost") or parts.query or not path.startswith("/"):
        raise ValueError(url)
    return path
