"""Corrupt and hostile adapters: only named errors, no code executed, nothing left behind.

Each case damages the files of a good adapter. It must then load completely or raise an `AdapterError`.
"""

import json
import os
import pickle
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmlora import LLM, LoRARequest
from mmlora.errors import AdapterError
from mmlora.lora.loading.files import read_adapter
from mmlora.lora.loading.load import load_adapter
from mmlora.lora.loading.module_index import ModuleIndex
from tests.checkpoints import AdapterSpec, save_adapter, save_text_model
from tests.equality import greedy

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Damage = Callable[[Path, random.Random], None]


def _edit_bytes(change: Callable[[bytearray, random.Random], object]) -> Damage:
    def damage(path: Path, rng: random.Random) -> None:
        content = bytearray((path / WEIGHTS).read_bytes())
        change(content, rng)
        (path / WEIGHTS).write_bytes(content)

    return damage


def _edit_header(change: Callable[[dict[str, Any], random.Random], object]) -> Damage:
    def damage(path: Path, rng: random.Random) -> None:
        content = (path / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change(header, rng)
        text = json.dumps(header).encode()
        (path / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return damage


def _edit_tensors(change: Callable[[dict[str, torch.Tensor], random.Random], object]) -> Damage:
    def damage(path: Path, rng: random.Random) -> None:
        tensors = load_file(path / WEIGHTS)
        change(tensors, rng)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path / WEIGHTS)

    return damage


def _edit_config(change: Callable[[dict[str, Any], random.Random], object]) -> Damage:
    def damage(path: Path, rng: random.Random) -> None:
        content = json.loads((path / CONFIG).read_text())
        change(content, rng)
        (path / CONFIG).write_text(json.dumps(content))

    return damage


def _any_key(mapping: dict[str, Any], rng: random.Random) -> str:
    return rng.choice(sorted(key for key in mapping if key != "__metadata__"))


def _flip(content: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 20)):
        content[rng.randrange(len(content))] = rng.randrange(256)


def _set_shape(header: dict[str, Any], rng: random.Random) -> None:
    shapes = [[], [0], [2**40, 2**40], [-1, 4], [4.5], "4", None, [1] * 100, [2**63]]
    header[_any_key(header, rng)]["shape"] = rng.choice(shapes)


def _set_offsets(header: dict[str, Any], rng: random.Random) -> None:
    header[_any_key(header, rng)]["data_offsets"] = rng.choice([[0, 2**62], [-4, 4], [8, 0], [0], "x", None])


def _set_dtype(header: dict[str, Any], rng: random.Random) -> None:
    header[_any_key(header, rng)]["dtype"] = rng.choice(["F64", "I8", "BOOL", "F8_E4M3", "U16", "C64", "XX", 3, None])


def _change_tensor(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    key = _any_key(tensors, rng)
    tensor = tensors[key]
    tensors[key] = rng.choice(
        [
            tensor[:, :-1],
            tensor[None],
            tensor.flatten(),
            torch.zeros(0, 4),
            tensor.new_tensor(1.0),
            tensor.to(torch.int32),
            tensor.bool(),
            tensor.to(torch.complex64),
            tensor.to(torch.float8_e4m3fn),
            tensor * torch.nan,
            tensor / 0,
            tensor.double() * 1e300,
        ]
    )


def _rename_tensor(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    key = _any_key(tensors, rng)
    names = ["", ".", "..", "../../x", "a" * 10_000, "base_model.model.", f"{key}.lora_A.weight", "\0", "lora_A.weight"]
    tensors[rng.choice([*names, key.replace("layers.0", "layers.99"), key.upper()])] = tensors.pop(key)


def _any_value(content: dict[str, Any], rng: random.Random) -> None:
    values: list[Any] = [None, True, -1, 0, 1e400, 2**70, "", "(", [], [[]], {}, {"a": []}, "\ud800", [None], ["*"]]
    content[rng.choice(sorted(content))] = rng.choice(values)


def _break_json(path: Path, rng: random.Random) -> None:
    choices = ["", "{", "null", "[" * 200_000, '{"r": NaN}', '{"r": 1, "r": 2}', "\xff\xfe", '{"peft_type": "LORA"}']
    (path / CONFIG).write_text(rng.choice(choices), encoding="latin-1")


def _no_file(path: Path, rng: random.Random) -> None:
    """Replace a file by something that must not be read, or that never ends."""
    target = path / rng.choice([WEIGHTS, CONFIG])
    target.unlink()
    kind = rng.randrange(5)
    if kind == 0:
        target.mkdir()
    elif kind == 1:
        os.mkfifo(target)
    elif kind == 2:
        target.symlink_to("/dev/zero")
    elif kind == 3:
        target.symlink_to(target)
    # else: leave the file missing


DAMAGES: dict[str, Damage] = {
    "cut": _edit_bytes(lambda content, rng: content.__delitem__(slice(rng.randrange(len(content)), None))),
    "flipped bytes": _edit_bytes(_flip),
    "header length": _edit_bytes(
        lambda content, rng: content.__setitem__(
            slice(0, 8), struct.pack("<Q", rng.choice([0, 1, 2**31, 2**63, 2**64 - 1]))
        )
    ),
    "appended bytes": _edit_bytes(lambda content, rng: content.extend(rng.randbytes(rng.randint(1, 1000)))),
    "shapes": _edit_header(_set_shape),
    "offsets": _edit_header(_set_offsets),
    "dtypes": _edit_header(_set_dtype),
    "metadata": _edit_header(
        lambda header, rng: header.update(__metadata__=rng.choice([{"a": 1}, [], "x", {"a": {}}]))
    ),
    "tensors": _edit_tensors(_change_tensor),
    "names": _edit_tensors(_rename_tensor),
    "no tensors": _edit_tensors(lambda tensors, rng: tensors.clear()),
    "config values": _edit_config(_any_value),
    "config keys": _edit_config(lambda content, rng: content.pop(rng.choice(sorted(content)))),
    "unknown key": _edit_config(lambda content, rng: content.update(**{rng.choice(["x", "R", ""]): rng.random()})),
    "json": _break_json,
    "no file": _no_file,
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("fuzz")
    model = save_text_model(folder / "model", "llama")
    return model, save_adapter(model, folder / "good", AdapterSpec(("q_proj", "down_proj"), 1))


@pytest.fixture(scope="module")
def index(good: tuple[Path, Path]) -> ModuleIndex:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(good[0])
    return ModuleIndex(model)


@pytest.mark.parametrize("num_cases", [12, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files(
    good: tuple[Path, Path], index: ModuleIndex, tmp_path: Path, damage: str, num_cases: int
) -> None:
    outcomes = set()
    for seed in range(num_cases):
        rng = random.Random(f"{damage} {seed}")
        path = Path(shutil.copytree(good[1], tmp_path / str(seed)))
        DAMAGES[damage](path, rng)
        try:
            adapter = load_adapter(read_adapter(path), "x", index, dtype=torch.float32)
        except AdapterError as error:
            assert str(error)
            outcomes.add("refused")
        else:  # the damage was harmless or changed only values
            assert adapter.report.matched == 6 and not adapter.report.unmatched
            assert all(bool(torch.isfinite(t).all()) for w in adapter.modules.values() for _, t in w.tensors)
            outcomes.add("loaded")
        shutil.rmtree(path)
    assert "refused" in outcomes or damage == "config keys"  # most keys have defaults


def test_a_duplicate_key_is_refused(good: tuple[Path, Path], index: ModuleIndex, tmp_path: Path) -> None:
    """JSON allows duplicate keys; a reader that uses the last one would load values that other tools do not show."""
    path = Path(shutil.copytree(good[1], tmp_path / "twice"))
    content = (path / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].decode().rstrip()
    entry = re.search(rf'"{re.escape(KEY)}":\{{.*?\}}', header)
    assert entry is not None
    text = f"{header[:-1]},{entry[0]}}}".encode()
    (path / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    with pytest.raises(AdapterError, match="safetensors"):
        load_adapter(read_adapter(path), "x", index, dtype=torch.float32)


class _Bomb:
    """Object that writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return _explode, (str(self._target),)


def _explode(target: str) -> None:
    Path(target).write_text("executed")


@pytest.mark.parametrize("file", ["adapter_model.bin", "adapter_model.pt", "pytorch_model.bin", WEIGHTS])
def test_pickled_files_are_never_opened(good: tuple[Path, Path], tmp_path: Path, file: str) -> None:
    path = Path(shutil.copytree(good[1], tmp_path / "adapter"))
    (path / WEIGHTS).unlink()
    (path / file).write_bytes(pickle.dumps(_Bomb(tmp_path / "boom")))
    pickle.loads((path / file).read_bytes())  # proves that the object works
    (tmp_path / "boom").unlink()
    with pytest.raises(AdapterError):
        read_adapter(path)
    assert not (tmp_path / "boom").exists()


NAMES = ["../../etc/passwd", "a/../../b", "/etc/passwd", "a\0b", "x" * 10_000, "..", ".", "con\n", "{}", "%s%n"]


def test_the_engine_survives_and_keeps_nothing(good: tuple[Path, Path], tmp_path: Path) -> None:
    model, adapter = good
    llm = LLM(str(model), enable_lora=True, max_loras=2, dtype="float32", device="cpu", max_model_len=64)
    request = LoRARequest("good", 1, str(adapter))
    (before,) = llm.generate("abc", greedy(), request, use_tqdm=False)
    known = {name.lora_name for name in _known(llm)}
    for number, damage in enumerate(DAMAGES, start=2):
        path = Path(shutil.copytree(adapter, tmp_path / str(number)))
        rng = random.Random(f"{damage} 0")
        DAMAGES[damage](path, rng)
        try:
            llm.generate("abc", greedy(), LoRARequest(damage, number, str(path)), use_tqdm=False)
            known.add(damage)
        except AdapterError as error:
            assert damage in str(error) or str(path) in str(error)
    for number, name in enumerate(NAMES, start=100):  # a name is never used as a path; invalid paths are refused
        (named,) = llm.generate("abc", greedy(), LoRARequest(name, number, str(adapter)), use_tqdm=False)
        assert named.outputs[0].token_ids == before.outputs[0].token_ids
        known.add(name)
        with pytest.raises(AdapterError):
            llm.generate("abc", greedy(), LoRARequest(f"at {name}", 1000 + number, name), use_tqdm=False)
    (after,) = llm.generate("abc", greedy(), request, use_tqdm=False)
    assert after.outputs[0].token_ids == before.outputs[0].token_ids
    assert {name.lora_name for name in _known(llm)} == known


def _known(llm: LLM) -> list[LoRARequest]:
    host_cache = llm.llm_engine.host_cache
    assert host_cache is not None
    return [entry.request for entry in host_cache.entries]
