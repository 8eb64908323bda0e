"""Write `docs/models.md`: `python -m tests.models.models_page`. `make models` compares all families first."""

from pathlib import Path

from mmlora.cli.model_table import COLUMNS, ModelRow, cells_of, model_rows
from mmlora.models.families import LAYOUTS

PAGE = Path(__file__).parents[2] / "docs" / "models.md"

INTRODUCTION = """\
# Models

`make models` writes this page; `mmlora models` prints the same table. `mmlora doctor MODEL` examines one checkpoint.

A tiny random checkpoint of each family was compared, on a CPU in float32, with {versions}.
Greedy outputs must be equal up to near-ties (two logits closer than 1e-3), and all logits must be within 1e-4: for the
base model and for adapters on each part, alone, in mixed batches and with chunked prefill. Other text decoders are
served, too, if they compute the same logits on the paged KV cache as with their own attention; this is checked when a
model is loaded. Where a version of `transformers` follows a name, the processor of that family needs it. With an older
version, the model is refused at load and the family's tests are skipped.

Other checkpoint formats that are read: {layouts}.
"""


def page(rows: list[ModelRow]) -> str:
    """Return the page."""
    introduction = INTRODUCTION.format(
        versions=" or ".join(sorted({_versions(row) for row in rows if row.parity is not None})) or "not recorded yet",
        layouts=", ".join(f"`{name}`" for name in LAYOUTS),
    )
    table = [COLUMNS, ("---",) * len(COLUMNS), *map(cells_of, rows)]
    return introduction + "\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def _versions(row: ModelRow) -> str:
    assert row.parity is not None
    return f"transformers {row.parity.transformers}, PEFT {row.parity.peft} and torch {row.parity.torch}"


if __name__ == "__main__":
    PAGE.write_text(page(model_rows()), encoding="utf-8")
