"""A loaded adapter on the host: its matrices, its identity and the report of what matched."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from mmlora.lora.weights import ModuleWeights

PARTS: Final = ("language_model", "connector", "vision_tower", "audio_tower")

AdapterIdentity = tuple[int, str, int]
"""`(uid, digest, generation)`: the only key under which anything about an adapter may be cached."""


@dataclass(frozen=True)
class AdapterReport:
    """What became of an adapter's tensors.

    Attributes:
        matched: modules of the model that the adapter changes.
        parts: how many of them lie in each part of the model.
        unmatched: tensors that landed nowhere; empty unless loaded with `strict=False`.
        max_rank: largest rank of any module; 0 when none is low-rank.
    """

    matched: int
    parts: dict[str, int]
    unmatched: tuple[str, ...] = ()
    max_rank: int = 0


@dataclass(frozen=True, eq=False)
class Adapter:
    """One version of an adapter, immutable; whoever runs with it keeps it alive by referring to it.

    Attributes:
        name: for people only.
        digest: sha256 of the configuration and all tensors.
        media_digest: sha256 of the tower and connector tensors alone, None if it has none.
        path: the directory it was read from; None for an adapter from memory.
        modules: by the model's own module name.
        uid: number of the adapter in this process; 0 until an `HostCache` has taken it.
        generation: count of in-place reloads.
        invocation_tokens: of an activated LoRA: it holds from the last place where they stand in the prompt; empty
            for an adapter that holds everywhere.
        needs_own_pass: it changes modules of the language model that cannot be given rows of several adapters.
    """

    name: str
    digest: str
    media_digest: str | None
    path: Path | None
    modules: dict[str, ModuleWeights] = field(repr=False)
    report: AdapterReport
    uid: int = 0
    generation: int = 0
    invocation_tokens: tuple[int, ...] = ()
    needs_own_pass: bool = False

    @property
    def identity(self) -> AdapterIdentity:
        return self.uid, self.digest, self.generation

    @property
    def num_bytes(self) -> int:
        return sum(weights.num_bytes for weights in self.modules.values())

    def with_identity(self, uid: int, generation: int) -> "Adapter":
        """Return the same adapter under the identity that the store gives it."""
        return replace(self, uid=uid, generation=generation)
