"""Paged KV cache of one model: its layout, its tensors, and how many blocks fit into memory."""

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from mmlora.config import EngineArgs
from mmlora.errors import ConfigError

DEFAULT_CPU_KV_BYTES = 2**30


@dataclass(frozen=True)
class KVLayout:
    """Shape and type of the keys and values in one block of a model's KV cache."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens
    dtype: torch.dtype

    @classmethod
    def from_config(cls, config: PretrainedConfig, block_size: int, dtype: torch.dtype) -> "KVLayout":
        """Return the layout for a model's configuration."""
        text = config.get_text_config()
        num_heads: int = text.num_attention_heads
        num_kv_heads = getattr(text, "num_key_value_heads", None) or num_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // num_heads
        return cls(text.num_hidden_layers, num_kv_heads, head_dim, block_size, dtype)

    @property
    def block_bytes(self) -> int:
        """Size of one block in all layers."""
        return 2 * self.num_layers * self.block_size * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class KVCache:
    """Keys and values of every layer, in blocks; allocated by an `AttentionBackend`, which chooses their shape."""

    block_size: int  # tokens
    keys: torch.Tensor  # [num_layers, ...]
    values: torch.Tensor  # [num_layers, ...]

    @property
    def num_bytes(self) -> int:
        """Size of keys and values."""
        return self.keys.nbytes + self.values.nbytes


def kv_cache_bytes(args: EngineArgs, device: torch.device, weight_bytes: int = 0) -> int:
    """Return the memory available to the KV cache.

    Args:
        args: options of the engine.
        device: where the cache is allocated.
        weight_bytes: size of a model that is not loaded yet.
    """
    if args.kv_cache_memory_bytes is not None:
        return args.kv_cache_memory_bytes
    if device.type != "cuda":
        return DEFAULT_CPU_KV_BYTES
    free, total = torch.cuda.mem_get_info(device)
    return int(free - weight_bytes - (1 - args.gpu_memory_utilization) * total)


def fit_max_model_len(args: EngineArgs, block_bytes: int, num_bytes: int, max_model_len: int) -> int:
    """Return `max_model_len`, or what `num_bytes` hold if that is less and the option was not given."""
    num_tokens = num_bytes // block_bytes * args.block_size
    if args.max_model_len is not None or num_tokens < 1:
        return max_model_len
    return min(max_model_len, num_tokens)


def num_kv_blocks(args: EngineArgs, block_bytes: int, num_bytes: int, max_model_len: int) -> int:
    """Return how many blocks fit into `num_bytes`, capped at what `max_num_seqs` sequences can use.

    Raises:
        ConfigError: not even one sequence of `max_model_len` fits.
    """
    blocks_per_seq = -(-max_model_len // args.block_size)
    num_blocks = num_bytes // block_bytes
    if num_blocks < blocks_per_seq:
        raise ConfigError(
            f"the KV cache of {num_bytes} bytes holds {max(0, num_blocks) * args.block_size} tokens, less than "
            f"max_model_len={max_model_len}: give kv_cache_memory_bytes={blocks_per_seq * block_bytes} or more, "
            "or a smaller max_model_len"
        )
    return min(num_blocks, blocks_per_seq * args.num_seqs * 2)
