"""Failures keep the previous state and raise a named error; the registry restores adapters or reports why not."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmlora import LoRARequest
from mmlora.errors import AdapterError, AdapterMismatch, AdapterNotFound, ConfigError
from mmlora.lora.layers.linear import LoRALinear
from tests.engine.lifecycle import GREEDY, PROMPT, Contents, bytes_of, finish, make_contents, start, tokens


@pytest.fixture(scope="module")
def contents(text_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Contents:
    return make_contents(text_checkpoint("llama"), tmp_path_factory.mktemp("contents"))


def poison(path: Path, _: Any) -> None:
    file = path / "adapter_model.safetensors"
    save_file({key: torch.full_like(tensor, torch.nan) for key, tensor in load_file(file).items()}, file)


def cut(path: Path, _: Any) -> None:
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def take_away(path: Path, _: Any) -> None:
    shutil.rmtree(path)


def fail_to_read(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_bytes(path: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", read_bytes)


@pytest.mark.parametrize(
    ("damage", "kind"),
    [(poison, AdapterMismatch), (cut, AdapterError), (take_away, AdapterNotFound), (fail_to_read, AdapterError)],
)
def test_a_failed_load_leaves_the_previous_state(
    contents: Contents, tmp_path: Path, monkeypatch: Any, damage: Any, kind: Any
) -> None:
    engine = start(contents.model).llm_engine
    path = contents.write(tmp_path / "a", 0)
    a = engine.add_lora("a", str(path))
    engine.add_request("before", PROMPT, GREEDY, a)
    engine.step()
    with monkeypatch.context() as patch:
        damage(path, patch)
        before = engine.list_loras(), engine.lora.cache.num_bytes, engine.lora.num_device_bytes
        for change in (lambda: engine.reload_lora("a"), lambda: engine.add_lora("b", str(path))):
            with pytest.raises(kind):
                change()
        with pytest.raises(kind):
            engine.add_request("b", PROMPT, GREEDY, LoRARequest("b", 2, str(path)))
        assert (engine.list_loras(), engine.lora.cache.num_bytes, engine.lora.num_device_bytes) == before
    engine.add_request("after", PROMPT, GREEDY, a)
    assert finish(engine) == {"before": contents.answers[0], "after": contents.answers[0]}


@pytest.mark.parametrize("failure", [torch.OutOfMemoryError("CUDA out of memory"), ValueError("no format")], ids=repr)
def test_out_of_memory_on_the_device_fails_only_the_request(
    contents: Contents, monkeypatch: Any, failure: Exception
) -> None:
    llm = start(contents.model)
    a, b = (llm.add_lora(name, str(contents.paths[i])) for i, name in enumerate("ab"))
    assert tokens(llm, a) == contents.answers[0]
    before = bytes_of(llm)
    with monkeypatch.context() as patch:

        def fail(*_: object) -> None:
            raise failure

        patch.setattr(LoRALinear, "set_slot", fail)
        with pytest.raises(AdapterError, match=f"'b' could not be put into a slot: {failure}"):
            llm.pin_lora("b")
        good, bad = llm.generate([PROMPT] * 2, GREEDY, [a, b], use_tqdm=False)
        assert good.outputs[0].token_ids[:4] == contents.answers[0]
        assert isinstance(bad.error, AdapterError) and str(failure) in str(bad.error)
    assert bytes_of(llm) == before and not any(info.is_pinned for info in llm.list_loras())
    assert tokens(llm, b) == contents.answers[1]


def test_the_registry_restores_adapters(contents: Contents, tmp_path: Path, monkeypatch: Any) -> None:
    options = {"lora_registry": str(tmp_path / "registry.sqlite"), "max_loras": 3}
    monkeypatch.chdir(contents.write(tmp_path / "a", 0).parent)
    llm = start(contents.model, **options)
    llm.add_lora("relative", "a")
    llm.add_lora("a", "a")
    b = llm.add_lora(LoRARequest("b", 77, str(contents.write(tmp_path / "b", 1)), "some/base"))
    llm.add_lora("gone", str(contents.paths[2]))
    llm.add_lora("memory", **contents.tensors(3))
    llm.reload_lora("a", str(contents.write(tmp_path / "a2", 4)))
    llm.pin_lora("b")
    llm.remove_lora("gone")
    tokens(llm, LoRARequest("passing", 5, str(contents.paths[5])))  # adapters of requests are not registered
    monkeypatch.chdir("/")
    again = start(contents.model, **options)
    infos = {info.name: info for info in again.list_loras()}
    assert list(infos) == ["relative", "a", "b"] and infos["b"].request == b and infos["b"].is_pinned
    assert infos["a"].digest == next(info.digest for info in llm.list_loras() if info.name == "a")
    assert all(info.problem is None for info in infos.values())
    assert [tokens(again, info.request) for info in infos.values()] == [contents.answers[i] for i in (0, 4, 1)]
    assert again.add_lora("new", str(contents.paths[2])).lora_int_id not in {
        i.request.lora_int_id for i in infos.values()
    }


def test_engines_that_share_a_registry_assign_different_ids(contents: Contents, tmp_path: Path) -> None:
    options = {"lora_registry": str(tmp_path / "registry.sqlite")}
    llms = [start(contents.model, **options) for _ in range(2)]
    x, y = (llm.add_lora(name, str(contents.paths[i])) for i, (llm, name) in enumerate(zip(llms, "xy", strict=True)))
    again = start(contents.model, **options)
    again.remove_lora(y.lora_int_id)
    assert [info.request for info in again.list_loras()] == [x]


def test_files_changed_before_a_restart_are_reported_and_not_used(
    contents: Contents, tmp_path: Path, caplog: Any
) -> None:
    options = {"lora_registry": str(tmp_path / "registry.sqlite")}
    paths = {name: contents.write(tmp_path / name, i) for i, name in enumerate("abc")}
    llm = start(contents.model, **options)
    requests = {name: llm.add_lora(name, str(path)) for name, path in paths.items()}
    contents.write(paths["a"], 3)
    shutil.rmtree(paths["b"])
    again = start(contents.model, **options)
    problems = {info.name: info.problem for info in again.list_loras()}
    assert "changed since it was loaded" in problems["a"] and "neither a directory" in problems["b"]
    assert problems["c"] is None
    assert "adapter 'a' was not restored" in caplog.text and "adapter 'b' was not restored" in caplog.text
    with pytest.raises(AdapterError, match="adapter 'a': the files in .* changed since it was loaded"):
        tokens(again, requests["a"])
    with pytest.raises(AdapterNotFound):
        tokens(again, requests["b"])
    assert tokens(again, requests["c"]) == contents.answers[2]
    assert tokens(again, again.reload_lora("a")) == contents.answers[3]
    third = start(contents.model, **options)
    assert [info.problem is None for info in third.list_loras()] == [True, False, True]
    contents.write(paths["b"], 1)
    assert tokens(third, requests["b"]) == contents.answers[1], "the files are back as they were"
    assert third.list_loras()[1].problem is None


def test_a_registry_that_cannot_be_written_leaves_the_previous_state(contents: Contents, tmp_path: Path) -> None:
    file = tmp_path / "registry.sqlite"
    llm = start(contents.model, lora_registry=str(file))
    a = llm.add_lora("a", str(contents.paths[0]))
    before = llm.list_loras(), bytes_of(llm)
    file.write_bytes(b"gone " * 1000)
    for change in (
        lambda: llm.add_lora("b", str(contents.paths[1])),
        lambda: llm.reload_lora("a", str(contents.paths[1])),
        lambda: llm.pin_lora("a"),
        lambda: llm.remove_lora("a"),
    ):
        with pytest.raises(AdapterError, match="the adapter registry .* cannot be written"):
            change()
    after = llm.list_loras(), bytes_of(llm)
    assert [(info.name, info.digest, info.is_pinned) for info in after[0]] == [("a", before[0][0].digest, False)]
    assert after[1] == before[1] and tokens(llm, a) == contents.answers[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_lora": False}, "lora_registry='.*': needs enable_lora=True"),
        ({"lora_registry": 5}, "lora_registry=5: must be a file path"),
        ({}, "lora_registry='.*' cannot be used: file is not a database"),
    ],
)
def test_a_registry_that_cannot_be_used_stops_the_start(contents: Contents, tmp_path: Path, options: Any, message: str):
    (tmp_path / "registry").write_bytes(b"no database " * 100)
    with pytest.raises(ConfigError, match=message):
        start(contents.model, **{"lora_registry": str(tmp_path / "registry"), **options})
