"""Times of one linear layer after another, side by side: `python -m tests.gpu.bench [FOLDER]`.

Prints a table and writes `templates.csv` into the folder; what the time did not reach stands in
both as "not measured". Every contender is captured in a CUDA
graph that goes through enough copies of the weight to defeat the L2 cache, so that launches cost
nothing and decode reads its weight from memory; a time is the median over replays, per call.
"""

from __future__ import annotations

import csv
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import triton
from torch import Tensor

from healpass.bench.products import PRODUCTS
from healpass.lowering.cuda import selfcheck_matmul

#: (out, in) features: q, k and v; output; gate and up; down.
MODELS = {
    "llama-3-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "smollm2-135m": ((960, 576), (576, 576), (3072, 576), (576, 1536)),
}
ROWS = (2048, 1, 8192, 8, 512, 64)
#: The contenders, in the order of the table; the first is what the ratios are to.
NAMES = (
    "bf16",
    "bf16_out_fp32",
    "bf16_invariant",
    "fp32",
    "layercast_published",
    "tf32x3",
    "bf16x6",
    "heal",
    "heal_m_invariant",
    "layercast",
    "exact",
)
REPLAYS = 15
#: No new layer is begun after this; cells that were not reached say so.
SECONDS = 150
#: Bytes of weights that one graph goes through, several times an H100's L2 cache of 50 MB.
WEIGHT_BYTES = 256 << 20


@dataclass(frozen=True)
class Contender:
    """One way to multiply: how, and in which dtypes its operands come."""

    product: Callable[[Tensor, Tensor], Tensor]
    x: torch.dtype = torch.float32
    weight: torch.dtype = torch.bfloat16


def compiled(numerics: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Ours, through Inductor."""
    multiply = selfcheck_matmul.on_gpu(torch.cuda.current_device(), fresh=False)
    return lambda x, weight: multiply(x, weight.t(), numerics)


def contenders() -> dict[str, Contender]:
    """Everything that is compared, by the names in `NAMES`."""
    bf16, fp32 = torch.bfloat16, torch.float32
    return {
        "bf16": Contender(lambda x, w: torch.mm(x, w.t()), x=bf16),
        "bf16_out_fp32": Contender(
            lambda x, w: torch.mm(x, w.t(), out_dtype=torch.float32), x=bf16
        ),
        "bf16_invariant": Contender(PRODUCTS["invariant"], x=bf16),
        "fp32": Contender(lambda x, w: torch.mm(x, w.t()), weight=fp32),
        "layercast_published": Contender(lambda x, w: torch.mm(x, w.float().t())),
        "tf32x3": Contender(PRODUCTS["tf32x3"]),
        "bf16x6": Contender(PRODUCTS["bf16x6"]),
        "heal": Contender(compiled("heal")),
        "heal_m_invariant": Contender(compiled("heal:::m_invariant")),
        "layercast": Contender(compiled("layercast")),
        "exact": Contender(exact()),
    }


def exact() -> Callable[[Tensor, Tensor], Tensor]:
    """Ours by integer digits, with the settings that `precision="exact"` compiles with."""
    options = {"precision": "exact"}
    return torch.compile(
        lambda x, weight: torch.ops.heal.mm(x, weight.t(), "exact5"),
        backend="heal",
        dynamic=False,
        options=options,
    )


@dataclass(frozen=True)
class Row:
    """One line of the CSV; a time that was not taken is None there."""

    model: str
    m: int
    n: int
    k: int
    contender: str
    microseconds: float | None
    to_bf16: float | None
    error_to_fp64: float | None
    gpu: str
    torch: str
    triton: str
    command: str


def time_call(contender: Contender, x: Tensor, weights: list[Tensor]) -> float:
    """Median microseconds per call, over replays of one CUDA graph through all copies."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for weight in weights[:2]:
            contender.product(x, weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            contender.product(x, weight)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(weights))
    return statistics.median(times)


def measure(model: str, m: int, n: int, k: int) -> Iterator[Row]:
    """Every contender on one layer."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    x = torch.randn(m, k, device="cuda", generator=generator)
    weight = torch.randn(n, k, device="cuda", generator=generator).div(k**0.5).bfloat16()
    few = min(m, 64)
    exact = x[:few].double() @ weight.double().t()
    baseline = None
    for name, contender in contenders().items():
        torch._dynamo.reset()
        operand, own = x.to(contender.x), weight.to(contender.weight)
        copies = max(1, min(64, WEIGHT_BYTES // (own.numel() * own.element_size())))
        weights = [own.clone() for _ in range(copies if m <= 64 else 2)]
        error = (contender.product(operand, own)[:few].double() - exact).norm() / exact.norm()
        taken = time_call(contender, operand, weights)
        baseline = baseline or taken
        yield Row(
            model, m, n, k, name, round(taken, 2), round(taken / baseline, 3), float(error),
            *provenance(),
        )  # fmt: skip


def provenance() -> tuple[str, str, str, str]:
    """GPU, versions of torch and Triton, and the command."""
    command = shlex.join(["python", "-m", "tests.gpu.bench", *sys.argv[1:]])
    return torch.cuda.get_device_name(), torch.__version__, triton.__version__, command


def unmeasured(model: str, m: int, n: int, k: int) -> Iterator[Row]:
    """Lines of a layer that the time did not reach."""
    for name in NAMES:
        yield Row(model, m, n, k, name, None, None, None, *provenance())


def cells(row: Row) -> dict[str, object]:
    """A line as the CSV holds it."""
    return {k: "not measured" if v is None else v for k, v in asdict(row).items()}


def summary(rows: list[Row]) -> Iterator[str]:
    """Per model and number of rows: total of a block's layers, and the ratios that matter."""
    names = NAMES
    titles = "".join(f"{name[:13]:>14}" for name in names)
    yield f"model            M {titles}  heal/bf16  exact/bf16  fp32/heal  cut"
    for model, layers in MODELS.items():
        for m in ROWS:
            taken = {
                name: [
                    r.microseconds
                    for r in rows
                    if (r.model, r.m, r.contender) == (model, m, name) and r.microseconds
                ]
                for name in names
            }
            if any(len(times) < len(layers) for times in taken.values()):
                yield f"{model:13} {m:>5}  not measured"
                continue
            total = {name: sum(times) for name, times in taken.items()}
            ratios = [total[name] / total["bf16"] for name in ("heal", "exact")]
            slower = total["fp32"] / total["heal"]
            cut = (total["fp32"] - total["bf16"]) / max(total["heal"] - total["bf16"], 1e-9)
            times = "".join(f"{total[name]:>14.1f}" for name in names)
            columns = f"{ratios[0]:>9.2f}  {ratios[1]:>10.2f}  {slower:>9.2f}  {cut:.1f}"
            yield f"{model:13} {m:>5} {times}  {columns}"


def points() -> Iterator[tuple[str, int, tuple[int, int]]]:
    """Models, rows and layers, in order of interest: what the time does not reach comes last."""
    for model, layers in MODELS.items():
        for m in ROWS:
            for layer in layers:
                yield model, m, layer


def main() -> None:
    """Measure everything; rows go to the CSV as they come."""
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    rows: list[Row] = []
    deadline = time.monotonic() + SECONDS
    with (folder / "templates.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for model, m, (n, k) in points():
            late = time.monotonic() > deadline
            for row in (unmeasured if late else measure)(model, m, n, k):
                rows.append(row)
                writer.writerow(cells(row))
            file.flush()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    )
    print("microseconds for the four linear layers of a block, medians")
    print("\n".join(summary(rows)))


if __name__ == "__main__":
    main()
