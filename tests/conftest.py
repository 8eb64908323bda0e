"""Shared by all tests: `--device`, the skip rule for `gpu` tests, the summary of equality tests, and tiny models."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest

if TYPE_CHECKING:
    from tests.equality import Checkpoint


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of engines in the test process, such as cuda")


@pytest.fixture(scope="session", autouse=True)
def device_of_engines(pytestconfig: pytest.Config) -> Iterator[None]:
    """Run engines on the device of `--device` where tests ask for the CPU; references stay on the CPU."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if (device := pytestconfig.getoption("--device")) != "cpu":
            from mmlora.engine import loading

            resolve = loading.resolve_device
            monkeypatch.setattr(loading, "resolve_device", lambda name: resolve(device if name == "cpu" else name))
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # of pytest-xdist: start the longest test first, so that no worker ends late
        items.sort(key=lambda item: "soak" not in item.path.parts)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in gpu_items:
            item.add_marker(skip)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send the statistics of a worker of pytest-xdist to the process that prints them."""
    workeroutput, equality = getattr(session.config, "workeroutput", None), sys.modules.get("tests.equality")
    if workeroutput is not None and equality is not None:
        workeroutput["equality"] = equality.STATISTICS.as_dict()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add the statistics of a worker of pytest-xdist."""
    if "equality" in getattr(node, "workeroutput", {}):
        from tests.equality import STATISTICS

        STATISTICS.merge(node.workeroutput["equality"])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    equality = sys.modules.get("tests.equality")
    if equality is not None and equality.STATISTICS.num_outputs:
        terminalreporter.write_line(f"equality: {equality.STATISTICS}")
    for name, figures in equality.STATISTICS.half_errors.items() if equality is not None else ():
        terminalreporter.write_line(f"half precision, {name}: {figures}")


@pytest.fixture(scope="session")
def phi4_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny random Phi-4-multimodal with its adapters (`tests.checkpoints.PHI4_ADAPTERS`) and reference."""
    from tests.checkpoints import PHI4_ADAPTERS, save_adapter, save_phi4
    from tests.equality import Checkpoint
    from tests.reference import Reference

    folder = tmp_path_factory.mktemp("phi4")
    path = save_phi4(folder / "model")
    adapters = {name: save_adapter(path, folder / name, spec) for name, spec in PHI4_ADAPTERS.items()}
    return Checkpoint(path, adapters, Reference(path))


@pytest.fixture(scope="session")
def text_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """`text_checkpoint(family)`: a tiny random text model with one adapter, `lora`, on every layer."""
    from tests.checkpoints import AdapterSpec, save_adapter, save_text_model
    from tests.equality import Checkpoint
    from tests.reference import Reference

    found: dict[str, Checkpoint] = {}

    def get(family: str) -> Checkpoint:
        if family not in found:
            folder: Path = tmp_path_factory.mktemp(family)
            path = save_text_model(folder / "model", family)
            targets = r".*(layers|h)\.\d+\.(self_attn|attn|mlp)\.(\w+_proj|c_\w+)"
            adapter = save_adapter(path, folder / "lora", AdapterSpec(targets, 7, 3, {"lora_alpha": 7}))
            found[family] = Checkpoint(path, {"lora": adapter}, Reference(path))
        return found[family]

    return get


@pytest.fixture(scope="session")
def tiny_phi4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Phi-4-multimodal; see `tests.checkpoints`."""
    from tests.checkpoints import save_phi4

    return save_phi4(tmp_path_factory.mktemp("tiny") / "phi4")


@pytest.fixture(scope="session")
def tiny_adapters(tiny_phi4: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random adapters of `tiny_phi4`: `a` to `d` on the language model, `everything` also on the towers."""
    from tests.checkpoints import PHI4_ADAPTERS, randomize_adapter, save_adapter

    folder = tmp_path_factory.mktemp("adapters")
    paths = {
        "a": save_adapter(tiny_phi4, folder / "a", PHI4_ADAPTERS["text"]),
        "everything": save_adapter(tiny_phi4, folder / "everything", PHI4_ADAPTERS["everything"]),
    }
    for seed, name in enumerate("bcd", 100):
        paths[name] = Path(shutil.copytree(paths["a"], folder / name))
        randomize_adapter(paths[name], seed)
    return paths
