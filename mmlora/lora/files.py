"""Find an adapter's directory and read its tensors: local paths, Hub ids, safetensors only."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from mmlora.errors import AdapterError, AdapterMismatch, AdapterNotFound

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter consists of, read from a directory or given in memory.

    Attributes:
        config: the parsed `adapter_config.json`.
        tensors: by their keys in the file.
        path: the directory it was read from; None for an adapter from memory.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    path: Path | None = None

    @property
    def origin(self) -> str:
        """Where it came from, for messages."""
        return "memory" if self.path is None else str(self.path)


def read_adapter(directory: Path) -> AdapterFiles:
    """Read both files of an adapter directory.

    Raises:
        AdapterNotFound: a file is missing.
        AdapterMismatch: the configuration is not a JSON object.
        AdapterError: the tensors are truncated or corrupt.
    """
    return AdapterFiles(_read_config(directory / CONFIG_FILE), read_tensors(directory), directory)


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterNotFound(f"no {CONFIG_FILE} in {path.parent}; a PEFT directory has one") from None
    except (ValueError, OSError, RecursionError) as error:
        raise AdapterMismatch(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise AdapterMismatch(f"{path} holds a {type(content).__name__}; it must be a JSON object")
    return content


def resolve_adapter_path(path: str | Path) -> Path:
    """Return the directory of an adapter.

    Args:
        path: a directory (`~` and relative paths are resolved), else a Hub id, of which only the adapter's two files
            are fetched.

    Raises:
        AdapterNotFound: neither exists; the message names what was tried.
    """
    try:
        directory = Path(path).expanduser()
        if directory.is_dir():
            return directory.resolve()
        exists = directory.exists()
    except (RuntimeError, OSError, ValueError) as error:
        raise AdapterNotFound(f"adapter path {str(path)!r} cannot be used: {error}") from None
    if exists:
        raise AdapterNotFound(f"adapter path {str(path)!r} is a file; it must be a PEFT directory or a Hub id")
    if not _HUB_ID.fullmatch(str(path)):
        raise AdapterNotFound(
            f"adapter path {str(path)!r} is no directory (tried {directory.absolute()}) and no Hub id"
        )
    return _download(str(path), directory.absolute())


def _download(repo_id: str, tried: Path) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except Exception as error:  # the hub's errors share no base class: HTTP, validation, cache, connection
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise AdapterNotFound(f"adapter {repo_id!r}: no directory {tried}, and not on the Hub ({reason})") from error


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of an adapter into memory of our own, so that a later change of the file changes nothing here.

    Raises:
        AdapterNotFound: there is no safetensors file.
        AdapterError: it is truncated or corrupt.
    """
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        pickled = sorted(file.name for file in directory.glob("adapter_model*") if file.name != WEIGHTS_FILE)
        found = f"; {', '.join(pickled)} cannot be used: only safetensors is read" if pickled else ""
        raise AdapterNotFound(f"no {WEIGHTS_FILE} in {directory}{found}")
    try:
        return load_safetensors(path.read_bytes())
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise AdapterError(f"{path} ({path.stat().st_size} bytes) is no valid safetensors file: {error}") from None
