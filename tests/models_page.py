"""`python -m tests.models_page` writes `docs/models.md`; `make models` compares all families first."""

from pathlib import Path
from statistics import median

from mmlora.families import LAYOUTS
from mmlora.model_table import COLUMNS, ModelRow, cells_of, model_rows
from mmlora.own_lines import layout_lines

PAGE = Path(__file__).parents[1] / "docs" / "models.md"

INTRODUCTION = """\
# Models

Written by `make models`; `mmlora models` prints the same table, and `mmlora doctor MODEL` tells of one checkpoint.

Each family was compared as a tiny random checkpoint, on a CPU in float32, with {versions}:
greedy answers must be equal up to near-ties (two logits closer than 1e-3), and every row of logits must be within
1e-4, for the base and for adapters on each part, alone, in mixed batches and in chunks. A text decoder that is not in
the table is served all the same if it gives the same logits on the paged cache as by itself, which is checked whenever
a model is loaded. Where a version of `transformers` stands beside a name, the processor of that family needs it: an
older one is refused when the model is loaded, and the family's tests skip.

Own lines are those of code that no other kind of family uses, blank lines, comments and docstrings apart; after the
plus stand those that compute features where no class of `transformers` runs. Of {num_families} families with media,
{num_entries} need just their entry in the table; the median is {median:g}, the maximum {maximum} ({largest}).
Other formats of checkpoints that are read as a family's: {layouts}.
"""


def multimodal(rows: list[ModelRow]) -> list[ModelRow]:
    """The families that take media."""
    return [row for row in rows if row.modalities]


def page(rows: list[ModelRow]) -> str:
    """The whole page."""
    own_lines = {row.name: row.own_lines.code for row in multimodal(rows)}
    largest = max(own_lines, key=lambda name: own_lines[name])
    introduction = INTRODUCTION.format(
        versions=" or ".join(sorted({_versions(row) for row in rows if row.parity is not None})) or "nothing yet",
        num_families=len(own_lines),
        num_entries=sum(count == 1 for count in own_lines.values()),
        median=median(own_lines.values()),
        maximum=own_lines[largest],
        largest=largest,
        layouts=", ".join(f"`{name}` ({layout_lines(name)} lines)" for name in LAYOUTS),
    )
    table = [COLUMNS, ("---",) * len(COLUMNS), *map(cells_of, rows)]
    return introduction + "\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def _versions(row: ModelRow) -> str:
    assert row.parity is not None
    return f"transformers {row.parity.transformers}, PEFT {row.parity.peft} and torch {row.parity.torch}"


if __name__ == "__main__":
    PAGE.write_text(page(model_rows()), encoding="utf-8")
