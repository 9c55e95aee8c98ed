"""Times of attention, side by side: `python -m tests.gpu.bench_attention [FOLDER]`.

Prefill of 2k to 32k tokens, causal, and decode of one token against 1k to 128k keys, with the
heads of Llama-3-8B. Prints a table and writes `attention.csv` into the folder. Every contender is
captured in a CUDA graph that goes through enough copies of the cache to defeat the L2 cache; a
time is the median over replays, per call. Digits are made beforehand, as a cache has them.
"""

from __future__ import annotations

import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from healpass import lowering
from healpass.ops.attention.scoring import Scoring

HEADS, KEY_HEADS, SIZE = 32, 8, 128
#: Queries and keys, in order of interest: what the time does not reach comes last.
POINTS = (
    (2048, 2048), (1, 8192), (8192, 8192), (1, 131072), (1, 1024), (1, 32768), (16384, 16384),
    (32768, 32768),
)  # fmt: skip
REPLAYS = 9
#: No new point is begun after this; those that were not reached say so.
SECONDS = 150
#: Bytes of keys and values that one decode graph goes through, several times an H100's L2 cache.
CACHE_BYTES = 256 << 20
#: A score matrix of FP32 math beyond this is not tried.
LARGEST_MATRIX = 8 << 30

Attend = Callable[..., Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to attend: how, and how its operands are made of FP32 ones."""

    attend: Attend
    prepare: Callable[[Tensor], tuple[Tensor, ...]]


def torch_attention(backend: SDPBackend) -> Attend:
    """torch's SDPA by one of its backends."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            causal = query.shape[-2] > 1
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=causal, enable_gqa=key.shape[1] < HEADS
            )

    return attend


def ours() -> tuple[Attend, Attend]:
    """Integer and FP32 attention, through Inductor."""
    lowering.register()

    def scoring(query: Tensor) -> tuple[object, ...]:
        return Scoring(SIZE**-0.5, is_causal=query.shape[-2] > 1).arguments

    @torch.compile(fullgraph=True, dynamic=False)
    def integers(*digits: Tensor) -> Tensor:
        return torch.ops.heal.integer_attention(*digits, *scoring(digits[0]), "heal")[0]

    @torch.compile(fullgraph=True, dynamic=False)
    def floats(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.ops.heal.attention(query, key, value, *scoring(query), "heal")[0]

    return integers, floats


def exact() -> Attend:
    """Exact attention, with the settings that `precision="exact"` compiles with."""

    def digits(*states: Tensor) -> Tensor:
        scoring = Scoring(SIZE**-0.5, is_causal=states[0].shape[-2] > 1)
        return torch.ops.heal.integer_attention(*states, *scoring.arguments, "exact5")[0]

    return torch.compile(digits, backend="heal", dynamic=False, options={"precision": "exact"})


def contenders() -> dict[str, Contender]:
    """Everything that is compared; the first is what the ratios are to."""
    integers, floats = ours()

    def bf16(x: Tensor) -> tuple[Tensor, ...]:
        return (x.bfloat16(),)

    def fp32(x: Tensor) -> tuple[Tensor, ...]:
        return (x,)

    def repeated(x: Tensor) -> tuple[Tensor, ...]:
        """Beforehand, because this backend has no grouped heads."""
        return (x.repeat_interleave(HEADS // x.shape[1], 1),)

    return {
        "flash_bf16": Contender(torch_attention(SDPBackend.FLASH_ATTENTION), bf16),
        "cudnn_bf16": Contender(torch_attention(SDPBackend.CUDNN_ATTENTION), bf16),
        "efficient_fp32": Contender(torch_attention(SDPBackend.EFFICIENT_ATTENTION), repeated),
        "math_fp32": Contender(torch_attention(SDPBackend.MATH), fp32),
        "heal_int16": Contender(integers, lambda x: torch.ops.heal.quantize(x, "int16")),
        "heal_int24": Contender(integers, lambda x: torch.ops.heal.quantize(x, "int24")),
        "heal_fp32": Contender(floats, fp32),
        "exact_int16": Contender(exact(), lambda x: torch.ops.heal.quantize(x, "int16")),
    }


@dataclass(frozen=True)
class Row:
    """One line of the CSV."""

    queries: int
    keys: int
    contender: str
    microseconds: float | None
    to_flash: float | None
    why_not: str
    gpu: str
    torch: str
    triton: str


def time_call(attend: Attend, copies: list[tuple[Tensor, ...]]) -> float:
    """Median microseconds per call, over replays of one CUDA graph through all copies."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for operands in copies[:2]:
            attend(*operands)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for operands in copies:
            attend(*operands)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(copies))
    return statistics.median(times)


def states(queries: int, keys: int) -> list[Tensor]:
    """Q, K and V in FP32."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    shapes = ((1, HEADS, queries, SIZE), *((1, KEY_HEADS, keys, SIZE),) * 2)
    return [torch.randn(shape, device="cuda", generator=generator) for shape in shapes]


def time_contender(contender: Contender, queries: int, keys: int) -> tuple[float | None, str]:
    """Microseconds, or why there are none."""
    operands = tuple(part for x in states(queries, keys) for part in contender.prepare(x))
    size = sum(x.numel() * x.element_size() for x in operands)
    count = max(1, min(64, CACHE_BYTES // size)) if queries == 1 else 1
    copies = [tuple(x.clone() for x in operands) for _ in range(count)]
    try:
        return time_call(contender.attend, copies), ""
    except RuntimeError as error:  # a backend that torch has not got for these operands
        return None, str(error).splitlines()[0]


def measure(queries: int, keys: int) -> Iterator[Row]:
    """Every contender at one point."""
    baseline = None
    for name, contender in contenders().items():
        torch._dynamo.reset()
        taken, why_not = None, "its score matrix is too large"
        if name != "math_fp32" or 4 * HEADS * queries * keys <= LARGEST_MATRIX:
            taken, why_not = time_contender(contender, queries, keys)
        baseline = baseline or taken
        ratio = None if taken is None or baseline is None else round(taken / baseline, 3)
        yield Row(
            queries, keys, name, taken, ratio, why_not,
            torch.cuda.get_device_name(), torch.__version__, triton.__version__,
        )  # fmt: skip


def main() -> None:
    """Measure everything; rows go to the CSV as they come."""
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    deadline = time.monotonic() + SECONDS
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    )
    print("queries   keys  contender          microseconds  to flash BF16")
    with (folder / "attention.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for queries, keys in POINTS:
            if time.monotonic() > deadline:
                print(f"{queries:>7} {keys:>6}  not measured")
                continue
            for row in measure(queries, keys):
                writer.writerow(asdict(row))
                cells = row.why_not or f"{row.microseconds:>12.1f}  {row.to_flash}"
                print(f"{queries:>7} {keys:>6}  {row.contender:16} {cells}", flush=True)
            file.flush()


if __name__ == "__main__":
    main()
