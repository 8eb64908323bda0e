"""Many adapters of a high rank: host memory has a bound, and requests are answered all the time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import PHI4_ADAPTERS, AdapterSpec, randomize_adapter, save_adapter
from tests.server.conftest import RunningServer, wait_for
from tests.server.lora.admin import BASE_NAMES, chat, load, names, run_updatable, unload
from tests.server.resource_limits import MIB, bounded

RANK, NUM_ADAPTERS = 320, 20


@pytest.fixture(scope="module")
def many(tiny_phi4: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("many")
    spec = AdapterSpec(PHI4_ADAPTERS["text"].target_modules, 0, RANK, {"lora_alpha": 4 * RANK})
    first = save_adapter(tiny_phi4, folder / "0", spec)
    paths = [first, *(Path(shutil.copytree(first, folder / str(number))) for number in range(1, NUM_ADAPTERS))]
    for seed, path in enumerate(paths):
        randomize_adapter(path, seed)
    return paths


@pytest.fixture
def server(tiny_phi4: Path, adapters: dict[str, str]) -> Iterator[RunningServer]:
    with run_updatable(tiny_phi4, adapters) as server:
        yield server


def test_memory_stays_within_the_number_of_cached_adapters(server: RunningServer, many: list[Path]) -> None:
    cache = server.llm.engine.lora.cache
    assert cache.max_cpu_loras == 8 < NUM_ADAPTERS
    others, outputs = cache.num_bytes, []  # the default and the adapter of the command line
    with bounded(f"{NUM_ADAPTERS} adapters of rank {RANK}", max_bytes=200 * MIB):
        for path in many:
            assert load(server, lora_name=path.name, lora_path=str(path)).status_code == 200
            assert chat(server, "tiny").status_code == 200
            outputs.append(chat(server, path.name, max_tokens=4).json()["choices"][0]["message"]["content"])
            assert len(cache.adapters) <= 8
        num_bytes = max(adapter.num_bytes for adapter in cache.adapters)
        assert num_bytes > MIB and cache.num_bytes <= 8 * num_bytes + others
    assert len(set(outputs)) > NUM_ADAPTERS // 2
    assert names(server) == [*BASE_NAMES, *(path.name for path in many)]
    again = [chat(server, path.name, max_tokens=4).json()["choices"][0]["message"]["content"] for path in many]
    assert again == outputs and cache.num_evictions >= 2 * (NUM_ADAPTERS - 8)
    assert all(unload(server, lora_name=path.name).status_code == 200 for path in many)
    wait_for(lambda: cache.num_bytes <= others)
