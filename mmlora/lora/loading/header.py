"""Header of a safetensors file: the names, types and shapes of its tensors, checked against the size of the file."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

MAX_HEADER_BYTES: Final = 100_000_000  # the limit of safetensors
_PREFIX_BYTES: Final = 8
_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_header(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file on the meta device: their types and shapes, without their values.

    Only the header is read, so a file of any size costs at most the memory of its header.

    Raises:
        OSError: the file cannot be read.
        ValueError: the header is invalid, or does not describe a file of this size.
    """
    with path.open("rb") as file:
        num_bytes = path.stat().st_size
        length = int.from_bytes(file.read(_PREFIX_BYTES), "little")
        allowed = min(num_bytes - _PREFIX_BYTES, MAX_HEADER_BYTES)
        if length > allowed:
            raise ValueError(f"it claims a header of {length} bytes; at most {max(0, allowed)} are possible")
        content = json.loads(file.read(length), object_pairs_hook=_unique)
    if not isinstance(content, dict):
        raise ValueError(f"its header is a {type(content).__name__}; it must be a JSON object")
    tensors = {key: _tensor(key, entry) for key, entry in content.items() if key != "__metadata__"}
    claimed, available = sum(tensor.nbytes for tensor in tensors.values()), num_bytes - _PREFIX_BYTES - length
    if claimed != available:
        raise ValueError(f"its header claims tensors of {claimed} bytes, but {available} follow")
    return tensors


def _tensor(key: str, entry: Any) -> torch.Tensor:
    dtype, shape = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else (None, None)
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"tensor {key!r} has the type {dtype!r}; allowed: {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise ValueError(f"tensor {key!r} has the shape {shape!r}; it must be a list of sizes")
    if math.prod(shape) * _DTYPES[dtype].itemsize >= 2**63:
        raise ValueError(f"tensor {key!r} has the shape {shape}, which no file can contain")
    return torch.empty(shape, dtype=_DTYPES[dtype], device="meta")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuse a duplicate key, of which readers would silently use one."""
    content = dict(pairs)
    if len(content) != len(pairs):
        ((duplicate, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"duplicate key {duplicate!r} in its header")
    return content
