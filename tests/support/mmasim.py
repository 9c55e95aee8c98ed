"""MMA-Sim beside our simulated tensor cores: operands, its models, and results of it on record.

MMA-Sim (arXiv 2511.10909) is an independent model, which its authors compared with the GPUs. Its
package names no licence, so nothing of it is copied or required: it is installed for the
comparison (`make test-mmasim`), and `data/mmasim.jsonl` has what it answered. To write that anew:

    PYTHONPATH=build/beside/mmasim python -m tests.support.mmasim
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from healpass.arithmetic.formats import BF16, FORMATS, FP16, FP32, FloatFormat

RECORD = Path(__file__).parents[1] / "data" / "mmasim.jsonl"
DTYPES = {fmt.name: fmt.dtype for fmt in (FP16, BF16)}
#: Rule -> MMA-Sim's name of the generation.
GENERATIONS = {
    "v100": "Volta",
    "a100": "Ampere",
    "ada": "Ada Lovelace",
    "h100": "Hopper",
    "h200": "Hopper",
    "b200": "Blackwell",
}
#: Quanta whose `edge` is on record: those of all rules beside zeros, and more on either side.
EDGES = range(-160, -151)
#: Other cases on record per rule and format.
RECORDED = 24

Model = Callable[[Tensor, Tensor], Tensor]


def integers(fmt: FloatFormat) -> torch.dtype:
    """The integer type as wide as a format, which holds its bits."""
    return torch.int16 if fmt.dtype.itemsize == 2 else torch.int32


def special(fmt: FloatFormat) -> list[float]:
    """Zeros, the smallest and largest subnormal and normal numbers, infinities, NaN, and ones."""
    top_subnormal = fmt.smallest_normal - fmt.smallest_subnormal
    sizes = (0.0, fmt.smallest_subnormal, top_subnormal, fmt.smallest_normal, 1.0)
    sizes += (1 + 2.0 ** (1 - fmt.precision), fmt.largest, float("inf"))
    return [sign * size for sign in (1, -1) for size in sizes] + [float("nan")]


@dataclass(frozen=True)
class Operands:
    """Two matrices filled with the numbers of a pool.

    Attributes:
        fmt: Of both.
        pool: Values; each is rounded to the format.
        shape: M, K, N.
        zeros: Share of elements that are zero besides.
        seed: Which number lies where.
    """

    fmt: FloatFormat
    pool: tuple[float, ...]
    shape: tuple[int, int, int]
    zeros: float
    seed: int

    def tensors(self) -> tuple[Tensor, Tensor]:
        """`[M, K]` and `[K, N]`."""
        generator = torch.Generator().manual_seed(self.seed)
        m, k, n = self.shape
        values = torch.tensor(self.pool, dtype=torch.float64).to(self.fmt.dtype)

        def filled(shape: tuple[int, int]) -> Tensor:
            chosen = values[torch.randint(len(values), shape, generator=generator)]
            hidden = torch.rand(shape, generator=generator) < self.zeros
            return chosen.masked_fill(hidden, 0.0)

        return filled((m, k)), filled((k, n))


def tiny(fmt: FloatFormat, seed: int, count: int = 40) -> tuple[float, ...]:
    """Numbers whose products lie around 2^-140, or as low as the format has them."""
    generator = torch.Generator().manual_seed(seed)
    low = max(-76, fmt.min_exponent)
    exponents = torch.randint(low, low + 12, (count,), generator=generator)
    return tuple((torch.randn(count, generator=generator).double() * 2.0**exponents).tolist())


#: Numbers of k ones, as products of two numbers of 8 bits.
_ONES = {9: (7, 73), 10: (33, 31), 11: (23, 89)}


def edge(quantum: int) -> tuple[Tensor, Tensor]:
    """Two products in BF16 that add to 2^-149 if multiples of 2^quantum are kept, and else to 0.

    One is 2^-149 less 2^quantum, the other is 2^quantum; both lie below the exponents of zero.

    Args:
        quantum: -152 to -160.
    """
    ones = FP32.min_exponent - FP32.precision + 1 - quantum
    x, y = _ONES.get(ones, ((1 << ones) - 1, 1))
    unit = 2.0 ** (quantum + 79)
    a, b = torch.tensor([[x * unit, unit]]), torch.tensor([[y * 2.0**-79], [2.0**-79]])
    return a.bfloat16(), b.bfloat16()


def bits(x: Tensor) -> Tensor:
    """FP32 as integers, NaN as one of them."""
    found = x.view(torch.int32)
    return torch.where(x.isnan(), torch.tensor(float("nan")).view(torch.int32), found)


def disagreements(x: Tensor, y: Tensor) -> int:
    """Elements with other bits, signs of zeros included; a NaN is a NaN."""
    return int((bits(x) != bits(y)).sum())


# ----------------------------------------------------------------------------- MMA-Sim's models


def models(rule: str, fmt: FloatFormat) -> dict[str, Model]:
    """MMA-Sim's models of the instructions that a rule stands for, by name.

    A V100 has no instruction for BF16; its entry is the model that MMA-Sim's tables describe.

    Args:
        rule: A tensor core's, or `sgemm`.
        fmt: Of the operands.
    """
    sim = importlib.import_module("mmasim.nv_ptx.sim")
    if rule == "sgemm":
        found: dict[str, Any] = {"fma": importlib.import_module("mmasim.arithmetic.fma").MMA_FMA()}
    else:
        found = _instructions(sim, rule, {"fp16": "f16", "bf16": "bf16"}[fmt.name])
    return {name: _from_zero(operation) for name, operation in found.items()}


def _instructions(sim: Any, rule: str, ptx: str) -> dict[str, Any]:
    name = GENERATIONS[rule]
    if (rule, ptx) == ("v100", "bf16"):
        fdpa = importlib.import_module("mmasim.arithmetic.fdpa")
        described = fdpa.MMA_T_FDPA(
            sim._mma_F_bits[name],
            "RZ-FP32",
            sim._mma_L_max_bytes[name] // BF16.dtype.itemsize,
            sim._mma_e_zero_for_fp32[name],
            ptx,
            ptx,
        )
        return {"tables": described}
    shape = "m8n8k4" if rule == "v100" else "m16n8k16"
    found = {"mma": sim.MMA(name, f"{shape}.f32.{ptx}.{ptx}.f32")}
    if name == "Hopper":
        found["wgmma"] = sim.WGMMA(name, f"m64n8k16.f32.{ptx}.{ptx}")
    if name == "Blackwell":
        found["tcgen05"] = sim.TCGen05MMA(name, f"m64n8k16.kind::f16.f32.{ptx}.{ptx}")
    return found


def _from_zero(operation: Any) -> Model:
    def product(a: Tensor, b: Tensor) -> Tensor:
        """`a @ b`, instruction after instruction on an accumulator of zeros."""
        (m, _), n = a.shape, b.shape[1]
        left, right = a[:, None].expand(-1, n, -1), b.t()[None].expand(m, -1, -1)
        result: Tensor = operation.dpa(left, right, torch.zeros(m, n))
        return result

    return product


# ------------------------------------------------------------------------------- results on record


@dataclass(frozen=True)
class Case:
    """A dot product, and MMA-Sim's answer.

    Attributes:
        rule: A rule's name.
        fmt: Of the operands.
        a: `[1, K]`.
        b: `[K, 1]`.
        answer: FP32 `[1, 1]`.
    """

    rule: str
    fmt: FloatFormat
    a: Tensor
    b: Tensor
    answer: Tensor


def recorded() -> list[Case]:
    """The cases of the file."""
    lines = map(json.loads, RECORD.read_text(encoding="utf-8").splitlines())
    return [
        Case(
            line["rule"],
            FORMATS[DTYPES[line["format"]]],
            _read(line["a"], DTYPES[line["format"]])[None],
            _read(line["b"], DTYPES[line["format"]])[:, None],
            _read(line["answer"], FP32.dtype)[None],
        )
        for line in lines
    ]


def _read(text: str, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=dtype)


def _written(x: Tensor) -> str:
    return x.contiguous().flatten().view(torch.uint8).numpy().tobytes().hex()


def chosen(fmt: FloatFormat, count: int) -> Iterator[Operands]:
    """What is on record: in turn tiny numbers among zeros, special ones, and any."""
    finite = [value for value in special(fmt) if abs(value) < float("inf")]
    for seed in range(count):
        anything = torch.randint(-(1 << 15), 1 << 15, (16,), dtype=torch.int16,
                                 generator=torch.Generator().manual_seed(seed))  # fmt: skip
        pools: Sequence[Sequence[float]] = (
            tiny(fmt, seed),
            finite if seed % 8 < 4 else special(fmt),
            anything.view(fmt.dtype).double().tolist(),
            (*tiny(fmt, seed), *finite[:3]),
        )
        zeros = (0.7, 0.0, 0.2, 0.5)[seed % 4]
        yield Operands(fmt, tuple(pools[seed % 4]), (1, 1 + 3 * seed % 34, 1), zeros, seed)


def main() -> None:
    """Write the record anew."""
    lines = []
    for rule in ("v100", "a100", "h100", "b200"):
        for fmt in (FP16, BF16):
            model = next(iter(models(rule, fmt).values()))
            pairs = [operands.tensors() for operands in chosen(fmt, RECORDED)]
            for a, b in pairs + [edge(quantum) for quantum in EDGES if fmt is BF16]:
                line = {"rule": rule, "format": fmt.name, "a": _written(a), "b": _written(b)}
                lines.append(json.dumps(line | {"answer": _written(model(a, b))}))
    RECORD.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
