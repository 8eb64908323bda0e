"""Check at load that a decoder computes the same logits on the paged KV cache as with its own attention.

A few dozen random tokens run through the decoder twice: with its own attention and masks, and in two chunks on the
paged cache. This detects models that rely on their own masks or on an attention variant that the engine lacks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from mmlora.attention.backend import ATTENTION_NAME, AttentionBackend, Span, attention_context
from mmlora.attention.kv_cache import KVLayout
from mmlora.errors import ConfigError
from mmlora.towers.base import Towers
from mmlora.towers.general import decoder_inputs
from mmlora.utils.library_errors import LIBRARY_ERRORS

NUM_TOKENS, CHUNK = 40, 23
TEST_WINDOW = 8
# Relative to the standard deviation of the logits. In a random Llama of 24 layers and width 2048, rounding alone causes
# 0.03 in bfloat16, 0.003 in float16 and 1e-6 in float32.
MAX_ERROR = {torch.float32: 3e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def check_decoder(
    model: Any, towers: Towers | None, backend: AttentionBackend, layout: KVLayout, max_model_len: int
) -> None:
    """Compare a decoder's logits on the paged KV cache with those of its own attention.

    Args:
        model: a loaded model, its decoder on paged attention.
        towers: of the model, None for a text-only one.
        backend: implements the attention.
        layout: of the KV cache.
        max_model_len: the longest sequence to serve.

    Raises:
        ConfigError: the logits differ, or the decoder does not run on the paged cache.
    """
    text_config, name = model.config.get_text_config(), type(model).__name__
    error = _error(model, towers, backend, layout)
    if not error <= MAX_ERROR[model.dtype]:
        raise ConfigError(
            f"{name} computes other logits on a paged KV cache than with its own attention (off by {error:.1%} of "
            "their standard deviation): this engine does not support its attention"
        )
    window = getattr(text_config, "sliding_window", None)
    if window is None or window >= max_model_len:
        return
    with _window(model, text_config, TEST_WINDOW):
        error = _error(model, towers, backend, layout)
    if not error <= MAX_ERROR[model.dtype]:
        raise ConfigError(
            f"{name} applies its sliding window of {window} tokens in its masks only, which this engine does not use; "
            f"serve it with max_model_len={window} or less"
        )


@torch.inference_mode()
def _error(model: Any, towers: Towers | None, backend: AttentionBackend, layout: KVLayout) -> float:
    """Return the relative error of the logits, the larger of both chunks.

    The error of a token is the root mean square over the vocabulary, since the largest error grows with the vocabulary.
    The error of a chunk is the median over its tokens, since in half precision a router may send single tokens to other
    experts.
    """
    embedding = model.get_input_embeddings()
    device, name = embedding.weight.device, type(model).__name__
    ids = torch.randint(len(embedding.weight), (1, NUM_TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    positions = torch.arange(NUM_TOKENS, device=device)[None]
    inputs = {**decoder_inputs(model, towers, ids[0]), "position_ids": positions}
    try:
        with _attention(model, "eager"):
            expected = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0].float()
    except LIBRARY_ERRORS as error:
        raise ConfigError(f"{name} cannot run on plain text with its own attention: {error}") from error
    if not expected.isfinite().all():
        dtype = str(model.dtype).removeprefix("torch.")
        raise ConfigError(
            f"{name} computes NaN or infinity for plain text in dtype={dtype!r}; its weights need another dtype"
        )
    cache = backend.allocate(replace(layout, block_size=NUM_TOKENS), 1, device)
    errors = []
    for start, end in ((0, CHUNK), (CHUNK, NUM_TOKENS)):
        chunk = {key: value[:, start:end] for key, value in inputs.items()}
        try:
            with attention_context(backend.build_metadata(cache, [Span((0,), start, end)])):
                logits = model(**chunk, use_cache=False).logits[0].float()
        except LIBRARY_ERRORS as error:
            raise ConfigError(f"{name} cannot run on a paged KV cache: {error}") from error
        scale = expected[start:end].std(dim=-1).clamp_min(1e-6)
        errors.append(float(((logits - expected[start:end]).square().mean(dim=-1).sqrt() / scale).median()))
    return max(errors)


@contextmanager
def _attention(model: Any, name: str) -> Iterator[None]:
    part = "text_config" if model.config.get_text_config() is not model.config else ""
    model.set_attn_implementation({part: name})
    try:
        yield
    finally:
        model.set_attn_implementation({part: ATTENTION_NAME})


@contextmanager
def _window(model: Any, text_config: Any, window: int) -> Iterator[None]:
    """Shorten the sliding window in the configuration (for masks) and in the layers (for attention)."""
    changed = [(text_config, text_config.sliding_window)]
    changed += [(m, m.sliding_window) for m in model.modules() if isinstance(getattr(m, "sliding_window", None), int)]
    for owner, _ in changed:
        owner.sliding_window = window
    try:
        yield
    finally:
        for owner, value in changed:
            owner.sliding_window = value
