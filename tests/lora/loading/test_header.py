"""Headers of safetensors files: shapes without values, and claims that do not fit the file or the model."""

from __future__ import annotations

import json
import re
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmlora.errors import AdapterError, AdapterMismatch
from mmlora.lora.loading.files import read_adapter
from mmlora.lora.loading.header import read_header
from mmlora.lora.loading.load import load_adapter
from mmlora.lora.loading.module_index import ModuleIndex

WEIGHTS = "adapter_model.safetensors"
ROW = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path: Path, header: object, num_bytes: int, length: int | None = None) -> Path:
    """Write a file with a header, followed by a hole; `length` is the length that it claims for the header."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(content) if length is None else length) + content)
        file.truncate(file.tell() + num_bytes)
    return path


def stretch(adapter: Path, rank: int) -> int:
    """Give an adapter a rank in its configuration and header, with a hole in place of the values; return its size."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "r": rank}))
    header, offset = {}, 0
    for key, tensor in load_file(adapter / WEIGHTS).items():
        shape = [rank, tensor.shape[1]] if "lora_A" in key else [tensor.shape[0], rank]
        end = offset + 4 * shape[0] * shape[1]
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    write(adapter / WEIGHTS, header, offset)
    return offset


def test_types_and_shapes_are_those_of_the_tensors(tmp_path: Path) -> None:
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    dtypes += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    saved = {f"a.{number}": torch.zeros(number, 3).to(dtype) for number, dtype in enumerate(dtypes)}
    save_file({**saved, "scalar": torch.tensor(1.0)}, tmp_path / "x", {"format": "pt"})
    found = read_header(tmp_path / "x")
    assert {key: (tensor.shape, tensor.dtype, tensor.is_meta) for key, tensor in found.items()} == {
        **{key: (tensor.shape, tensor.dtype, True) for key, tensor in saved.items()},
        "scalar": (torch.Size([]), torch.float32, True),
    }


@pytest.mark.parametrize(
    ("header", "num_bytes", "length", "message"),
    [
        (b"{}", 0, 2_000_000_000, "a header of 2000000000 bytes; at most 2 are possible"),
        (b"{}", 2_000_000_000, 1_500_000_000, "a header of 1500000000 bytes; at most 100000000 are possible"),
        (b"{}", 0, 2**64 - 1, "a header of 18446744073709551615 bytes"),
        ({"x": {**ROW, "shape": [2**30, 192]}}, 24, None, "claims tensors of 824633720832 bytes, but 24 follow"),
        ({"x": ROW}, 23, None, "claims tensors of 24 bytes, but 23 follow"),
        ({"x": ROW}, 30_000_000_000, None, "claims tensors of 24 bytes, but 30000000000 follow"),
        ({"x": {**ROW, "shape": [2**62, 2**62]}}, 24, None, "which no file can contain"),
        ({"x": {**ROW, "shape": [0, 2**70]}}, 24, None, "it must be a list of sizes"),
        ({"x": {**ROW, "shape": [2, -3]}}, 24, None, "it must be a list of sizes"),
        ({"x": {**ROW, "shape": [2, True]}}, 24, None, "it must be a list of sizes"),
        ({"x": {**ROW, "shape": "23"}}, 24, None, "it must be a list of sizes"),
        ({"x": {**ROW, "dtype": "F4"}}, 24, None, "type 'F4'; allowed: F64"),
        ({"x": {**ROW, "dtype": ["F32"]}}, 24, None, "allowed: F64"),
        ({"x": 3}, 24, None, "type None"),
        ([ROW], 24, None, "is a list; it must be a JSON object"),
        (b'{"x": {}, "x": {}}', 0, None, "duplicate key 'x'"),
        (b"\xff{}", 0, None, "is not a valid safetensors file"),
        (b"[" * 200_000, 0, None, "is not a valid safetensors file"),
    ],
)  # fmt: skip
def test_a_header_that_cannot_be_true_is_refused(
    tmp_path: Path, header: object, num_bytes: int, length: int | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Path, "read_bytes")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    write(tmp_path / WEIGHTS, header, num_bytes, length)
    with pytest.raises(AdapterError, match=re.escape(message)):
        read_adapter(tmp_path)


def test_a_file_that_does_not_fit_is_refused_before_its_values_are_read(
    tiny_llama: nn.Module, save_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Path, "read_bytes")
    index, path = ModuleIndex(tiny_llama), save_adapter(tiny_llama)
    assert stretch(path, 10**8) > 10**11
    with pytest.raises(AdapterMismatch, match="rank 100000000 of .* exceeds max_lora_rank=320"):
        load_adapter(read_adapter(path), "x", index, dtype=torch.float32, max_lora_rank=320)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "r": 320}))
    with pytest.raises(AdapterMismatch, match=r"says rank 320 for .*, but lora_A is \[100000000, "):
        load_adapter(read_adapter(path), "x", index, dtype=torch.float32)


def test_a_claimed_rank_without_tensors_of_that_rank_is_refused(tiny_llama: nn.Module, save_adapter: Any) -> None:
    for options in ({"r": 10**6}, {"rank_pattern": {"q_proj": 10**6}}):
        path = save_adapter(tiny_llama)
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps({**config, **options}))
        with pytest.raises(AdapterMismatch, match=r"says rank 1000000 for .*, but lora_A is \[4, "):
            load_adapter(read_adapter(path), "x", ModuleIndex(tiny_llama), dtype=torch.float32)


def test_a_file_that_changes_after_its_header_was_read_is_checked_again(
    tiny_llama: nn.Module, save_adapter: Any
) -> None:
    index, path = ModuleIndex(tiny_llama), save_adapter(tiny_llama)
    other = save_adapter(tiny_llama, "other", r=5)
    files = read_adapter(path)
    (path / WEIGHTS).write_bytes((other / WEIGHTS).read_bytes())
    with pytest.raises(AdapterMismatch, match=r"says rank 4 for .*, but lora_A is \[5, "):
        load_adapter(files, "x", index, dtype=torch.float32)
    files = read_adapter(other)
    (other / WEIGHTS).write_bytes(b"")
    with pytest.raises(AdapterError, match=r"\(0 bytes\) is not a valid safetensors file"):
        load_adapter(files, "x", index, dtype=torch.float32)


def test_a_duplicate_key_among_many_is_found_in_no_quadratic_time(tmp_path: Path) -> None:
    entries = [f'"k{number}": {json.dumps(ROW)}' for number in [*range(100_000), 99_999]]
    path = write(tmp_path / "x", f"{{{', '.join(entries)}}}".encode(), 0)
    start = time.monotonic()
    with pytest.raises(ValueError, match="duplicate key 'k99999'"):
        read_header(path)
    assert time.monotonic() - start < 30  # it took minutes
