"""`ServedAdapter`: an adapter under the name that clients use for it."""

from dataclasses import dataclass, replace
from typing import Any

from mmlora.lora.adapter import AdapterReport
from mmlora.lora.request import LoRARequest


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter with its name and what its card tells.

    It does not refer to the weights, which may leave the host while the name stays.

    Attributes:
        name: what clients call it.
        request: what the engine is given for it.
        digest, report: of the adapter as it was loaded.
        default_for: the key of a default; None for any other adapter.
        problem: why requests for it fail; None when they do not.
    """

    name: str
    request: LoRARequest
    digest: str | None
    report: AdapterReport
    default_for: str | None = None
    problem: str | None = None

    def __post_init__(self) -> None:
        # A request may be on its way while its adapter is replaced or unloaded. Defaults are told by their object.
        if self.default_for is None:
            object.__setattr__(self, "request", replace(self.request, only_known=True))

    def facts(self) -> dict[str, Any]:
        """What its card tells beyond OpenAI's fields."""
        return {
            "name": self.request.lora_name,
            "lora_int_id": self.request.lora_int_id,
            "digest": self.digest,
            "default_for": self.default_for,
            "matched": self.report.matched,
            "parts": dict(self.report.parts),
            "unmatched": list(self.report.unmatched),
            "problem": self.problem,
        }
