"""LoRA matrices of one Linear module for all adapter slots, each at its true rank."""

import torch


class SlotWeights:
    """`lora_A`, `lora_B` and scaling of one module per slot.

    Attributes:
        lora_A: per slot `[r, in_features]`, or None if the slot's adapter does not change this module.
        lora_B: per slot `[out_features, r]`, or None.
        scaling: per slot.
        max_rank: largest rank of any slot; 0 if all are empty.
        table: `[max_loras, 3] int64` on the device: address of lora_A, address of lora_B, rank (0: no adapter). Its
            shape is fixed, so that captured kernels remain valid when adapters change.
        scaling_table: `[max_loras] fp32` on the device.
    """

    def __init__(self, max_loras: int, device: torch.device) -> None:
        self.device = device
        self.lora_A: list[torch.Tensor | None] = [None] * max_loras
        self.lora_B: list[torch.Tensor | None] = [None] * max_loras
        self.scaling: list[float] = [0.0] * max_loras
        self.max_rank = 0
        self.table = torch.zeros(max_loras, 3, dtype=torch.int64, device=device)
        self.scaling_table = torch.zeros(max_loras, dtype=torch.float32, device=device)

    def set(self, slot: int, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> None:
        """Store an adapter's matrices in a slot; on the CPU they are shared with the caller, not copied."""
        if not 0 <= slot < len(self.lora_A):
            raise IndexError(f"slot {slot} is outside 0 … {len(self.lora_A) - 1}")
        lora_A, lora_B = (weight.to(self.device, non_blocking=True).contiguous() for weight in (lora_A, lora_B))
        self.lora_A[slot], self.lora_B[slot], self.scaling[slot] = lora_A, lora_B, scaling
        self._update_max_rank()
        self.table[slot] = torch.tensor([lora_A.data_ptr(), lora_B.data_ptr(), lora_A.shape[0]])
        self.scaling_table[slot] = scaling

    def clear(self, slot: int) -> None:
        """Clear a slot and drop its tensors."""
        self.lora_A[slot] = self.lora_B[slot] = None
        self.scaling[slot] = 0.0
        self._update_max_rank()
        self.table[slot] = 0
        self.scaling_table[slot] = 0

    def _update_max_rank(self) -> None:
        self.max_rank = max((lora_A.shape[0] for lora_A in self.lora_A if lora_A is not None), default=0)
