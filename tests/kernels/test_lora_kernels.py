"""Triton kernels equal their PyTorch references: interpreted on the CPU, compiled on a GPU."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Run = Callable[[dict], dict]

# Largest difference of an output; both sides round y once, so in 16 bits it is a unit in the last place of y < 16.
TOLERANCE = {"float32": 1e-5, "float16": 2**-7, "bfloat16": 2**-4}
# Share of outputs that may differ at all: few if both sides round once, many if h is rounded, too. Only for fp16: fp32
# differs in its last bits, and Triton's interpreter truncates to bf16 instead of rounding.
UNEQUAL = {"float16": 0.03}

SEGMENTS = {
    "one-row": [(0, 1, 0)],
    "one-slot": [(0, 37, 2)],
    "base-between": [(0, 5, -1), (5, 6, 0), (6, 30, -1), (30, 47, 2), (47, 50, -1)],
    "empty-segments": [(0, 0, 1), (0, 16, 0), (16, 16, 2), (16, 33, 2), (33, 33, -1)],
    "slot-without-weights": [(0, 3, 0), (3, 20, 1), (20, 21, 2)],
    "slot-twice": [(0, 17, 0), (17, 18, 2), (18, 35, 0)],
}


def case(
    segments: str = "base-between", in_: int = 33, out: int = 50, ranks: tuple[int, int, int] = (7, 0, 40)
) -> dict:
    return {"seed": 0, "dtype": "float32", "in": in_, "out": out, "ranks": ranks, "segments": SEGMENTS[segments]}


def worker(device: str) -> Iterator[Run]:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if device == "cpu" else "0", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.kernels.interpreter_worker", device]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, cwd=root, text=True) as process:

        def run(case: dict) -> dict:
            process.stdin.write(json.dumps(case) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            assert line, f"the worker died on {case}"
            return json.loads(line)

        yield run
        process.stdin.close()


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Run]:
    yield from worker("cpu")


@pytest.fixture(scope="module")
def compiled() -> Iterator[Run]:
    yield from worker("cuda")


def check(run: Run, case: dict) -> None:
    measured = run(case)
    tolerance = TOLERANCE[case["dtype"]]
    assert measured["change"] > 0.1, "the case would pass without any LoRA"
    for half in ("shrink", "expand", "apply"):
        assert measured[half] <= tolerance, half
    assert measured["unequal"] <= UNEQUAL.get(case["dtype"], 1.0)
    for property in ("base_rows_untouched", "alone_equal", "padded_equal", "repeat_equal"):
        assert measured[property], property


@pytest.mark.parametrize("segments", SEGMENTS)
def test_any_division_into_segments(interpreted: Run, segments: str) -> None:
    check(interpreted, case(segments))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_dtype(interpreted: Run, dtype: str) -> None:
    check(interpreted, {**case(), "dtype": dtype})


@pytest.mark.parametrize(
    ("in_", "out"), [(1, 1), (64, 64), (65, 129), (300, 7), (1100, 7), (4097, 7)], ids=lambda size: str(size)
)
def test_odd_feature_sizes(interpreted: Run, in_: int, out: int) -> None:
    check(interpreted, case(in_=in_, out=out))


@pytest.mark.parametrize("ranks", [(1, 0, 320), (2, 8, 16), (31, 33, 64), (255, 1, 256)], ids=str)
def test_every_slot_at_its_own_rank(interpreted: Run, ranks: tuple[int, int, int]) -> None:
    check(interpreted, case(ranks=ranks))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("ranks", [(7, 0, 40), (1, 0, 320), (64, 16, 256)], ids=str)
def test_compiled(compiled: Run, dtype: str, segments: str, ranks: tuple[int, int, int]) -> None:
    check(compiled, {**case(segments, in_=1301, out=517, ranks=ranks), "dtype": dtype})
