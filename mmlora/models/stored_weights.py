"""What the weights of a checkpoint take on disk, from the headers of its safetensors files alone."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from mmlora.errors import ConfigError

MODEL_WEIGHTS_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"


def stored_bytes(model: str, revision: str | None, path: Path) -> dict[str, int]:
    """Return the bytes of a checkpoint's tensors by their type as safetensors names it (`BF16`).

    Args:
        model: directory or Hub id.
        revision: on the Hub.
        path: the local directory. For a Hub id it need not hold weights: then the Hub is asked for their headers.

    Raises:
        ConfigError: files are missing or damaged.
    """
    try:
        files = _weight_files(path)
        is_remote = not Path(model).expanduser().is_dir() and not all(file.exists() for file in files)
        tensors = _remote_tensors(model, revision) if is_remote else (t for file in files for t in _tensors(file))
        counts: Counter[str] = Counter()
        for dtype, num_bytes in tensors:
            counts[dtype] += num_bytes
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"the weights of {str(path)!r} cannot be loaded: {error}") from None
    return dict(counts)


def _weight_files(path: Path) -> list[Path]:
    index = path / INDEX_FILE
    if not index.exists():
        return [path / MODEL_WEIGHTS_FILE]
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{INDEX_FILE} names files outside of the directory")
    return [path / name for name in names]


def _tensors(file: Path) -> Iterator[tuple[str, int]]:
    """Yield type and bytes of each tensor of a file."""
    with safe_open(file, "pt"):  # checks the whole header, against the size of the file, too
        pass
    with file.open("rb") as content:
        header: dict[str, Any] = json.loads(content.read(int.from_bytes(content.read(8), "little")))
    for name, tensor in header.items():
        if name != "__metadata__":
            start, end = tensor["data_offsets"]
            yield tensor["dtype"], end - start


def _remote_tensors(model: str, revision: str | None) -> Iterator[tuple[str, int]]:
    from huggingface_hub import get_safetensors_metadata

    try:
        files = get_safetensors_metadata(model, revision=revision).files_metadata
    except Exception as error:  # the hub's errors share no base class: HTTP, parsing, connection
        raise ValueError(f"the Hub does not give their headers ({type(error).__name__}: {error})") from error
    for tensor in (tensor for file in files.values() for tensor in file.tensors.values()):
        yield tensor.dtype, tensor.data_offsets[1] - tensor.data_offsets[0]
