"""Inspection of an adapter for a model from its files and the model's configuration, without model weights."""

from dataclasses import dataclass

import torch

from mmlora.errors import AdapterMismatch
from mmlora.lora.adapter import PARTS, Adapter
from mmlora.lora.loading.files import AdapterFiles, method_refusal
from mmlora.lora.loading.load import load_adapter
from mmlora.lora.loading.module_index import ModuleIndex
from mmlora.lora.loading.peft_config import ignored_keys, refusals
from mmlora.utils.text import printable


@dataclass(frozen=True)
class Coverage:
    """Modules in one part of a model: how many an adapter changes, and how many low-rank matrices could change."""

    changed: int
    modules: int


@dataclass(frozen=True)
class Inspection:
    """Report on one adapter for one model.

    Attributes:
        adapter: path of the adapter.
        base_model: base model named in its configuration.
        digest: of its configuration and tensors; None when it does not load.
        num_tensors: in its file.
        num_bytes: host memory in float32; size of the tensors in the file when it does not load.
        max_rank: largest rank.
        ranks: number of low-rank changes by rank.
        kinds: number of modules by kind of change (lora, dora, replaced, token rows).
        parts: coverage of each part of the model.
        unmatched: tensors that match no module.
        ignored: unknown keys of the configuration that cannot change the output, each as `key=value`.
        refusals: reasons why it does not load; empty when it does.
    """

    adapter: str
    base_model: str | None
    digest: str | None
    num_tensors: int
    num_bytes: int
    max_rank: int
    ranks: dict[int, int]
    kinds: dict[str, int]
    parts: dict[str, Coverage]
    unmatched: tuple[str, ...]
    ignored: tuple[str, ...]
    refusals: tuple[str, ...]

    def as_text(self) -> str:
        """Return the report as text for a terminal."""
        verdict = "would be REFUSED" if self.refusals else "loads"
        lines = [f"{self.adapter} {verdict}", *(f"  refused: {reason}" for reason in self.refusals)]
        lines += [f"  matches no module: {key}" for key in self.unmatched]
        lines += [f"  ignored: unknown key {key}" for key in self.ignored]
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items() if count)
        ranks = ", ".join(f"{rank} ({count} modules)" for rank, count in self.ranks.items())
        facts = {
            "trained on": self.base_model or "not specified",
            "digest": self.digest or "none",
            "tensors": f"{self.num_tensors}, {self.num_bytes / 2**20:.1f} MiB in float32",
            "changes": kinds or "nothing",
            "ranks": ranks or "none",
            **{
                part.replace("_", " "): f"{found.changed} of {found.modules} modules"
                for part, found in self.parts.items()
                if found.modules
            },
        }
        lines += [f"  {name:<15} {fact}" for name, fact in facts.items()]
        return "\n".join(map(printable, lines))


def inspect_adapter(files: AdapterFiles, index: ModuleIndex) -> Inspection:
    """Report what an adapter would change in a model.

    Args:
        files: of the adapter.
        index: modules of the model. On the meta device, copies of base weights in the file are not compared.
    """
    reasons = list(refusals(files.config))
    adapter = None
    try:
        adapter = load_adapter(files, "inspected", index, dtype=torch.float32)
    except AdapterMismatch as error:
        reason = str(error).partition("): ")[2]
        if not any(known in reason for known in reasons):
            reasons.append(reason)
        adapter = _load_what_fits(files, index)
    counts = count_modules(index)
    changed = adapter.report.parts if adapter is not None else {}
    return Inspection(
        adapter=files.origin,
        base_model=_text(files.config.get("base_model_name_or_path")),
        digest=adapter.digest if adapter is not None and not reasons else None,
        num_tensors=len(files.outline),
        num_bytes=adapter.num_bytes if adapter is not None else sum(t.nbytes for t in files.outline.values()),
        max_rank=adapter.report.max_rank if adapter is not None else 0,
        ranks=_ranks(adapter),
        kinds=_kinds(adapter),
        parts={part: Coverage(changed.get(part, 0), counts[part]) for part in PARTS},
        unmatched=tuple(map(printable, adapter.report.unmatched)) if adapter is not None else (),
        ignored=ignored_keys(files.config) if method_refusal(files.config) is None else (),
        refusals=tuple(map(printable, reasons)),
    )


def count_modules(index: ModuleIndex) -> dict[str, int]:
    """Return the number of modules in each part of a model that low-rank matrices could change."""
    counts = dict.fromkeys(PARTS, 0)
    for name in index.modules:
        counts[index.part_of(name)] += index.kind_of(name) != "other"
    return counts


def _load_what_fits(files: AdapterFiles, index: ModuleIndex) -> Adapter | None:
    try:
        return load_adapter(files, "inspected", index, dtype=torch.float32, strict=False)
    except AdapterMismatch:
        return None


def _text(value: object) -> str | None:
    return printable(value) if isinstance(value, str) else None


def _ranks(adapter: Adapter | None) -> dict[int, int]:
    ranks: dict[int, int] = {}
    for weights in adapter.modules.values() if adapter is not None else ():
        for _, lora in weights.loras:
            rank = lora.lora_A.shape[0] // lora.num_experts
            ranks[rank] = ranks.get(rank, 0) + 1
    return dict(sorted(ranks.items()))


def _kinds(adapter: Adapter | None) -> dict[str, int]:
    kinds = {"lora": 0, "dora": 0, "replaced": 0, "token_rows": 0}
    for weights in adapter.modules.values() if adapter is not None else ():
        is_dora = [lora.magnitude is not None for _, lora in weights.loras]
        kinds["dora"] += any(is_dora)
        kinds["lora"] += not all(is_dora)
        kinds["replaced"] += bool(weights.parameters)
        kinds["token_rows"] += weights.token_rows is not None
    return kinds
