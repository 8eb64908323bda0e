"""`LoRAInfo`: what `list_loras` tells about an adapter."""

from dataclasses import dataclass

from mmlora.lora.request import LoRARequest


@dataclass(frozen=True)
class LoRAInfo:
    """The state of one adapter.

    Attributes:
        request: what to pass as `lora_request` to run it.
        digest: of the present version; None before its first load has ended.
        generation: count of reloads.
        num_bytes: of the present version; 0 while nobody holds it.
        is_pinned: it stays on the host, and in its slot.
        is_on_host, is_on_device: where it is now.
        num_requests: unfinished requests on any version of it.
        num_loads, load_s: how often it was loaded, and the seconds that this took.
        problem: why it cannot be used; None when it can.
    """

    request: LoRARequest
    digest: str | None
    generation: int
    num_bytes: int
    is_pinned: bool
    is_on_host: bool
    is_on_device: bool
    num_requests: int
    num_loads: int
    load_s: float
    problem: str | None

    @property
    def name(self) -> str:
        """What callers call it."""
        return self.request.lora_name
