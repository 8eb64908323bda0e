"""The folders stay small, and imports go one way."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("assets", "kernels", "processors", "server", "towers")
# From the highest to the lowest: a package imports itself and what comes after it, nothing before it.
LAYERS = (
    "cli server plugins llm async_llm engine inputs models attention towers outputs lora kernels "
    "config sampling_params structured_outputs processors assets utils errors"
).split()
MAX_FILES = 12
MAX_FILES_BY_FOLDER = {"mmlora": 10, "server": 10}


def python_files(*folders: str) -> Iterator[Path]:
    """Yield the modules below some folders of the root; links are not followed."""
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    """Return the name under which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts if parts[0] == "mmlora" else ("mmlora", *parts))
    return name.removesuffix(".__init__")


def imported_modules(path: Path, known: set[str]) -> Iterator[str]:
    """Yield the project's modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mmlora"):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in known else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("mmlora"))


def imported_at_start(path: Path, known: set[str]) -> Iterator[str]:
    """Yield the project's modules that are imported when a file is, so neither in functions nor for type checkers."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in (node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module):
        yield from (
            name for alias in node.names for name in (f"{node.module}.{alias.name}", node.module) if name in known
        )


def layer_of(module: str) -> int:
    """Return the rank of a module's package, 0 for the highest."""
    return LAYERS.index(module.split(".")[1])


MODULES = {
    module_of(path): path
    for path in python_files("mmlora", *LINKED)
    if "training" not in path.parts and module_of(path) != "mmlora"
}


def test_imports_go_one_way() -> None:
    known = set(MODULES)
    upward = [
        f"{module} imports {name}"
        for module, path in MODULES.items()
        for name in imported_modules(path, known)
        if name != "mmlora" and layer_of(name) < layer_of(module)
    ]
    assert not upward, "LAYERS lists what may import what"


def test_no_module_imports_itself_through_others() -> None:
    imports = {module: set(imported_at_start(path, set(MODULES))) for module, path in MODULES.items()}
    while leaves := {module for module, names in imports.items() if not names & imports.keys()}:
        imports = {module: names for module, names in imports.items() if module not in leaves}
    assert not imports, "these modules are in a circle of imports, or import one that is"


def test_processors_know_neither_the_engine_nor_its_adapters() -> None:
    allowed = {"processors", "utils", "errors"}
    for module in (name for name in MODULES if name.startswith("mmlora.processors")):
        packages = {name.split(".")[1] for name in imported_modules(MODULES[module], set(MODULES))}
        assert packages <= allowed, module


def test_the_policy_is_one_pure_function_in_one_file() -> None:
    found = set(imported_modules(MODULES["mmlora.inputs.adapter_policy"], set(MODULES)))
    assert {name.split(".")[1] for name in found} <= {"errors", "lora", "outputs", "processors", "utils"}, found


def test_no_folder_holds_many_files() -> None:
    paths = [path for path in python_files("mmlora", *LINKED, "benchmarks", "examples") if "training" not in path.parts]
    counts = Counter(path.parent.relative_to(ROOT).as_posix() for path in paths if path.name != "__init__.py")
    too_full = {name: count for name, count in counts.items() if count > MAX_FILES_BY_FOLDER.get(name, MAX_FILES)}
    assert not too_full
    tests = Counter(path.parent.relative_to(ROOT).as_posix() for path in python_files("tests"))
    assert not {name: count for name, count in tests.items() if count > 20}
