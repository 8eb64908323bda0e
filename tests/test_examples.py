"""The examples, the demo and the README's Python run on the bundled assistant."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from mmlora import AsyncLLM, EngineArgs
from mmlora.assets.models import assistant_default_mm_loras, assistant_path
from mmlora.server.api import build_app
from mmlora.server.launch import load_served_models
from tests.server.conftest import run_app

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def run_example(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short(path: Path) -> None:
    limit = 100 if path.name == "demo.py" else 40
    assert len(path.read_text().splitlines()) <= limit


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("default_mm_lora.py", ["mary had a little lamb", "audio default:audio"]),
        ("multilora.py", ["base     none", "spanish  explicit", "image    default:image", "base     explicit:base"]),
        ("async_engine.py", ["what is two plus three? five", "what comes after seven? eight"]),
    ],
)
def test_an_offline_example_runs(
    name: str, expected: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_example(name, monkeypatch)
    printed = capsys.readouterr().out
    for text in expected:
        assert text in printed


def test_the_client_examples_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    defaults = assistant_default_mm_loras()
    llm = AsyncLLM(
        EngineArgs(assistant_path(), served_model_name="assistant", enable_lora=True, default_mm_loras=defaults)
    )
    try:
        with run_app(build_app(llm, load_served_models(llm))) as address:
            for name in ("chat_client.py", "transcription_client.py", "responses_client.py"):
                run_example(name, monkeypatch, f"{address}/v1")
    finally:
        llm.shutdown()
    printed = capsys.readouterr().out
    assert printed.count("mary had a little lamb") == 2 and printed.count("'reason': 'default:audio'") == 2
    assert "triangle" in printed and "'reason': 'default:image'" in printed


def test_the_demo_runs_and_leaves_no_server() -> None:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / "demo.py")], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if line.endswith(" s")]
    defaults = ["default:audio", "explicit:base", "default:image", "explicit:base", "default:audio+image"]
    assert [row[-3] for row in rows] == ["none", *defaults, "explicit"]
    assert "spanish-lora" in rows[-1]
    answers = [line.split("→ ")[1] for line in result.stdout.splitlines() if "→ " in line]
    text, transcript, unheard, description, unseen, _, spanish = answers
    assert (text, spanish) == ("five", "cinco")
    assert "mary had a little lamb" in transcript and "mary" not in unheard
    assert "red circle" in description and "circle" not in unseen


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL))
def test_a_snippet_of_the_readme_runs(snippet: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})
    assert "default:audio" in capsys.readouterr().out
