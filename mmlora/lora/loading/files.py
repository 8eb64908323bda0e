"""Files of a PEFT adapter: from a local directory, the Hub or memory. Only safetensors is read."""

import errno
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from mmlora.errors import AdapterError, AdapterMismatch, AdapterNotFound, ResolverError
from mmlora.lora.loading.header import read_header
from mmlora.utils.text import shorten

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
METHOD: Final = "LORA"
MAX_CONFIG_BYTES: Final = 2**24
DISK_ERRORS: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)

# No segment starts with a dot, so that neither folder nor revision can leave the Hub's cache.
_PATH_SEGMENT: Final = r"[A-Za-z0-9_][\w.+-]*"
_HUB_PATH: Final = re.compile(
    rf"(?P<repo>{_PATH_SEGMENT}(/{_PATH_SEGMENT})?)(?P<folder>(/{_PATH_SEGMENT})*)(@(?P<revision>{_PATH_SEGMENT}(/{_PATH_SEGMENT})*))?"
)


@dataclass(frozen=True)
class AdapterFiles:
    """Content of an adapter, from a directory or from memory.

    Attributes:
        config: the parsed `adapter_config.json`.
        outline: by the keys of the file: the tensors, or for an adapter from a directory their types and shapes, on the
            meta device.
        path: the directory it was read from; None for an adapter from memory.
        given_path: the path or Hub id that was asked for, which may be relative.
        weights_file: contains the tensors of the outline; None if the outline has their values.
    """

    config: Mapping[str, Any]
    outline: Mapping[str, torch.Tensor]
    path: Path | None = None
    given_path: str | None = None
    weights_file: Path | None = None

    @cached_property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """By the keys of the file; read at the first access.

        Raises:
            AdapterError: the file is corrupt, or was changed since its header was read.
        """
        return self.outline if self.weights_file is None else _read_tensors(self.weights_file, self.origin)

    @property
    def origin(self) -> str:
        """Where it is from, for messages: the path as it was given, so that clients learn nothing of the server."""
        return self.given_path or ("memory" if self.path is None else str(self.path))


def files_from_memory(config: object, tensors: object) -> AdapterFiles:
    """Copy an adapter from memory, so that it is not changed when training continues.

    Args:
        config: content of `adapter_config.json`, or PEFT's `LoraConfig`.
        tensors: by the keys of `adapter_model.safetensors`, on any device.

    Raises:
        AdapterError: one of them is missing or has the wrong type.
    """
    if not isinstance(config, Mapping) and hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise AdapterError(f"config is a {type(config).__name__}; it must be a mapping or PEFT's LoraConfig")
    if not isinstance(tensors, Mapping):
        raise AdapterError(f"tensors is a {type(tensors).__name__}; it must map keys to tensors")
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise AdapterError(f"tensors[{key!r}] is a {type(tensor).__name__}; it must map names to tensors")
    try:
        content = json.loads(json.dumps(dict(config), default=_as_json))
    except (TypeError, ValueError, RecursionError) as error:
        raise AdapterError(f"config cannot be written as JSON: {error}") from None
    return AdapterFiles(content, {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()})


def read_adapter(directory: Path, given_path: str | None = None) -> AdapterFiles:
    """Read the configuration of an adapter directory, and the header of its tensors.

    Args:
        directory: see `resolve_adapter_path`.
        given_path: what it was resolved from, named in errors; by default the directory.

    Raises:
        AdapterNotFound: a file is missing.
        AdapterMismatch: the configuration is not a JSON object, or is that of another PEFT method whose tensors cannot
            be read.
        AdapterError: the file of the tensors is truncated, or its header is invalid.
    """
    shown = given_path or str(directory)
    config = _read_config(directory / CONFIG_FILE, shown)
    try:
        path = _find_tensors(directory, shown)
        return AdapterFiles(config, _read_outline(path, shown), directory, given_path, path)
    except AdapterError:
        reason = method_refusal(config)
        if reason is None:
            raise
        raise AdapterMismatch(f"{shown}: {CONFIG_FILE}: {reason}") from None


def method_refusal(config: Mapping[str, Any]) -> str | None:
    """Return why a configuration is not that of a LoRA adapter; None when it is."""
    if "peft_type" not in config:
        return f"there is no peft_type; allowed: {METHOD}"
    method = config["peft_type"]
    if method == METHOD:
        return None
    is_name = isinstance(method, str) and method.isidentifier()
    hint = " (in upper case)" if is_name and method.upper() == METHOD else ""
    return f"peft_type {shorten(method, str if is_name else repr)} is not supported; allowed: {METHOD}{hint}"


def _find_tensors(directory: Path, shown: str) -> Path:
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        pickled = sorted(file.name for file in directory.glob("adapter_model*") if file.name != WEIGHTS_FILE)
        found = f"; {', '.join(pickled)} cannot be used: only safetensors is read" if pickled else ""
        raise AdapterNotFound(f"no {WEIGHTS_FILE} in {shown}{found}")
    return path


def _read_outline(path: Path, shown: str) -> Mapping[str, torch.Tensor]:
    try:
        return read_header(path)
    except (OSError, ValueError, RecursionError) as error:
        raise _invalid(path, shown, error) from None


def _read_tensors(path: Path, shown: str) -> Mapping[str, torch.Tensor]:
    """Read all tensors into memory, without a memory map, so that later changes of the file are not seen."""
    try:
        return load_safetensors(path.read_bytes())
    except (SafetensorError, OSError, ValueError, KeyError, MemoryError) as error:
        raise _invalid(path, shown, error) from None


def _invalid(path: Path, shown: str, error: Exception) -> AdapterError:
    size = f" ({path.stat().st_size} bytes)" if path.is_file() else ""
    return AdapterError(f"{shown}/{WEIGHTS_FILE}{size} is not a valid safetensors file: {reason_of(error)}")


def reason_of(error: Exception) -> str:
    """Return the text of an error without the file name that the operating system adds."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def resolve_adapter_path(path: str | Path) -> Path:
    """Return the directory of an adapter.

    Args:
        path: a directory (`~` and relative paths are resolved), else `org/repo` or `org/repo/subfolder` on the Hub,
            either with `@revision`; only the adapter's two files are downloaded.

    Raises:
        AdapterNotFound: neither exists; the message names the path as it was given, never what it was resolved to.
        ResolverError: the download cannot be written to disk.
    """
    try:
        directory = Path(path).expanduser()
        if directory.is_dir():
            return directory.resolve()
        exists = directory.exists()
        has_revision = "@" in str(path) and Path(str(directory).rpartition("@")[0]).is_dir()
    except (RuntimeError, OSError, ValueError) as error:
        raise AdapterNotFound(f"adapter path {str(path)!r} cannot be used: {reason_of(error)}") from None
    if exists:
        raise AdapterNotFound(f"adapter path {str(path)!r} is a file; it must be a PEFT directory or a Hub id")
    if has_revision:
        unversioned = str(path).rpartition("@")[0]
        raise AdapterNotFound(f"adapter path {str(path)!r}: {unversioned} is a directory, which has no revisions")
    match = _HUB_PATH.fullmatch(str(path))
    if match is None:
        raise AdapterNotFound(
            f"adapter path {str(path)!r} is neither a directory nor a Hub id; allowed are a directory, org/repo and "
            "org/repo/subfolder, the last two also with @revision"
        )
    return _download(match)


def _download(match: re.Match[str]) -> Path:
    from huggingface_hub import snapshot_download

    folder = match["folder"].strip("/")
    patterns = [f"{folder}/{name}" if folder else name for name in (CONFIG_FILE, WEIGHTS_FILE)]
    try:
        snapshot = snapshot_download(match["repo"], revision=match["revision"], allow_patterns=patterns)
    except Exception as error:  # huggingface_hub has no common base class: HTTP, validation, cache, connection
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise ResolverError(f"adapter {match[0]!r} cannot be downloaded: {error.strerror}") from error
        reason = f"{type(error).__name__}: {reason_of(error)}".splitlines()[0]
        raise AdapterNotFound(
            f"adapter {match[0]!r}: no directory of this name, and not on the Hub ({reason})"
        ) from error
    directory = Path(snapshot) / folder
    if not directory.is_dir():
        raise AdapterNotFound(f"adapter {match[0]!r}: {match['repo']} on the Hub has no adapter in {folder!r}")
    return directory


def _read_config(path: Path, shown: str | None = None) -> Mapping[str, Any]:
    shown = shown or str(path.parent)
    if not path.is_file():
        raise AdapterNotFound(f"no {CONFIG_FILE} in {shown}; a PEFT directory has one")
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes; the limit is {MAX_CONFIG_BYTES}")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise AdapterMismatch(f"{shown}/{CONFIG_FILE} cannot be read as JSON: {reason_of(error)}") from None
    if not isinstance(content, dict):
        raise AdapterMismatch(f"{shown}/{CONFIG_FILE} contains a {type(content).__name__}; it must be a JSON object")
    return content


def _as_json(value: object) -> object:
    """Return a set as a list: PEFT's configuration has sets where its file has lists."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{value!r} has no JSON form")
