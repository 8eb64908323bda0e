"""Random sequences of adapter commands: the engine is compared with `LifecycleModel` after every command."""

import random
from pathlib import Path
from typing import Any

import pytest

from mmlora import LLM, LoRARequest
from tests.engine.lifecycle import Contents, bytes_of, make_contents, outcome, start, tokens
from tests.engine.lifecycle_model import LifecycleModel

Command = tuple[str, str, str | int | None]
NAMES = ("a", "b", "c", "d", "e")
PATHS = ("p0", "p1", "p2")
WEIGHTS = {"GENERATE": 8, "LOAD": 5, "RELOAD": 3, "UNLOAD": 2, "PIN": 2, "WRITE": 1}
LIMITS = ((2, 3), (1, 2), (3, 3), (1, 1), (2, 5))  # (max_loras, max_cpu_loras)


@pytest.fixture(scope="module")
def contents(text_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Contents:
    return make_contents(text_checkpoint("llama"), tmp_path_factory.mktemp("contents"))


def random_script(seed: int, num_contents: int) -> list[Command]:
    """Return random commands over few names and paths, so that they collide; a number is an adapter from memory."""
    rng = random.Random(seed)
    script: list[Command] = []
    for command in rng.choices(list(WEIGHTS), WEIGHTS.values(), k=25):
        source: str | int | None = None
        if command == "WRITE":
            script.append((command, rng.choice(PATHS), rng.randrange(num_contents)))
            continue
        if command in ("LOAD", "RELOAD"):
            source = rng.choice([*PATHS, *PATHS, rng.randrange(num_contents)])
        if command == "RELOAD" and rng.random() < 0.4:
            source = None
        script.append((command, rng.choice(NAMES), source))
    return script


class Engine:
    """Runs the commands with `LLM`."""

    def __init__(self, llm: LLM, contents: Contents, folder: Path) -> None:
        self.llm, self.contents, self.folder = llm, contents, folder

    def run(self, command: str, name: str, source: str | int | None) -> Any:
        """Run a command; return the output of GENERATE, True for the others, or the name of the error."""
        place: dict[str, Any] = {}
        if isinstance(source, int):
            place = self.contents.tensors(source)
        elif source is not None:
            place = {"path": str(self.folder / source)}
        functions = {
            "LOAD": lambda: self.llm.add_lora(name, **place),
            "RELOAD": lambda: self.llm.reload_lora(name, **place),
            "UNLOAD": lambda: self.llm.remove_lora(name),
            "PIN": lambda: self.llm.pin_lora(name),
            "GENERATE": lambda: tokens(self.llm, self.request(name)),
        }
        result = outcome(functions[command])
        return result if isinstance(result, str | list) else True

    def request(self, name: str) -> LoRARequest:
        known = [info.request for info in self.llm.list_loras() if info.name == name]
        return known[0] if known else LoRARequest(name, 1 + NAMES.index(name), str(self.folder / "p0"))

    def state(self) -> tuple[object, ...]:
        infos = self.llm.list_loras()
        on_host, on_device, pinned = (
            {info.name for info in infos if getattr(info, flag)} for flag in ("is_on_host", "is_on_device", "is_pinned")
        )
        return {info.name for info in infos}, on_host, on_device, pinned, *bytes_of(self.llm)


def state_of(model: LifecycleModel) -> tuple[object, ...]:
    living = {*model.slots, *(model.versions[name] for name in model.host)}
    host_bytes, device_bytes = (sum(model.sizes[version[2]] for version in found) for found in (living, model.slots))
    on_device = {version[0] for version in model.slots}
    return set(model.sources), set(model.host), on_device, model.pinned, host_bytes, device_bytes


def run_scripts(contents: Contents, folder: Path, seeds: range) -> tuple[int, int]:
    """Compare engine and model over several scripts; return the number of commands, and of errors among them."""
    num_commands = num_errors = 0
    for index, (max_loras, max_cpu_loras) in enumerate(LIMITS):
        llm = start(contents.model, max_loras=max_loras, max_cpu_loras=max_cpu_loras)
        engine = Engine(llm, contents, folder)
        for seed in seeds[index :: len(LIMITS)]:
            for info in llm.list_loras():
                llm.remove_lora(info.name)
            assert bytes_of(llm) == (0, 0)
            disk = {path: number for number, path in enumerate(PATHS)}
            model = LifecycleModel(max_loras, max_cpu_loras, contents.sizes, disk)
            for path, content in disk.items():
                contents.write(folder / path, content)
            for step, (command, name, source) in enumerate(random_script(seed, len(contents.paths))):
                where = f"limits {max_loras}, {max_cpu_loras}; seed {seed}, step {step}: {command} {name} {source}"
                if command == "WRITE":
                    disk[name] = int(source or 0)
                    contents.write(folder / name, disk[name])
                    continue
                found, expected = engine.run(command, name, source), model.run(command, name, source)
                if isinstance(expected, int):
                    expected = contents.answers[expected] if command == "GENERATE" else True
                assert found == expected, where
                assert engine.state() == state_of(model), where
                num_commands += 1
                num_errors += isinstance(found, str)
    return num_commands, num_errors


def test_random_scripts_match_the_model(contents: Contents, tmp_path: Path) -> None:
    num_commands, num_errors = run_scripts(contents, tmp_path, range(30))
    assert num_commands > 600 and 0.05 < num_errors / num_commands < 0.7


@pytest.mark.slow
def test_500_random_scripts_match_the_model(contents: Contents, tmp_path: Path) -> None:
    num_commands, num_errors = run_scripts(contents, tmp_path, range(1000, 1500))
    print(f"500 scripts: {num_commands} commands, {num_errors} of them refused, no difference")
    assert num_commands > 10_000
