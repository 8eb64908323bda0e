"""Loading and unloading adapters under load leaks neither counted bytes nor resident memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmlora import LoRARequest, SamplingParams
from mmlora.lora.loading.files import read_adapter
from tests.checkpoints import AdapterSpec, save_adapter
from tests.engine.lifecycle import PROMPT, TARGETS, start

RANK = 64  # one leaked adapter is much larger than the noise
PARAMS = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


@pytest.fixture(scope="module")
def adapter(text_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    checkpoint = text_checkpoint("llama")
    folder = tmp_path_factory.mktemp("large")
    return checkpoint.path, save_adapter(checkpoint.path, folder / "adapter", AdapterSpec(TARGETS, 3, RANK))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def slope(values: list[int]) -> float:
    """Return the least-squares slope per round."""
    return float(np.polyfit(np.arange(len(values)), np.array(values, dtype=float), 1)[0])


def run_rounds(model: Path, path: Path, num_warm_up: int, num_rounds: int) -> tuple[int, float, float, float]:
    """Load three adapters from a path and from memory, use, reload and abort some, and unload all while they run.

    Returns:
        Bytes of one adapter, and the slopes per round of resident memory and of the counted host and device bytes,
        measured while no request runs.
    """
    engine, files = start(model).llm_engine, read_adapter(path)
    one_request = LoRARequest("stays", 1, str(path))
    engine.add_lora(one_request)
    num_bytes = engine.list_loras()[0].num_bytes
    resident, host, device = [], [], []
    for index in range(num_warm_up + num_rounds):
        names = [f"adapter-{index}-{i}" for i in range(3)]
        loras = [engine.add_lora(name, str(path)) for name in names[:2]]
        loras.append(engine.add_lora(names[2], tensors=files.tensors, config=files.config))
        for lora in (one_request, *loras):
            engine.add_request(lora.lora_name, f"{PROMPT} {index}", PARAMS, lora)
        engine.step()
        engine.reload_lora(names[0])
        for name in names:
            engine.remove_lora(name)
        engine.step()
        engine.abort_request(names[1])
        while engine.has_unfinished_requests:
            engine.step()
        if index >= num_warm_up:
            resident.append(resident_bytes())
            host.append(engine.lora.cache.num_bytes)
            device.append(engine.lora.num_device_bytes)
    assert set(host) == {num_bytes}, "only the permanent adapter"
    assert max(device) <= num_bytes
    return num_bytes, slope(resident), slope(host), slope(device)


def test_60_rounds_leak_nothing(adapter: Any) -> None:
    num_bytes, resident, host, _ = run_rounds(*adapter, num_warm_up=20, num_rounds=60)
    assert host == pytest.approx(0, abs=1e-6)
    assert resident < num_bytes / 5, f"resident memory grows by {resident:.0f} bytes a round"


@pytest.mark.slow
def test_1000_rounds_leak_nothing(adapter: Any) -> None:
    num_bytes, resident, host, device = run_rounds(*adapter, num_warm_up=100, num_rounds=1000)
    print(
        f"1,000 rounds of 3 adapters of {num_bytes} bytes: slope of resident memory {resident:.1f} bytes a round, of "
        f"counted host bytes {host:.3f}, of counted device bytes {device:.3f}"
    )
    assert abs(host) < 1 and abs(device) < num_bytes / 1000 and abs(resident) < num_bytes / 100
