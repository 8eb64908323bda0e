"""`import mmlora`: every exported name, imported when it is first used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mmlora

INIT = Path(mmlora.__file__)


def imports_for_type_checkers() -> dict[str, str]:
    """Names to modules, as the block under `if TYPE_CHECKING` imports them."""
    (block,) = [node for node in ast.parse(INIT.read_text()).body if isinstance(node, ast.If) and node.orelse == []][:1]
    return {
        alias.name: str(node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def test_type_checkers_see_the_names_and_modules_that_are_imported_on_first_use() -> None:
    assert set(imports_for_type_checkers()) == set(mmlora.__all__)
    for name, module in imports_for_type_checkers().items():
        assert getattr(mmlora, name) is getattr(sys.modules[module], name)


def test_names_are_listed_and_others_refused() -> None:
    assert set(mmlora.__all__) <= set(dir(mmlora))
    with pytest.raises(AttributeError, match="module 'mmlora' has no attribute 'LLMs'"):
        mmlora.LLMs  # type: ignore[attr-defined]  # noqa: B018


def test_importing_loads_no_library_before_a_name_is_used() -> None:
    code = """
import sys
import mmlora
assert not {"torch", "transformers", "numpy", "pydantic"} & set(sys.modules), sys.modules
from mmlora import LLM
assert LLM is mmlora.LLM and "torch" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], timeout=300, check=True)
