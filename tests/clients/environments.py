"""The environments of the clients: one virtual environment or `node_modules` folder for each set of requirements."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements"
FOLDER = HERE.parents[1] / ".cache" / "clients"
INSTALL_S = 900


class InstallError(Exception):
    """A client could not be installed, as without a network."""


def run(*command: str | Path, folder: Path) -> None:
    """Run one step of an installation.

    Raises:
        InstallError: with the end of its output.
    """
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=INSTALL_S)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise InstallError(f"{command[0]}: {str(error.stderr or error)[-2000:]}") from error


def install(requirements: Path) -> Path:
    """Return the folder in which a set of requirements is installed; it is made once for each version of the file.

    Raises:
        InstallError: the packages cannot be fetched.
    """
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]
    folder = FOLDER / f"{requirements.stem}-{digest}"
    stamp = folder / "installed"
    if not stamp.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if requirements.suffix == ".json":
            shutil.copy(requirements, folder / "package.json")
            run("npm", "install", "--no-audit", "--no-fund", folder=folder)
        else:
            run(sys.executable, "-m", "venv", folder, folder=folder)
            run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", "-r", requirements, folder=folder)
        stamp.touch()
    return folder


def command(script: Path, requirements: Path, *arguments: str) -> list[str | Path]:
    """Return the command that runs a script with its requirements installed.

    Node resolves packages from the script's own folder upwards, so its scripts run from copies next to `node_modules`.
    """
    folder = install(requirements)
    if script.suffix != ".mjs":
        return [folder / "bin" / "python", script, *arguments]
    for source in script.parent.glob("*.mjs"):
        shutil.copy(source, folder / source.name)
    return ["node", folder / script.name, *arguments]


def environment() -> dict[str, str]:
    """Return the variables of a client: no proxies, no telemetry, no other OpenAI endpoint, no download."""
    switched = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    kept = ("PATH", "HOME", "LANG", "TMPDIR")
    return {**{name: os.environ[name] for name in kept if name in os.environ}, **switched}
