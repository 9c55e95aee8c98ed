"""Runs a small program through healpass in one of 72 settings and judges what comes out."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from healpass.config import HealConfig
from healpass.errors import HealError
from tests.programs import Program
from tests.programs.record import DTYPES
from tests.support.evaluating import evaluate, leaves, operand_tensors
from tests.support.judging import HALF_STEP, UNIT, Errors, Judge, U
from tests.support.rewriting import Rewritten

PRECISIONS = ("heal", "layercast", "exact")
OUTPUTS = ("traced", "fp32")


@dataclass(frozen=True)
class Setting:
    """How a program is run.

    Attributes:
        dtype: Of operands.
        dynamic: Whether sizes are symbols.
        grads: Whether gradients are taken.
        precision: Option of healpass.
        outputs: Option of healpass; with "fp32" Q, K and V are INT24, with "traced" the default.
    """

    dtype: torch.dtype
    dynamic: bool
    grads: bool
    precision: str
    outputs: str = "traced"

    def __str__(self) -> str:
        shapes, mode = ("static", "dynamic")[self.dynamic], ("no_grad", "grad")[self.grads]
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}-{shapes}-{mode}-{self.precision}-{self.outputs}"

    @property
    def kv(self) -> str | None:
        """The format of Q, K and V."""
        return "int24" if self.outputs == "fp32" and self.precision != "layercast" else None

    @property
    def config(self) -> HealConfig:
        """The options."""
        return HealConfig(precision=self.precision, outputs=self.outputs, kv=self.kv)

    def errors(self, program: Program) -> Errors:
        """What the arithmetic of the precision may do wrong."""
        step = HALF_STEP["fp32" if self.precision == "layercast" else self.kv or "int16"]
        unit = UNIT[self.dtype] if program.coarse else U
        stored = torch.bfloat16 if program.narrow else self.dtype
        return Errors(unit, step, stored if self.precision == "exact" else None)


def settings(outputs: tuple[str, ...] = OUTPUTS) -> list[Setting]:
    """The full product, neighbours differing in every factor."""
    flags = (False, True)
    every = [
        Setting(*factors)
        for factors in itertools.product(DTYPES, flags, flags, PRECISIONS, outputs)
    ]
    stride = next(s for s in (31, 29, 23, 7) if len(every) % s)  # prime to 72 and to 36
    return [every[i * stride % len(every)] for i in range(len(every))]


def fitted(setting: Setting, program: Program) -> Setting:
    """The setting with what the program has no meaning for left out."""
    dtype = setting.dtype if setting.dtype in program.dtypes else program.dtypes[0]
    grads = setting.grads and program.grads
    return Setting(dtype, setting.dynamic, grads, setting.precision, setting.outputs)


def compiled(program: Program, setting: Setting, inductor: bool) -> Callable[..., Any]:
    """The program as `backend="heal"` compiles it, or rewritten and run by plain torch."""
    config = setting.config
    if not inductor:
        return Rewritten(program.run, config, aot=True, dynamic=setting.dynamic)
    options = {"precision": config.precision, "outputs": config.outputs, "kv": config.kv}
    return torch.compile(program.run, backend="heal", dynamic=setting.dynamic, options=options)


def observed(program: Program, setting: Setting, call: Callable[..., Any]) -> float:
    """The largest observed/bound of one run of `call`, a compiled form of the program.

    Raises:
        AssertionError: Shapes, dtypes or aliases are not those of torch.
        HealError: healpass refuses the program.
    """
    operands = program.operands(setting.dtype)
    pristine = copy.deepcopy(operands)
    kept: list[Any] = []

    def run(*given: Any) -> Any:
        kept.append(call(*given))
        return kept[-1]

    torch.manual_seed(0)
    results = evaluate(run, operands, program, setting.grads)
    check_form(program, setting, kept[-1], operands, copy.deepcopy(pristine))
    judge = Judge.of(program, pristine, setting.grads, setting.errors(program), _plain(kept[-1]))
    ratios = judge.ratios(results)
    return max(ratios, default=0.0)


def _plain(results: Any) -> Any:
    return torch.utils._pytree.tree_map(
        lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, results
    )


def check_form(program: Program, setting: Setting, results: Any, operands: Any, given: Any):
    """Results have torch's dtypes, and share memory with operands where torch's do."""
    try:
        with torch.no_grad():
            expected = program.run(*given)
    except NotImplementedError:
        return  # eager torch has no kernel for the format
    wide = torch.float32 if setting.outputs == "fp32" else None
    ours, theirs = leaves(results), leaves(expected)
    for result, wanted in zip(ours, theirs, strict=True):
        assert type(result) is type(wanted), f"{type(result)} instead of {type(wanted)}"
        if isinstance(wanted, Tensor):
            halves = wanted.dtype in (torch.float16, torch.bfloat16)
            allowed = (wanted.dtype, wide) if halves else (wanted.dtype,)
            assert result.dtype in allowed, f"{result.dtype} instead of {wanted.dtype}"
    assert _shared(ours, operands) == _shared(theirs, given), "results alias other operands"


def _shared(results: list[Any], operands: Any) -> list[tuple[int, int]]:
    memory = {}
    for position, tensor in enumerate(operand_tensors(operands)):
        if tensor.layout == torch.strided and tensor.numel():
            memory[tensor.untyped_storage().data_ptr()] = position
    return [
        (i, memory[result.untyped_storage().data_ptr()])
        for i, result in enumerate(results)
        if isinstance(result, Tensor)
        and result.layout == torch.strided
        and result.untyped_storage().data_ptr() in memory
    ]


def refusal(error: BaseException) -> HealError | None:
    """The error of healpass behind what torch raised."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, HealError):
            return seen
        seen = getattr(seen, "inner_exception", None) or seen.__cause__ or seen.__context__
    return None


def runs_without_heal(program: Program, setting: Setting, inductor: bool) -> bool:
    """Whether plain torch compiles the program, in the setting's dtype or in FP32."""
    backend = "inductor" if inductor else aot_eager
    for dtype in {setting.dtype, torch.float32}:
        torch._dynamo.reset()
        call = torch.compile(program.run, backend=backend, dynamic=setting.dynamic)
        try:
            evaluate(call, program.operands(dtype), program, setting.grads)
        except Exception:
            continue
        return True
    return False
