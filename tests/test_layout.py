"""The layout of the tree: links, no stray top-level packages, and a wheel that holds everything."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mmlora

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("assets", "kernels", "processors", "server", "towers")
GENERATED = {"__pycache__", "checkpoints", "cache"}
NOT_SHIPPED = {*GENERATED, "training"}


def run_python(code: str, *, cwd: Path, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def package_files() -> set[str]:
    """Names relative to the root, as `mmlora/…`, of every file that a user needs."""
    found = set()
    for folder, subfolders, files in os.walk(ROOT / "mmlora", followlinks=True):
        subfolders[:] = [name for name in subfolders if name not in NOT_SHIPPED]
        shipped = (Path(folder) / name for name in files if not name.startswith("."))
        found.update(path.relative_to(ROOT).as_posix() for path in shipped)
    return found


@pytest.mark.parametrize("name", LINKED)
def test_linked_folder_is_a_relative_symlink_without_init(name: str) -> None:
    assert (ROOT / name).is_dir() and not (ROOT / name).is_symlink()
    assert os.readlink(ROOT / "mmlora" / name) == f"../{name}"
    assert not (ROOT / name / "__init__.py").exists()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_git_stores_the_links_as_links() -> None:
    paths = [f"mmlora/{name}" for name in LINKED]
    lines = subprocess.run(
        ["git", "ls-files", "--stage", "--", *paths], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["120000"] * len(lines)
    assert {line.split("\t")[1] for line in lines} <= set(paths)


def test_no_folder_is_a_top_level_package_and_transformers_imports_from_the_root() -> None:
    """`transformers` looks for a package called `kernels`: ours must not answer, even with the root on the path."""
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import importlib.util
for name in {LINKED!r}:
    spec = importlib.util.find_spec(name)
    assert spec is None or spec.origin is None or not spec.origin.startswith({str(ROOT)!r}), spec
import transformers
from transformers import AutoModelForCausalLM, AttentionInterface, Phi4MultimodalForCausalLM
print(transformers.__version__)
"""
    assert run_python(code, cwd=ROOT).strip().startswith("5.")


def test_engine_core_imports_where_no_server_or_audio_package_is_installed() -> None:
    code = """
import sys
server = ["fastapi", "pydantic", "pydantic_settings", "uvicorn", "prometheus_client", "cachetools"]
sys.modules.update(dict.fromkeys([*server, "av", "librosa", "soundfile"]))  # None: not importable
import mmlora
print(*(getattr(mmlora, name) for name in mmlora.__all__))
"""
    assert "mmlora.llm.LLM" in run_python(code, cwd=ROOT)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the tree, so that no build folder is left in it and none is taken from it."""
    pytest.importorskip("setuptools")
    tree = tmp_path_factory.mktemp("tree") / "mmlora"
    ignore = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", ".*_cache", *GENERATED)
    shutil.copytree(ROOT, tree, symlinks=True, ignore=ignore)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, tree]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_every_module_and_the_assets_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == package_files()


def test_wheel_has_the_version_of_the_package(wheel: Path) -> None:
    assert wheel.name.split("-")[:2] == ["mmlora", mmlora.__version__]


def test_installed_wheel_gives_the_assets(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = """
from mmlora.assets.audio import AudioAsset
from mmlora.assets.image import ImageAsset
from mmlora.assets.models import assistant_path
samples, rate = AudioAsset("mary_had_lamb").audio_and_sample_rate
assert samples.ndim == 1 and len(samples) > rate, (samples.shape, rate)
assert ImageAsset("shapes").pil_image.size[0] > 0
print(assistant_path())
"""
    printed = run_python(code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert Path(printed.strip()).is_relative_to(tmp_path / "site")
