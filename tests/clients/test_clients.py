"""The clients that people use, each with its ordinary case, against `mmlora serve` and the bundled assistant."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.clients.environments import HERE, REQUIREMENTS, InstallError, command, environment
from tests.server_process import run_serve

CLIENT_S = 300
# Scripts by the file of their requirements. GuideLLM needs torch, which takes minutes to install.
SCRIPTS = {
    "sdks.txt": (
        "openai_python.py",
        "langchain_chat.py",
        "litellm_chat.py",
        "pydantic_ai_agent.py",
        "openai_agents.py",
        "instructor_models.py",
    ),
    "llama_index.txt": ("llama_index_chat.py",),
    "lm_eval.txt": ("lm_eval_tasks.py",),
    "guidellm.txt": ("guidellm_benchmark.py",),
    "package.json": ("openai_node.mjs", "vercel_ai.mjs"),
}
CASES = [
    pytest.param(script, requirements, marks=[pytest.mark.slow] if requirements == "guidellm.txt" else [], id=script)
    for requirements, scripts in SCRIPTS.items()
    for script in scripts
]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with run_serve("--uvicorn-log-level", "warning") as server:
        yield server.address


@pytest.mark.clients
@pytest.mark.parametrize(("script", "requirements"), CASES)
def test_client(script: str, requirements: str, address: str) -> None:
    if script.endswith(".mjs") and shutil.which("npm") is None:
        pytest.skip("needs Node")
    try:
        line = command(HERE / "scripts" / script, REQUIREMENTS / requirements, address)
    except InstallError as error:
        pytest.skip(f"cannot be installed: {error}")
    client = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=CLIENT_S)
    assert client.returncode == 0, client.stderr[-4000:]
