"""Table of supported model families for `mmlora models` and `docs/models.md`, with their measured equality."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mmlora.models.families import FAMILIES, Family
from mmlora.processors.modalities import MODALITIES

COLUMNS: Final = ("family", "type in config.json", "modalities", "LoRA targets", "equality with transformers and PEFT")
PARITY_FILE: Final = Path(__file__).parents[1] / "models" / "parity.json"


@dataclass(frozen=True)
class Parity:
    """Comparison of a family's tiny checkpoint with transformers and PEFT, recorded by `make models`.

    Attributes:
        transformers, torch, peft: versions used in the comparison.
        num_outputs: number of greedy outputs compared, with and without adapters.
        num_logit_rows: number of rows of logits compared in them.
        max_logit_difference: largest difference between two of these logits, in float32.
        num_near_ties: number of outputs that differ after a near-tie between two tokens.
        parts: parts of the model whose adapters changed an output.
        is_failing: the comparison failed, and the other numbers are meaningless.
    """

    transformers: str
    torch: str
    peft: str
    num_outputs: int = 0
    num_logit_rows: int = 0
    max_logit_difference: float = 0.0
    num_near_ties: int = 0
    parts: tuple[str, ...] = ()
    is_failing: bool = False

    def __str__(self) -> str:
        if self.is_failing:
            return "failing"
        ties = f", {self.num_near_ties} near-ties" if self.num_near_ties else ""
        return f"{self.num_outputs} outputs, logits within {self.max_logit_difference:.1e}{ties}"


@dataclass(frozen=True)
class ModelRow:
    """One row of the table: a model family.

    Attributes:
        name: common name.
        model_type: `model_type` in its `config.json`.
        modalities: supported modalities besides text.
        parts: parts that LoRA can target: the measured ones, or the expected ones without a comparison.
        transformers_since: first supported version of `transformers`.
        parity: comparison with transformers and PEFT; None if there is none.
    """

    name: str
    model_type: str
    modalities: tuple[str, ...]
    parts: tuple[str, ...]
    transformers_since: str
    parity: Parity | None

    @property
    def proof(self) -> str:
        """The comparison as text."""
        return "not compared yet" if self.parity is None else str(self.parity)


def read_parity(path: Path = PARITY_FILE) -> dict[str, Parity]:
    """Return the comparisons recorded by `make models`, by model_type."""
    records = json.loads(path.read_text(encoding="utf-8"))
    return {name: Parity(**{**record, "parts": tuple(record.get("parts", ()))}) for name, record in records.items()}


def model_rows() -> list[ModelRow]:
    """Return all families in the order of `FAMILIES`."""
    parity = read_parity()
    return [_row(model_type, family, parity.get(model_type)) for model_type, family in FAMILIES.items()]


def _row(model_type: str, family: Family, parity: Parity | None) -> ModelRow:
    towers = [modality.tower for modality in MODALITIES.values() if modality.name in family.modalities]
    parts = parity.parts if parity is not None and parity.parts else None
    parts = parts or ("language_model", *(["connector"] if towers else []), *towers)
    return ModelRow(family.name, model_type, family.modalities, parts, family.transformers_since, parity)


def cells_of(row: ModelRow) -> tuple[str, ...]:
    """Return the cells of a row, in the order of `COLUMNS`."""
    parts = ", ".join(part.replace("_", " ") for part in row.parts)
    needs = f" (transformers {row.transformers_since})" if row.transformers_since != Family.transformers_since else ""
    return row.name + needs, f"{row.model_type}", ", ".join(("text", *row.modalities)), parts, row.proof


def as_text(rows: list[ModelRow]) -> str:
    """Return the table as text for a terminal."""
    table = [tuple(column.upper() for column in COLUMNS), *map(cells_of, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in table)
    return "\n".join(line.rstrip() for line in lines)
