"""Features of a picture for deeper layers of the decoder, beside those at its entry (deepstack).

Source: https://arxiv.org/abs/2406.04334.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


def deep_layers(output: Any) -> dict[int, Any]:
    """Return features by the layer before which they are added; no layer for a model without deepstack.

    Args:
        output: of `get_image_features`; its `deepstack_features` are pairs of a layer and features, or just features,
            which are added after each of the first layers.
    """
    found: Sequence[Any] = getattr(output, "deepstack_features", None) or ()
    has_layers = bool(found) and isinstance(found[0][0], int)
    return dict(found if has_layers else enumerate(found, start=1))


@contextmanager
def added_features(decoder: Any, mask: torch.Tensor, features: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """Have a decoder add features to its hidden states, in the forward inside the block.

    Args:
        decoder: with `layers` and, after them, `norm`.
        mask: `[num_tokens]` bool, the tokens that take features.
        features: by the layer before which they are added, `[num_masked, hidden_size]`.
    """

    def adding(rows: torch.Tensor) -> Any:
        def add(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            hidden_states = args[0].clone()  # [1, num_tokens, hidden_size]
            hidden_states[:, mask] += rows.to(hidden_states.dtype)
            return (hidden_states, *args[1:])

        return add

    modules = [*decoder.layers, decoder.norm]
    with ExitStack() as stack:
        for layer, rows in features.items():
            stack.callback(modules[layer].register_forward_pre_hook(adding(rows)).remove)
        yield
