"""Plugin `lora_fsspec_resolver`: downloads adapters from any URL that fsspec supports, such as S3.

The two files of an adapter are downloaded into a directory that appears atomically. Its name is a hash of the source
and the version of the files, so a client's adapter name never becomes a local path.
"""

import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmlora.errors import ConfigError, ResolverError
from mmlora.lora.loading.files import CONFIG_FILE, WEIGHTS_FILE
from mmlora.lora.request import LoRARequest
from mmlora.lora.resolver import LoRAResolver, LoRAResolverRegistry, derive_lora_id, is_lora_name
from mmlora.plugins.limits import DEFAULT_MAX_BYTES, ResolverThreads, check_size, read_max_bytes
from mmlora.utils.environment import read_required

URL_VARIABLE = "MMLORA_LORA_RESOLVER_URL"
DOWNLOADS_VARIABLE = "MMLORA_LORA_RESOLVER_DOWNLOAD_DIR"
CHUNK_BYTES = 2**20
FIELDS = ("lora_name", "base_model_name")
# Keys for the version of a file in the file systems of fsspec; all of them report at least the size.
VERSION_KEYS = ("size", "ETag", "etag", "VersionId", "generation", "LastModified", "last_modified", "mtime", "created")


class FsspecResolver(LoRAResolver):
    """Finds adapters under a URL and downloads their two files.

    Args:
        url: `s3://bucket/loras`, or a template such as `s3://bucket/{base_model_name}/{lora_name}`. Credentials
            come from the defaults of the file system.
        downloads: local directory for the files.
        max_bytes: size limit of downloaded files.

    Raises:
        ConfigError: the URL is a local directory, or has an unknown field or a file system that is not installed.
    """

    def __init__(self, url: str, downloads: Path, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self._filesystem, self._template = _open_filesystem(_as_template(url))
        self._downloads = downloads.expanduser()
        self._max_bytes = max_bytes
        self._threads = ResolverThreads()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Download an adapter; return None when one of its two files does not exist.

        Raises:
            AdapterError: a file is too large.
            ResolverError: a download is truncated or cannot be written, or too many calls have not returned.
        """
        if not is_lora_name(lora_name):
            return None
        is_abandoned = threading.Event()
        try:
            return await self._threads.run(self._find, base_model_name, lora_name, is_abandoned)
        finally:
            is_abandoned.set()  # stops the download at its next chunk when the caller was cancelled

    def _find(self, base_model_name: str, lora_name: str, is_abandoned: threading.Event) -> LoRARequest | None:
        # The URL is not parsed again: `::` or `?` in a name would be parsed as URL syntax.
        source = self._template.replace("{base_model_name}", base_model_name).replace("{lora_name}", lora_name)
        try:
            infos = {name: self._filesystem.info(f"{source}/{name}") for name in (CONFIG_FILE, WEIGHTS_FILE)}
        except FileNotFoundError:
            return None
        version = [str(info.get(key)) for info in infos.values() for key in VERSION_KEYS]
        digest = hashlib.sha256("\0".join([self._filesystem.unstrip_protocol(source), *version]).encode())
        directory = self._downloads / digest.hexdigest()
        if not directory.is_dir():
            self._download({name: (f"{source}/{name}", infos[name]["size"]) for name in infos}, directory, is_abandoned)
        return LoRARequest(lora_name, derive_lora_id(lora_name), str(directory))

    def _download(
        self, files: dict[str, tuple[str, int | None]], directory: Path, is_abandoned: threading.Event
    ) -> None:
        try:
            self._downloads.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=self._downloads))
            try:
                for name, (source, size) in files.items():
                    with (partial / name).open("wb") as local:
                        for chunk in self._read(name, source, size, is_abandoned):
                            local.write(chunk)
                        local.flush()
                        os.fsync(local.fileno())  # else the directory could survive a power failure without its files
                try:
                    partial.rename(directory)
                except OSError:
                    if not directory.is_dir():  # else another process has finished first
                        raise
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        except OSError as error:
            raise ResolverError(f"{self._downloads} cannot be written: {error.strerror or error}") from error

    def _read(self, name: str, source: str, size: int | None, is_abandoned: threading.Event) -> Iterator[bytes]:
        """Yield the chunks of a remote file; raise when it is truncated or exceeds the size limit."""
        num_bytes = 0
        check_size(name, size or 0, self._max_bytes)
        try:
            with self._filesystem.open(source, "rb") as remote:
                while chunk := remote.read(CHUNK_BYTES):
                    num_bytes += len(chunk)
                    check_size(name, num_bytes, self._max_bytes)
                    if is_abandoned.is_set():
                        raise ResolverError(f"the download of {name} was abandoned after {num_bytes} bytes")
                    yield chunk
        except OSError as error:
            raise ResolverError(f"{name} cannot be read after {num_bytes} bytes: {error}") from error
        if size is not None and num_bytes != size:
            raise ResolverError(f"the download of {name} ended after {num_bytes} of {size} bytes")


def register() -> None:
    """Register the resolver for the URL in `MMLORA_LORA_RESOLVER_URL`.

    Raises:
        ConfigError: it is not set or cannot be used.
    """
    url = read_required(URL_VARIABLE, "a URL for lora_fsspec_resolver, such as s3://bucket/loras")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    downloads = Path(os.environ.get(DOWNLOADS_VARIABLE) or Path(cache, "mmlora", "loras"))
    LoRAResolverRegistry.register_resolver("lora_fsspec_resolver", FsspecResolver(url, downloads, read_max_bytes()))


def _as_template(url: str) -> str:
    fields = set(re.findall(r"\{(.*?)\}", url))
    if not fields <= set(FIELDS):
        raise ConfigError(f"{URL_VARIABLE}: unknown {sorted(fields - set(FIELDS))}; allowed are {', '.join(FIELDS)}")
    return url if "lora_name" in fields else url.rstrip("/") + "/{lora_name}"


def _open_filesystem(template: str) -> tuple[Any, str]:
    """Return the file system and the path of a URL. Errors do not show the URL, which may contain a password."""
    try:
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        filesystem, path = url_to_fs(template, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        remedy = "pip install 'mmlora[s3]' installs the one for S3"
        raise ConfigError(f"lora_fsspec_resolver: a package is missing: {error}; {remedy}") from error
    except ValueError as error:
        raise ConfigError(f"{URL_VARIABLE}: {error}") from None
    if isinstance(filesystem, LocalFileSystem):
        raise ConfigError(f"{URL_VARIABLE} is a local directory; use lora_filesystem_resolver instead")
    return filesystem, path
