"""Find an adapter's directory and read its tensors: local paths, Hub ids, safetensors only."""

import re
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from mmlora.errors import AdapterError, AdapterNotFound
from mmlora.lora.peft_config import CONFIG_FILE

WEIGHTS_FILE: Final = "adapter_model.safetensors"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


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
