"""The table of families: its page is up to date, each family is proven, and the code of a family stays small."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest
import transformers

import mmlora
from mmlora.cli import commands as cli
from mmlora.cli.model_table import Parity, model_rows
from mmlora.models.families import FAMILIES
from tests import equality
from tests.families.table import FAMILIES as CHECKPOINTS
from tests.models import models_page, parity
from tests.models.own_lines import OwnLines, own_lines

ROOT = Path(mmlora.__file__).parent
MAX_LINES = 60
MAX_MEDIAN = 5


def test_the_page_is_current() -> None:
    found = models_page.PAGE.read_text(encoding="utf-8")
    assert found == models_page.page(model_rows()), "run `python -m tests.models.models_page`, or `make models`"


def test_the_page_lists_every_family_and_its_comparison() -> None:
    lines = models_page.PAGE.read_text(encoding="utf-8").splitlines()
    for model_type in FAMILIES:
        (line,) = (line for line in lines if f"| {model_type} |" in line)
        assert " outputs, logits within " in line or "| not compared yet |" in line or "| failing |" in line


def test_records_belong_to_families_and_are_within_the_tolerance() -> None:
    records = json.loads((ROOT / "models" / "parity.json").read_text())
    assert set(records) <= set(FAMILIES)
    for row in model_rows():
        if row.parity is not None and not row.parity.is_failing:
            assert 0 < row.parity.max_logit_difference <= equality.LOGIT_TOLERANCE, row.name
            assert row.parity.num_outputs >= 4 and "language_model" in row.parity.parts, row.name


def test_the_recorder_keeps_replaces_and_fails() -> None:
    old = {"llama": {"num_outputs": 1}, "qwen2": {"num_outputs": 2}, "gone": {}}
    new = equality.Statistics()
    new.add(10, 1.234e-6, is_near_tie=True)
    new.parts = {"vision_tower", "language_model"}
    records = parity.updated(old, {"qwen3": new, "no_family": new, "llava": new}, {"", "llama", "llava"})
    assert list(records) == ["llama", "qwen2", "qwen3", "llava"] and records["qwen2"] == old["qwen2"]
    assert records["llama"]["is_failing"] and records["llava"]["is_failing"]
    assert str(Parity(**records["qwen3"])) == "1 outputs, logits within 1.2e-06, 1 near-ties"
    assert records["qwen3"]["parts"] == ["language_model", "vision_tower"]
    assert records["qwen3"]["transformers"] == transformers.__version__


def test_each_tiny_checkpoint_belongs_to_a_family() -> None:
    """Otherwise a failure would not be recorded, see `tests/models/parity.py`."""
    assert {name.partition("+")[0] for name in CHECKPOINTS} <= set(FAMILIES)


def test_a_family_needs_few_lines() -> None:
    lines = {row.model_type: own_lines(row.model_type).code for row in model_rows() if row.modalities}
    assert max(lines.values()) <= MAX_LINES, lines
    assert median(lines.values()) <= MAX_MEDIAN, lines


SOURCES = {
    "fake_table.py": """
from fake.towers.own import OwnTowers
FAMILIES = {
    "own": Family(
        "Own",  # four lines
        towers=OwnTowers,
    ),
    "plain": Family("Plain"),
}
""",
    "fake/processors/own_images.py": """
def cut(x, size):

    return x  # two lines
""",
    "fake/processors/own.py": """
RATE = 2  # used by features only: one line of them

def process_audio(x):
    return x * RATE  # two lines of features

def prompt(x):
    return x  # two lines
""",
    "fake/towers/own.py": '''
"""A docstring."""
import json
import math
from fake.processors.own import process_audio, prompt
from fake.processors.own_images import cut
from fake.towers.general import GeneralTowers

SIZE = 3  # with the four imports that are used: five lines


class Base(GeneralTowers):
    """One line."""


class OwnTowers(Base):
    """A docstring
    of two lines."""

    def encode(self):
        # three lines
        return prompt(process_audio(cut(math.pi, SIZE)))


class Other(Base):
    x = 1
''',
}


def test_lines_of_code_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in SOURCES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("tests.models.own_lines.TABLE", "fake_table")
    monkeypatch.setattr("tests.models.own_lines.PACKAGES", ("fake.processors", "fake.towers"))
    assert own_lines("own") == OwnLines(code=4 + 5 + 1 + 3 + 2, features=2 + 3)
    assert own_lines("plain") == OwnLines(code=1, features=0)
    with pytest.raises(KeyError):
        own_lines("no_family")


def test_the_command_prints_text_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    page = capsys.readouterr().out
    assert all(f" {model_type} " in page for model_type in FAMILIES)
    assert cli.main(["models", "--json"]) == 0
    rows = {row["model_type"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == list(FAMILIES)
    assert rows["phi4_multimodal"]["modalities"] == ["audio", "image"]
    assert rows["phi4_multimodal"]["parity"]["num_outputs"] > 50
    parts = ["language_model", "connector", "vision_tower", "audio_tower"]
    assert rows["phi4_multimodal"]["parts"] == parts and rows["llama"]["parts"] == parts[:1]


def sources() -> Iterator[Path]:
    folders = [ROOT, *(ROOT / name for name in ("processors", "towers", "server", "kernels"))]  # links: not followed
    table, layouts = ROOT / "models" / "families.py", ROOT / "models" / "layouts"
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        if path != table and path.parent != layouts:
            yield path


def families_named_in(tree: ast.Module) -> Iterator[str]:
    """Yield where code reads a `model_type` or names a model class, except in messages and docstrings."""
    quoted = {id(node) for text in ast.walk(tree) if isinstance(text, ast.JoinedStr) for node in ast.walk(text)}
    quoted |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in (node for node in ast.walk(tree) if id(node) not in quoted):
        name = {ast.Attribute: "attr", ast.Constant: "value", ast.Name: "id"}.get(type(node))
        text = getattr(node, name) if name is not None else None
        is_read = isinstance(node, ast.Attribute | ast.Constant) and text == "model_type"
        is_class = isinstance(text, str) and text.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel"))
        if is_read or is_class:
            yield f"line {node.lineno}: {text}"


def test_only_the_table_names_families() -> None:
    found = {str(path.relative_to(ROOT)): list(families_named_in(ast.parse(path.read_text()))) for path in sources()}
    assert {name: names for name, names in found.items() if names} == {}
    asking = "c.model_type == 'x'; d['model_type']; isinstance(m, LlavaForConditionalGeneration); x = 'OPTForCausalLM'"
    assert len(list(families_named_in(ast.parse(asking)))) == 4
    assert not list(families_named_in(ast.parse("f'{config.model_type} is unknown'; 'of LlavaForCausalLM'")))
