"""What the results of a small program may be off by, derived from the program itself.

The reference is the program in FP64 on the rounded operands, every floating dtype that it names
read as FP64 (`Ideal`). How far FP32 arithmetic may be from that is learnt by running it in FP64
again with roundings put in (`Roundings`), by this model, the mixed stability of Higham, Accuracy
and Stability of Numerical Algorithms, sections 1.5 and 3.1:

* moving, choosing, comparing and rounding to integers is exact;
* a pointwise operator's result is off by at most `POINTWISE` = 4 units u (two ulps, which
  elementary functions of FP32 keep);
* whatever adds up n numbers, or is one kernel of many steps, gives its result, off by as much, for
  operands that are off by n u each (gamma_n), n being the larger of its longest dimension and of
  the number of operands per result;
* attention takes Q, K and V rounded to half a step of INT16 or INT24 of a row's maximum;
* in `exact` a product is off by what its digits lose (`products.exact.error_bound`), and
  attention by 2^-21 S of the largest value (`attention.exact`).

The signs are drawn, `SAMPLES` times. Errors being independent and of mean zero (Higham and Mary
2019), an element's error has the standard deviation that is seen, sigma; a tensor's is the
largest of its elements. The budget of an element y handed out with unit roundoff v:

    4 sigma + v (|y| + 4 sigma) + half the smallest number of its format

with the four standard deviations of `arithmetic.symbols`. u is FP32's, or, for a program that has
16 bits inside by contract (`Program.coarse`), that of its dtype.
"""

from __future__ import annotations

import math
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from healpass.arithmetic.symbols import DEFAULT_LAMBDA
from healpass.ops.products.exact import error_bound
from tests.programs import Program
from tests.support.evaluating import evaluate, in_dtype

SAMPLES = 8
POINTWISE = 4
U = 2.0**-24
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
UNIT = {
    torch.float64: 2.0**-53,
    torch.float32: U,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
HALF_TINY = {
    torch.float64: 0.0,
    torch.float32: 2.0**-150,
    torch.float16: 2.0**-25,
    torch.bfloat16: 2.0**-134,
}
#: Half a step of an integer format, relative to the maximum of a row.
HALF_STEP = {"int16": 0.5 / 32639, "int24": 0.5 / 8355711, "fp32": U}


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Operators of ATen whose results have one right value.
EXACT = words(
    """
    neg abs relu relu_ sign sgn where masked_fill masked_fill_ copy_ clone cat stack index gather
    scatter sort topk kthvalue median max min amax amin argmax maximum minimum clamp clamp_
    clamp_min clamp_max ceil floor round trunc tril triu flip roll repeat constant_pad_nd fill_
    zero_ index_select embedding masked_select masked_scatter index_copy index_copy_ slice_scatter
    select_scatter diagonal_scatter select_backward slice_backward _to_copy full full_like ones
    zeros zeros_like ones_like new_zeros new_ones new_empty empty empty_like arange eye
    scalar_tensor new_full _local_scalar_dense lift_fresh lift_fresh_copy resize_ set_ unfold
    reflection_pad2d replication_pad2d max_pool2d_with_indices value_selecting_reduction_backward
    aminmax _unsafe_view nan_to_num nonzero complex view_as_real view_as_complex real imag
    detach_ diag_embed threshold_backward col2im_ im2col pixel_shuffle pixel_unshuffle
    channel_shuffle masked_select_backward bernoulli_ uniform_ normal_ rand randn index_fill
    hardtanh fmod remainder new_empty_strided empty_strided detach
    """
)
#: Products of matrices: where their factors stand.
FACTORS = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot"), (0, 1)),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), (1, 2)),
}
FLASH = "_scaled_dot_product_flash_attention_for_cpu"


@dataclass(frozen=True)
class Errors:
    """What an arithmetic may do wrong.

    Attributes:
        unit: Roundoff of one operation.
        step: Half a step of the format of Q, K and V, relative to a row's maximum.
        exact: The dtype of 16-bit factors in `exact`, None in the other precisions.
    """

    unit: float
    step: float
    exact: torch.dtype | None = None


class Ideal(TorchFunctionMode):
    """Reads every floating dtype that a program names as one dtype, and leaves autocast out."""

    def __init__(self, dtype: torch.dtype, roundings: Roundings | None = None) -> None:
        super().__init__()
        self.dtype = dtype
        self.roundings = roundings

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in ("half", "bfloat16", "float", "double"):
            function, args = Tensor.to, (args[0], self.dtype)
        args, kwargs = pytree.tree_map(self._widened, (args, kwargs))
        if self.roundings is not None and function is F.scaled_dot_product_attention:
            return self.roundings.attention(args, kwargs)
        if not torch.is_autocast_enabled("cpu"):
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    def _widened(self, leaf: Any) -> Any:
        return self.dtype if isinstance(leaf, torch.dtype) and leaf in FLOATS else leaf


class Roundings(TorchDispatchMode):
    """Puts errors of random sign into every operator that rounds."""

    def __init__(self, errors: Errors, seed: int) -> None:
        super().__init__()
        self.errors = errors
        self.generator = torch.Generator().manual_seed(seed)
        self.in_attention = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name == FLASH and not self.in_attention:
            return self.attention(args, kwargs, function)
        if name in EXACT or self._is_view(function):
            return function(*args, **kwargs)
        schema = function._schema
        if not schema.is_mutable and torch.Tag.pointwise not in function.tags:
            terms = self._terms(args)
            stirred = [self._relative(a, terms) for a in args]
            if "batch_norm" in name:
                stirred[3:5] = args[3:5]  # statistics that are written, whatever the schema says
            results = function(*stirred, **kwargs)
        else:
            results = function(*args, **kwargs)
        for result in pytree.tree_leaves(_written(schema, args) or results):
            if _inexact(result):
                result.mul_(1 + self._drawn(result, POINTWISE * self.errors.unit))
        if self.errors.exact is not None and name in FACTORS:
            results.add_(self._digits_lost(results, *(args[i] for i in FACTORS[name])))
        return results

    def attention(self, args: Any, kwargs: Any, function: Any = None) -> Any:
        """Attention of rounded Q, K and V."""
        rounded = [x + self._of_rows(x) for x in args[:3]]
        self.in_attention = True
        try:
            call = function or F.scaled_dot_product_attention
            results = call(*rounded, *args[3:], **kwargs)
        finally:
            self.in_attention = False
        if self.errors.exact is None or function is not None:
            return results
        largest = args[2].detach().abs().amax() * args[2].shape[-2] * 2.0**-21
        return results + self._drawn(results, 1.0) * largest

    @staticmethod
    def _is_view(function: Any) -> bool:
        returns = function._schema.returns
        return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)

    @staticmethod
    def _terms(args: Any) -> int:
        sizes = [size for a in pytree.tree_leaves(args) if _inexact(a) for size in a.shape]
        return max(sizes, default=1)

    def _drawn(self, like: Tensor, size: float) -> Tensor:
        drawn = torch.rand(like.shape, generator=self.generator, dtype=torch.float64)
        return (2 * drawn - 1) * size

    def _relative(self, argument: Any, terms: int) -> Any:
        if isinstance(argument, (list, tuple)):
            return type(argument)(self._relative(a, terms) for a in argument)
        if not _inexact(argument) or argument.layout != torch.strided:
            return argument
        n = terms if argument.dim() else 1
        return argument * (1 + self._drawn(argument, n * self.errors.unit))

    def _of_rows(self, x: Tensor) -> Tensor:
        largest = x.detach().abs().amax(-1, keepdim=True) if x.numel() else x.detach()
        return self._drawn(x, max(self.errors.step, self.errors.unit)) * largest

    def _digits_lost(self, results: Tensor, a: Tensor, b: Tensor) -> Tensor:
        left = a if a.dim() > 1 else a[None]
        right = b if b.dim() > 1 else b[:, None]
        if 0 in results.shape or 0 in left.shape:
            return torch.zeros_like(results)
        lost = torch.maximum(
            error_bound(self._stored(left), self._stored(right)),
            error_bound(self._stored(right.mT), self._stored(left.mT)).mT,
        )
        return self._drawn(results, 1.0) * lost.reshape(results.shape)

    def _stored(self, x: Tensor) -> Tensor:
        narrow = x.to(self.errors.exact)
        return narrow if torch.equal(narrow.to(x.dtype), x) else x.float()


def _written(schema: Any, args: Any) -> list[Any]:
    """What an operator writes into, `_foreach_add_` returning nothing."""
    marks = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
    return [a for a, written in zip(args, marks, strict=False) if written]


def _inexact(item: Any) -> bool:
    return isinstance(item, Tensor) and (item.is_floating_point() or item.is_complex())


@contextmanager
def ideally(dtype: torch.dtype, roundings: Roundings | None = None):
    """Where a program means another dtype, perhaps with errors."""
    before, fast = torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled()
    torch.set_default_dtype(dtype)
    torch.backends.mha.set_fastpath_enabled(False)  # one kernel would hide what is rounded
    try:
        with ExitStack() as stack:
            if roundings is not None:
                stack.enter_context(roundings)
            stack.enter_context(Ideal(dtype, roundings))
            yield
    finally:
        torch.set_default_dtype(before)
        torch.backends.mha.set_fastpath_enabled(fast)


# ----------------------------------------------------------------------------------- the budget


@dataclass(frozen=True)
class Judge:
    """The right results of one program on one set of operands, and how far FP32 may be off.

    Attributes:
        exact: What the program gives in FP64.
        sigmas: The standard deviation of each result's errors.
    """

    exact: list[Any]
    sigmas: list[float]

    @classmethod
    def of(
        cls,
        program: Program,
        operands: Any,
        grads: bool,
        errors: Errors,
        results: Any = None,
    ) -> Judge:
        """Run the program in FP64, once rightly and `SAMPLES` times with roundings.

        Args:
            program: What to run.
            operands: Its operands, as handed to the compiled program.
            grads: Whether to take gradients.
            errors: The roundings of the precision.
            results: What a random program drew: its results.
        """
        run = program.reference or program.run
        if program.replay is not None:
            drawn = in_dtype(results, torch.float64)
            run = lambda *given: program.replay(drawn, *given)  # noqa: E731
        samples = []
        for seed in range(SAMPLES):
            given = in_dtype(operands, torch.float64)
            with ideally(torch.float64, Roundings(errors, seed)):
                samples.append(evaluate(run, given, program, grads))
        with ideally(torch.float64):
            exact = evaluate(run, in_dtype(operands, torch.float64), program, grads)
        sigmas = [_sigma(x, [s[i] for s in samples]) for i, x in enumerate(exact)]
        return cls(exact, sigmas)

    def ratio(self, results: list[Any]) -> float:
        """The largest observed/bound over all elements of all results."""
        assert len(results) == len(self.exact), f"{len(results)} results, not {len(self.exact)}"
        pairs = zip(results, self.exact, self.sigmas, strict=True)
        return max((_ratio(*pair) for pair in pairs), default=0.0)

    def ratios(self, results: list[Any]) -> list[float]:
        """observed/bound, result by result."""
        return [_ratio(*p) for p in zip(results, self.exact, self.sigmas, strict=True)]


def _sigma(exact: Any, samples: list[Any]) -> float:
    if not _inexact(torch.as_tensor(exact)):
        return 0.0
    exact = torch.as_tensor(exact).detach()
    errors = torch.stack([_distance(torch.as_tensor(s).detach(), exact) for s in samples])
    deviation = errors.square().mean(0).sqrt()
    return float(deviation.max()) if deviation.numel() else 0.0


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """|one - other|, zero where both are the same infinity or NaN, infinite where one is."""
    if one.is_sparse:
        one, other = one.to_dense(), other.to_dense()
    if one.is_complex():
        one, other = (
            torch.view_as_real(one.resolve_conj()),
            torch.view_as_real(other.resolve_conj()),
        )
    same = (one == other) | (one.isnan() & other.isnan())
    difference = (one.double() - other.double()).abs().nan_to_num(math.inf, math.inf)
    return torch.where(same, 0.0, difference)


def _ratio(result: Any, exact: Any, sigma: float) -> float:
    result, exact = torch.as_tensor(result).detach(), torch.as_tensor(exact).detach()
    assert result.shape == exact.shape, f"shape {result.shape}, not {exact.shape}"
    if not _inexact(exact):
        return 0.0 if torch.equal(result.to(exact.dtype), exact) else math.inf
    error = _distance(result.to(exact.dtype), exact)
    if not error.numel():
        return 0.0
    dtype = torch.float32 if result.is_complex() else result.dtype
    size = torch.view_as_real(exact).abs() if exact.is_complex() else exact.abs()
    spread = DEFAULT_LAMBDA * sigma
    budget = spread + UNIT[dtype] * (size + spread) + HALF_TINY[dtype]
    return float(torch.where(error == 0, 0.0, error / budget).max())
