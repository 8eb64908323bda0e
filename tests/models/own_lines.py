"""Count the lines of code that only one family needs: its entry in the table and everything that the entry uses.

This covers modules of `processors/` and `towers/` that are not shared by all families, and other modules that an entry
uses. Blank lines, comments, docstrings and the prompts of `transcription.py` do not count; an import is one line.
"""

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

TABLE = "mmlora.models.families"
PACKAGES = ("mmlora.processors", "mmlora.towers")
PARENTS = ("mmlora.models", "mmlora.processors.families")  # of modules that are imported as a whole
GENERAL = frozenset(
    (
        "audio base containers encoder general image items loader modalities placeholders pretrained transcription"
    ).split()
)
FEATURE_MODULES = ("_images", "_audio", "_features")
FEATURE_FUNCTIONS = ("features", "load_feature_extractor", "load_image_settings", "process_audio", "with_options")
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


@dataclass(frozen=True)
class OwnLines:
    """Lines of code of one family.

    Attributes:
        code: all except `features`.
        features: lines that compute tensors from samples or pixels if no class of `transformers` can, with their
            settings: in `processors/`, modules called `…_images`, `…_audio` or `…_features`, functions in
            `FEATURE_FUNCTIONS`, and everything that only these functions use.
    """

    code: int
    features: int


@cache
def own_lines(model_type: str) -> OwnLines:
    """Count the lines of a family.

    Raises:
        KeyError: the table has no such entry.
    """
    table = _Source.of(TABLE)
    key, entry = table.entry(model_type)
    lines = {(table, line) for line in range(key.lineno, _last_line(entry) + 1)}
    features: set[tuple[_Source, int]] = set()
    todo, later, known = list(table.imported(entry)), list[tuple[str, _Source]](), set()
    while todo or later:
        is_later = not todo
        name, source = later.pop() if is_later else todo.pop()
        for statement in source.definitions(name):
            if statement in known:
                continue
            known.add(statement)
            lines |= {(source, line) for line in _lines(statement)}
            is_feature = is_later or source.is_feature_function(statement)
            features |= {(source, line) for line in (_lines if is_feature else source.feature_lines)(statement)}
            if not isinstance(statement, ast.Import | ast.ImportFrom):
                used = [*source.imported(statement), *((name, source) for name in _names(statement))]
                (later if is_feature else todo).extend(used)
    code = {(source, line) for source, line in lines if line in source.code_lines}
    return OwnLines(len(code - features), len(code & features))


@dataclass(frozen=True, eq=False)
class _Source:
    """The source of a module."""

    name: str
    tree: ast.Module
    code_lines: frozenset[int]

    @staticmethod
    @cache
    def of(module: str) -> "_Source":
        spec = find_spec(module)
        assert spec is not None and spec.origin is not None, module
        text = Path(spec.origin).read_text(encoding="utf-8")
        tree = ast.parse(text)
        return _Source(module, tree, frozenset(_code_lines(text, tree)))

    def entry(self, model_type: str) -> tuple[ast.expr, ast.expr]:
        """Return key and value of a family in the table."""
        for node in (node for node in ast.walk(self.tree) if isinstance(node, ast.Dict)):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == model_type:
                    return key, value
        raise KeyError(model_type)

    def definitions(self, name: str) -> list[ast.stmt]:
        """Return the statements that define a name, all of the module for `*`."""
        return [statement for statement in self.tree.body if name == "*" or name in _defined(statement)]

    def imported(self, node: ast.AST) -> Iterator[tuple[str, "_Source"]]:
        """Yield the names that a node uses from modules that are not shared by all families, with their modules."""
        names = _names(node)
        inner = [found for found in ast.walk(node) if isinstance(found, ast.ImportFrom)]
        outer = [found for found in self.tree.body if isinstance(found, ast.ImportFrom)]
        for statement in (*inner, *outer):
            for alias in statement.names:
                if statement.module is not None and (statement in inner or (alias.asname or alias.name) in names):
                    is_module = statement.module in (*PARENTS, *PACKAGES)
                    module = f"{statement.module}.{alias.name}" if is_module else statement.module
                    if self._is_own(module):
                        yield "*" if is_module else alias.name, _Source.of(module)

    def _is_own(self, module: str) -> bool:
        name = module.rpartition(".")[2]
        is_listed = module.startswith(tuple(f"{package}." for package in PACKAGES))
        return name not in GENERAL and (is_listed or (self.name == TABLE and module.startswith("mmlora.")))

    def is_feature_function(self, statement: ast.stmt) -> bool:
        """Return whether a statement defines a function that computes features."""
        is_function = isinstance(statement, ast.FunctionDef) and statement.name in FEATURE_FUNCTIONS
        return is_function and self.name.startswith(PACKAGES[0])

    def feature_lines(self, statement: ast.stmt) -> Iterator[int]:
        """Yield the lines of a statement that compute features."""
        if not self.name.startswith(PACKAGES[0]):
            return
        if self.name.endswith(FEATURE_MODULES):
            yield from _lines(statement)
        for node in ast.walk(statement):
            if isinstance(node, ast.FunctionDef) and node.name in FEATURE_FUNCTIONS:
                yield from _lines(node)


def _code_lines(text: str, tree: ast.Module) -> set[int]:
    documented = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in _lines(node)
    }
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    spans = (range(token.start[0], token.end[0] + 1) for token in tokens if token.type not in NO_CODE)
    return {line for span in spans for line in span} - documented


def _defined(statement: ast.stmt) -> set[str]:
    if isinstance(statement, ast.ClassDef | ast.FunctionDef):
        return {statement.name}
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).partition(".")[0] for alias in statement.names}
    return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def _names(node: ast.AST) -> set[str]:
    return {found.id for found in ast.walk(node) if isinstance(found, ast.Name)}


def _lines(node: ast.stmt) -> range:
    if isinstance(node, ast.Import | ast.ImportFrom):
        return range(node.lineno, node.lineno + 1)
    decorators = node.decorator_list if isinstance(node, ast.ClassDef | ast.FunctionDef) else []
    return range(min([node.lineno, *(decorator.lineno for decorator in decorators)]), _last_line(node) + 1)


def _last_line(node: ast.stmt | ast.expr) -> int:
    assert node.end_lineno is not None
    return node.end_lineno
