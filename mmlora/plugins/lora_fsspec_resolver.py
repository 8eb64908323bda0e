"""The plugin `lora_fsspec_resolver`: adapters under any URL that fsspec reads, S3 included.

An adapter's two files are downloaded into a directory that appears whole or not at all. It is named by a hash of where
they came from and of their version, so a name that a client sends never becomes a local path.
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
from mmlora.plugins.bounds import DEFAULT_MAX_BYTES, check_size, read_max_bytes
from mmlora.plugins.threads import ResolverThreads
from mmlora.utils.environment import read_required

URL_VARIABLE = "MMLORA_LORA_RESOLVER_URL"
DOWNLOADS_VARIABLE = "MMLORA_LORA_RESOLVER_DOWNLOAD_DIR"
CHUNK_BYTES = 2**20
FIELDS = ("lora_name", "base_model_name")
# What the file systems of fsspec call the version of a file; a system that knows none gives its size alone.
VERSION_KEYS = ("size", "ETag", "etag", "VersionId", "generation", "LastModified", "last_modified", "mtime", "created")


class FsspecResolver(LoRAResolver):
    """Finds adapters under a URL, and downloads their two files.

    Args:
        url: `s3://bucket/loras`, or a template such as `s3://bucket/{base_model_name}/{lora_name}`. Credentials are
            taken from where the file system looks for them.
        downloads: local directory for the files.
        max_bytes: largest file that is downloaded.

    Raises:
        ConfigError: the URL names a local directory, no file system that is installed, or an unknown field.
    """

    def __init__(self, url: str, downloads: Path, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self._filesystem, self._template = _open_filesystem(_as_template(url))
        self._downloads = downloads.expanduser()
        self._max_bytes = max_bytes
        self._threads = ResolverThreads()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Find and download an adapter; None when one of its two files does not exist.

        Raises:
            AdapterError: a file is too large.
            ResolverError: a download was cut short, or its file cannot be written; or too many calls hang.
        """
        if not is_lora_name(lora_name):
            return None
        is_abandoned = threading.Event()
        try:
            return await self._threads.run(self._find, base_model_name, lora_name, is_abandoned)
        finally:
            is_abandoned.set()  # where nobody waits any more, the thread stops at the next chunk

    def _find(self, base_model_name: str, lora_name: str, is_abandoned: threading.Event) -> LoRARequest | None:
        # The URL is not parsed again: in a name, `::` or `?` would be read as part of its syntax.
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
                        os.fsync(local.fileno())  # else a directory could outlive a power cut, and its files not
                try:
                    partial.rename(directory)
                except OSError:
                    if not directory.is_dir():  # else another process was first
                        raise
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        except OSError as error:
            raise ResolverError(f"{self._downloads} cannot be written: {error.strerror or error}") from error

    def _read(self, name: str, source: str, size: int | None, is_abandoned: threading.Event) -> Iterator[bytes]:
        """The chunks of a remote file, not one byte more than is allowed, nor one less than there are."""
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
        ConfigError: it is not set, or cannot be used.
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
    """The file system of a URL, and the path in it. Messages do not show the URL, which may hold a password."""
    try:
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        filesystem, path = url_to_fs(template, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        remedy = "pip install 'mmlora[s3]' brings it for S3"
        raise ConfigError(f"lora_fsspec_resolver: a package is missing: {error}; {remedy}") from error
    except ValueError as error:
        raise ConfigError(f"{URL_VARIABLE}: {error}") from None
    if isinstance(filesystem, LocalFileSystem):
        raise ConfigError(f"{URL_VARIABLE} is a local directory; lora_filesystem_resolver reads those")
    return filesystem, path
