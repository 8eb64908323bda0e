"""`python -m tests.models.models_page` writes `docs/models.md`; `make models` compares all families first."""

from pathlib import Path

from mmlora.cli.model_table import COLUMNS, ModelRow, cells_of, model_rows
from mmlora.models.families import LAYOUTS

PAGE = Path(__file__).parents[2] / "docs" / "models.md"

INTRODUCTION = """\
# Models

Written by `make models`; `mmlora models` prints the same table, and `mmlora doctor MODEL` tells of one checkpoint.

Each family was compared as a tiny random checkpoint, on a CPU in float32, with {versions}:
greedy answers must be equal up to near-ties (two logits closer than 1e-3), and every row of logits must be within
1e-4, for the base and for adapters on each part, alone, in mixed batches and in chunks. A text decoder that is not in
the table is served all the same if it gives the same logits on the paged cache as by itself, which is checked whenever
a model is loaded. Where a version of `transformers` stands beside a name, the processor of that family needs it: an
older one is refused when the model is loaded, and the family's tests skip.

Other formats of checkpoints that are read as a family's: {layouts}.
"""


def page(rows: list[ModelRow]) -> str:
    """The whole page."""
    introduction = INTRODUCTION.format(
        versions=" or ".join(sorted({_versions(row) for row in rows if row.parity is not None})) or "nothing yet",
        layouts=", ".join(f"`{name}`" for name in LAYOUTS),
    )
    table = [COLUMNS, ("---",) * len(COLUMNS), *map(cells_of, rows)]
    return introduction + "\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def _versions(row: ModelRow) -> str:
    assert row.parity is not None
    return f"transformers {row.parity.transformers}, PEFT {row.parity.peft} and torch {row.parity.torch}"


if __name__ == "__main__":
    PAGE.write_text(page(model_rows()), encoding="utf-8")
