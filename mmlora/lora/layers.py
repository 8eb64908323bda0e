"""The layers that apply adapters: `LoRALinear` wraps a Linear, `LoRAState` tells it which rows take which slot."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from mmlora.kernels import ops
from mmlora.kernels.segments import BASE_SLOT, RowSegments, Segment, max_tiles
from mmlora.kernels.slot_weights import SlotWeights
from mmlora.lora.adapter import LoRAWeights


class LoRAState:
    """Row→slot assignment of the forward pass that is running; all wrapped layers of a model share one.

    Args:
        device: of the model.
        max_num_rows: rows of the largest step and
        max_num_segments: segments of one step; given both, the device metadata keep one address and a fixed shape,
            so that CUDA graphs can be captured over them.
    """

    def __init__(self, device: torch.device, max_num_rows: int = 0, max_num_segments: int = 0) -> None:
        self.device = device
        self.is_active = False
        self._is_open = False
        self._rows: RowSegments | None = None
        self._uniform_slot = BASE_SLOT
        self._uniform_rows: dict[int, RowSegments | None] = {}
        self._tile_buffer: torch.Tensor | None = None
        if max_num_rows and ops.uses_triton(device):
            shape = (max_tiles(max_num_rows, max_num_segments), 3)
            self._tile_buffer = torch.full(shape, BASE_SLOT, dtype=torch.int32, device=device)

    @property
    def segments(self) -> tuple[Segment, ...] | None:
        """Adapter segments of the running forward pass; None outside, in `uniform`, and when all rows are base."""
        return self._rows.segments if self._rows is not None else None

    @property
    def uniform_slot(self) -> int | None:
        """Slot of all rows inside `uniform`, None elsewhere."""
        return self._uniform_slot if self._uniform_slot != BASE_SLOT else None

    @contextmanager
    def rows(self, segments: Sequence[Segment] | None) -> Iterator[None]:
        """Run a forward pass over flattened tokens, `[1, num_tokens, …]`, with these segments.

        Args:
            segments: `(start, end, slot)`, covering all rows in order; slot −1 for base rows. None: all base.

        Raises:
            RuntimeError: another pass is running.
            ValueError: the segments have gaps or overlaps.
        """
        rows = ops.row_segments(segments, self.device, self._tile_buffer) if segments else None
        with self._open():
            self._rows, self.is_active = rows, rows is not None
            yield

    @contextmanager
    def uniform(self, slot: int | None) -> Iterator[None]:
        """Run a forward pass in which all rows, however many a layer sees, take one slot (−1 or None: the base).

        Raises:
            RuntimeError: another pass is running.
        """
        with self._open():
            self._uniform_slot = BASE_SLOT if slot is None else slot
            self.is_active = self._uniform_slot != BASE_SLOT
            yield

    def rows_of(self, num_rows: int) -> RowSegments | None:
        """Return the assignment for a layer that sees `num_rows` rows.

        Raises:
            RuntimeError: the segments describe another number of rows, so adapters would land on wrong ones.
        """
        if self._rows is None:
            if num_rows not in self._uniform_rows:
                segment = (0, num_rows, self._uniform_slot)
                self._uniform_rows[num_rows] = ops.row_segments([segment], self.device)
            return self._uniform_rows[num_rows]
        if self._rows.num_rows != num_rows:
            raise RuntimeError(f"a LoRA layer sees {num_rows} rows, the segments describe {self._rows.num_rows}")
        return self._rows

    @contextmanager
    def _open(self) -> Iterator[None]:
        if self._is_open:
            raise RuntimeError("a forward pass with LoRA is already running; passes do not nest")
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = self.is_active = False
            self._rows, self._uniform_slot = None, BASE_SLOT
            self._uniform_rows.clear()


class LoRALinear(nn.Module):
    """Add the adapter in each row's slot to a Linear: `y = base(x) + scaling · (x Aᵀ) Bᵀ`.

    A pass without adapters calls the base and nothing else.

    Args:
        base: the wrapped module; its weight and bias stay reachable under their names.
        state: shared by all layers of the model.
        max_loras: number of slots.
    """

    def __init__(self, base: nn.Linear, state: LoRAState, max_loras: int) -> None:
        super().__init__()
        self.base = base
        self.state = state
        self.slots = SlotWeights(max_loras, base.weight.device)
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    def set_slot(self, slot: int, weights: LoRAWeights) -> None:
        """Put an adapter's matrices for this module into a slot."""
        self.slots.set(slot, weights.lora_A, weights.lora_B, weights.scaling)

    def clear_slot(self, slot: int) -> None:
        """Empty a slot."""
        self.slots.clear(slot)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[…, out_features]` for `x [..., in_features]`; its rows are all leading dimensions flattened."""
        y: torch.Tensor = self.base(x)
        if not self.state.is_active:
            return y
        flat_y = y.reshape(-1, self.out_features)
        rows = self.state.rows_of(flat_y.shape[0])
        if rows is not None:
            ops.lora_apply(flat_y, x.reshape(-1, self.in_features), self.slots, rows)
        return flat_y.view(y.shape)
