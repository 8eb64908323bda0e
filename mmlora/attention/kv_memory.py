"""How much memory the KV cache takes, and how many blocks fit into what there is."""

import torch
from transformers import PretrainedConfig

from mmlora.config import EngineArgs
from mmlora.errors import ConfigError

DEFAULT_CPU_KV_BYTES = 2**30


def kv_shape(config: PretrainedConfig) -> tuple[int, int]:
    """Return the number of key-value heads and their size."""
    text = config.get_text_config()
    num_heads: int = text.num_attention_heads
    num_kv_heads = getattr(text, "num_key_value_heads", None) or num_heads
    return num_kv_heads, getattr(text, "head_dim", None) or text.hidden_size // num_heads


def kv_token_bytes(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Return the bytes of one token in all layers."""
    num_kv_heads, head_dim = kv_shape(config)
    num_layers: int = config.get_text_config().num_hidden_layers
    return 2 * num_layers * num_kv_heads * head_dim * dtype.itemsize


def kv_cache_bytes(args: EngineArgs, device: torch.device, weight_bytes: int = 0) -> int:
    """Return the memory that the cache may take.

    Args:
        args: options of the engine.
        device: that the cache is on.
        weight_bytes: of a model that is yet to be loaded.
    """
    if args.kv_cache_memory_bytes is not None:
        return args.kv_cache_memory_bytes
    if device.type != "cuda":
        return DEFAULT_CPU_KV_BYTES
    free, total = torch.cuda.mem_get_info(device)
    return int(free - weight_bytes - (1 - args.gpu_memory_utilization) * total)


def num_kv_blocks(
    args: EngineArgs, config: PretrainedConfig, dtype: torch.dtype, num_bytes: int, max_model_len: int
) -> int:
    """Return how many blocks the memory holds, at most as many as all sequences can use.

    Raises:
        ConfigError: not even one sequence of `max_model_len` fits.
    """
    block_bytes = args.block_size * kv_token_bytes(config, dtype)
    blocks_per_seq = -(-max_model_len // args.block_size)
    num_blocks = num_bytes // block_bytes
    if num_blocks < blocks_per_seq:
        raise ConfigError(
            f"the KV cache of {num_bytes} bytes holds {max(0, num_blocks) * args.block_size} tokens, less than "
            f"max_model_len={max_model_len}: give kv_cache_memory_bytes={blocks_per_seq * block_bytes} or more, "
            "or a smaller max_model_len"
        )
    return min(num_blocks, blocks_per_seq * args.max_num_seqs * 2)
