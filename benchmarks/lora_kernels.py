"""Compare the time of a Linear, of the LoRA kernels for it, and of one PyTorch product per adapter, as PEFT does it.

.venv/bin/python benchmarks/lora_kernels.py [--device cpu]
"""

import argparse
import platform
from collections.abc import Callable

import torch
import triton
from torch.nn.functional import linear
from torch.utils.benchmark import Timer
from triton.testing import do_bench

from mmlora.kernels import ops
from mmlora.kernels.slot_weights import SlotWeights

SHAPES = [(4096, 4096), (4096, 14336), (14336, 4096)]  # in, out
BATCHES = {
    "1 row": [1],
    "16 rows, 4 adapters": [4] * 4,
    "64 rows, 64 adapters": [1] * 64,
    "512 rows, 4 adapters": [128] * 4,
    "2,048 rows, 1 adapter": [2048],
}


def micros(call: Callable[[], object], device: torch.device) -> float:
    """Return the median time of a call in microseconds; on a GPU from a CUDA graph and with cold caches."""
    call()
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return 1000 * float(do_bench(graph.replay, warmup=5, rep=40, return_mode="median"))
    return 1e6 * Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=0.2).median


def row(in_features: int, out_features: int, rank: int, batch: str, device: torch.device, dtype: torch.dtype) -> str:
    """Measure one case and return its line of the table."""
    lengths = BATCHES[batch]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    segments = [(start, start + length, slot) for slot, (start, length) in enumerate(zip(starts, lengths, strict=True))]
    weights = SlotWeights(len(lengths), device)
    for slot in range(len(lengths)):
        lora_A = torch.randn(rank, in_features, device=device, dtype=dtype) / in_features**0.5
        weights.set(slot, lora_A, torch.randn(out_features, rank, device=device, dtype=dtype), 1.0)
    x = torch.randn(sum(lengths), in_features, device=device, dtype=dtype)
    base = torch.randn(out_features, in_features, device=device, dtype=dtype)
    y = linear(x, base)
    rows = ops.row_segments(segments, device)
    assert rows is not None

    def per_adapter() -> None:
        for start, end, slot in segments:
            y[start:end] += linear(linear(x[start:end], weights.lora_A[slot]), weights.lora_B[slot])  # type: ignore[arg-type]

    times = [
        micros(call, device)
        for call in (lambda: linear(x, base), lambda: ops.lora_apply(y, x, weights, rows), per_adapter)
    ]
    figures = " | ".join(f"{time:.0f}" for time in times)
    return (
        f"| {in_features} → {out_features}, r {rank} | {batch} | {figures} | {times[1] / times[0]:.2f} | "
        f"{times[2] / times[1]:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}, {options.dtype}; µs, medians\n")
    print("| Linear | batch | Linear alone | LoRA | products per adapter | LoRA / Linear | per adapter / LoRA |")
    print("|---|---|---|---|---|---|---|")
    for in_features, out_features in SHAPES:
        for rank in (16, 64):
            for batch in BATCHES:
                print(row(in_features, out_features, rank, batch, device, dtype), flush=True)


if __name__ == "__main__":
    main()
