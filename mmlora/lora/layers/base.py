"""Shared by all LoRA layers: `LoRAState`, the slot of each row in the forward pass, and the base class `LoRALayer`."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mmlora.kernels import ops
from mmlora.kernels.ops import BASE_SLOT, RowSegments, Segment, max_tiles
from mmlora.lora.weights import ModuleWeights


class LoRAState:
    """Row→slot assignment of the running forward pass. A pass without adapters need not open one.

    Args:
        device: of the model.
        max_num_rows, max_num_segments: of the largest step; with both, the device metadata have a fixed address and
            shape, so that CUDA graphs can be captured.
    """

    def __init__(self, device: torch.device, max_num_rows: int = 0, max_num_segments: int = 0) -> None:
        self.device = device
        self.is_active = False
        self._is_open = False
        self._rows: RowSegments | None = None
        self._logit_rows: RowSegments | None = None
        self._num_logit_rows: int | None = None
        self._uniform_slot = BASE_SLOT
        self._uniform_rows: dict[int, RowSegments | None] = {}
        self._tile_buffer: torch.Tensor | None = None
        if max_num_rows and ops.uses_triton(device):
            shape = (max_tiles(max_num_rows, max_num_segments), 3)
            self._tile_buffer = torch.full(shape, BASE_SLOT, dtype=torch.int32, device=device)

    @property
    def segments(self) -> tuple[Segment, ...] | None:
        """Adapter segments of the running pass; None outside of one, in `uniform`, and when all rows are base rows."""
        return self._rows.segments if self._rows is not None else None

    @property
    def uniform_slot(self) -> int | None:
        """Slot of all rows inside `uniform`; None elsewhere."""
        return self._uniform_slot if self._uniform_slot != BASE_SLOT else None

    @contextmanager
    def rows(
        self, segments: Sequence[Segment] | None, logit_segments: Sequence[Segment] | None = None
    ) -> Iterator[None]:
        """Run a forward pass over flattened tokens, `[1, num_tokens, …]`, with these segments.

        Args:
            segments: `(start, end, slot)`, covering all rows in order; slot −1 for base rows. None: all are base rows.
            logit_segments: the same for the rows of the output layer; by default, it processes all tokens.

        Raises:
            RuntimeError: another pass is running.
            ValueError: the segments have gaps or overlaps.
        """
        rows = ops.row_segments(segments, self.device, self._tile_buffer) if segments else None
        with self._open():
            self._rows = self._logit_rows = rows
            self.is_active = rows is not None
            if self.is_active and logit_segments is not None:
                self._logit_rows = ops.row_segments(logit_segments, self.device)
                self._num_logit_rows = logit_segments[-1][1] if logit_segments else 0
            yield

    @contextmanager
    def uniform(self, slot: int | None) -> Iterator[None]:
        """Run a forward pass with one slot for all rows, whose number may differ by layer (−1 or None: the base model).

        Raises:
            RuntimeError: another pass is running.
        """
        with self._open():
            self._uniform_slot = BASE_SLOT if slot is None else slot
            self.is_active = self._uniform_slot != BASE_SLOT
            yield

    def rows_of(self, num_rows: int, *, is_output_layer: bool = False) -> RowSegments | None:
        """Return the assignment for a layer with `num_rows` rows; None when none of them has an adapter.

        Raises:
            RuntimeError: the segments describe another number of rows, so adapters would apply to wrong rows.
        """
        if self._rows is None:
            if num_rows not in self._uniform_rows:
                segment = (0, num_rows, self._uniform_slot)
                self._uniform_rows[num_rows] = ops.row_segments([segment], self.device)
            return self._uniform_rows[num_rows]
        is_other = is_output_layer and self._num_logit_rows is not None
        known = self._num_logit_rows if is_other else self._rows.num_rows
        if known != num_rows:
            raise RuntimeError(f"a LoRA layer got {num_rows} rows, but the segments describe {known}")
        return self._logit_rows if is_other else self._rows

    @contextmanager
    def _open(self) -> Iterator[None]:
        if self._is_open:
            raise RuntimeError("a forward pass with LoRA is already running; passes do not nest")
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = self.is_active = False
            self._rows = self._logit_rows = self._num_logit_rows = None
            self._uniform_slot = BASE_SLOT
            self._uniform_rows.clear()


class LoRALayer(nn.Module, ABC):
    """Base class of the layers that wrap a module of the model and hold the changes of each slot as a patch.

    Without active adapters, `forward` only calls the wrapped module. Other attributes are those of the wrapped module.

    Args:
        base: the wrapped module.
        state: row assignment of the forward pass, shared by all layers of the model.
        max_loras: number of slots.
        is_output_layer: whether the module gets only the rows whose logits are needed, not all tokens.
    """

    base: Any  # any class of module
    _patches: dict[int, Any]  # by slot; each subclass has a type of patch

    def __init__(self, base: nn.Module, state: LoRAState, max_loras: int, *, is_output_layer: bool = False) -> None:
        super().__init__()
        self.base = base
        self.state = state
        self.max_loras = max_loras
        self.is_output_layer = is_output_layer
        self._patches = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    @abstractmethod
    def set_slot(self, slot: int, weights: ModuleWeights) -> None:
        """Load an adapter's weights for this module into a slot."""

    def clear_slot(self, slot: int) -> None:
        """Empty a slot."""
        self._patches.pop(slot, None)

    def rows_of(self, num_rows: int) -> RowSegments | None:
        """Return the slots of the rows in the running forward pass."""
        return self.state.rows_of(num_rows, is_output_layer=self.is_output_layer)

    def on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor on the device of the wrapped module."""
        return tensor.to(self.state.device, non_blocking=True)

    def parameters_on_device(self, weights: ModuleWeights) -> dict[str, torch.Tensor]:
        """Return the replaced parameters of an adapter on the device of the wrapped module."""
        return {name: self.on_device(tensor) for name, tensor in weights.parameters.items()}
