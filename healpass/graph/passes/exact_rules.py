"""What each of torch's operators becomes under `precision="exact"`. May import `ops` and below.

Data for the pass `exact`: rules that put a bit-reproducible `heal::` operator in the place of one
that rounds in its own way, and the names of operators that need none, because each of their
results has one right value: one IEEE operation, a comparison, a choice, or integers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

import healpass.ops  # noqa: F401  the operators must be registered
from healpass.graph.forms import Form, form
from healpass.graph.nodes import Builder, is_floating, value
from healpass.graph.operator_names import words

heal = torch.ops.heal

#: One IEEE operation each on FP32, or none: eager and compiled code agree, contraction being off.
REPRODUCIBLE = words(
    """
    neg abs relu relu6 leaky_relu hardtanh threshold sign sgn clamp clamp_min clamp_max clip
    maximum minimum fmax fmin amax amin aminmax floor ceil round trunc frac where masked_fill
    masked_select tril triu isnan isinf isfinite nan_to_num eq ne lt le gt ge
    imul mul_ iadd add_ isub sub_ copy_ fill_ zero_ masked_fill_ clamp_ relu_
    neg_ setitem histc bincount max_pool1d max_pool2d logical_not logical_and logical_or
    bitwise_not __neg__ __abs__ pos positive nonzero count_nonzero any all numel dim size one_hot
    atleast_1d lshift rshift identity floor_ square_ index_fill masked_scatter
    """
)

#: Sums over indices that may repeat, in the order of the device.
SCATTERED = words(
    """
    index_add index_add_ scatter_add scatter_add_ scatter_reduce scatter_reduce_ index_reduce
    put_ embedding_bag
    """
)

Rule = Callable[..., Node | None]


# -------------------------------------------------------------------------------------- operands


def _tensor(b: Builder, operand: Any) -> Node:
    """An operand as an FP32 tensor: a number becomes one, integers are cast."""
    if not isinstance(operand, Node) or not isinstance(value(operand), torch.Tensor):
        device = value(b.like).device
        return b.call(torch.full, (), operand, dtype=torch.float32, device=device)
    return operand if is_floating(value(operand)) else b.cast(operand, torch.float32)


def _cast_to(b: Builder, x: Node, dtype: torch.dtype | None) -> Node:
    return x if dtype in (None, torch.float32) else b.cast(x, dtype)


def _dims(dim: Any) -> list[int] | None:
    return [dim] if isinstance(dim, int) else None if dim is None else list(dim)


# --------------------------------------------------------------------------------- pointwise


def _unary(operator: Any) -> Rule:
    return lambda b, x: b.call(operator.default, _tensor(b, x))


def _gelu(b: Builder, x: Any, approximate: str | None) -> Node:
    operator = heal.gelu_tanh if approximate == "tanh" else heal.gelu
    return b.call(operator.default, _tensor(b, x))


def _softplus(b: Builder, x: Any, beta: Any, threshold: Any) -> Node | None:
    # Beyond the usual threshold of 20, log(1 + e^x) rounds to x in FP32.
    if beta not in (None, 1, 1.0) or (threshold or 20) < 20:
        return None
    return b.call(heal.softplus.default, _tensor(b, x))


def _add(b: Builder, x: Any, other: Any, alpha: Any) -> Node:
    return _sum_of(b, torch.add, x, other, alpha)


def _sub(b: Builder, x: Any, other: Any, alpha: Any) -> Node:
    return _sum_of(b, torch.sub, x, other, alpha)


def _rsub(b: Builder, x: Any, other: Any, alpha: Any) -> Node:
    return _sum_of(b, torch.sub, other, x, alpha)


def _sum_of(b: Builder, function: Any, x: Any, other: Any, alpha: Any) -> Node:
    """A factor is a product of its own; torch's eager code would contract it."""
    if alpha not in (None, 1):
        other = b.call(torch.mul, other, alpha)
    return _broadcast(b, function, x, other)


def _broadcast(b: Builder, function: Any, x: Any, other: Any) -> Node:
    """Torch's own operation, unless a gradient gets a sum from broadcasting: that one is exact."""
    operands = [value(x), value(other)]
    plain = not all(map(is_floating, operands)) or operands[0].shape == operands[1].shape
    if plain or not any(operand.requires_grad for operand in operands):
        return b.call(function, x, other)
    return b.call(getattr(heal, function.__name__).default, x, other)


def _mul(b: Builder, x: Any, other: Any) -> Node:
    return _broadcast(b, torch.mul, x, other)


def _div(b: Builder, x: Any, other: Any, rounding_mode: str | None) -> Node | None:
    if rounding_mode is not None:
        return None
    return b.call(heal.div.default, _tensor(b, x), _tensor(b, other))


def _rdiv(b: Builder, x: Any, other: Any) -> Node:
    return b.call(heal.div.default, _tensor(b, other), _tensor(b, x))


def _pow(b: Builder, x: Any, exponent: Any) -> Node:
    if isinstance(exponent, (int, float)):
        return b.call(heal.pow_scalar.default, _tensor(b, x), float(exponent))
    return b.call(heal.pow.default, _tensor(b, x), _tensor(b, exponent))


def _rpow(b: Builder, x: Any, base: Any) -> Node:
    return b.call(heal.pow.default, _tensor(b, base), _tensor(b, x))


def _square(b: Builder, x: Any) -> Node:
    return b.call(torch.mul, x, x)


def _addcmul(b: Builder, x: Any, first: Any, second: Any, factor: Any) -> Node:
    return _add(b, x, b.call(torch.mul, first, second), factor)


def _addcdiv(b: Builder, x: Any, first: Any, second: Any, factor: Any) -> Node:
    quotient = b.call(heal.div.default, _tensor(b, first), _tensor(b, second))
    return _add(b, x, quotient, factor)


def _lerp(b: Builder, start: Any, end: Any, weight: Any) -> Node:
    step = b.call(torch.mul, b.call(torch.sub, end, start), weight)
    return b.call(torch.add, start, step)


def _div_in_place(b: Builder, x: Node, other: Any) -> Node:
    return b.method("copy_", x, b.call(heal.div.default, x, _tensor(b, other)))


def _dropout(b: Builder, x: Node, p: Any, training: Any, inplace: Any) -> Node | None:
    del b, inplace  # nothing is written where nothing is dropped
    return x if p == 0 or training is False else None


def _embedding(
    b: Builder,
    ids: Any,
    weight: Any,
    padding: Any,
    max_norm: Any,
    _p: Any,
    by_freq: Any,
    sparse: Any,
) -> Node | None:
    """A trained one: its gradient sums the rows of equal tokens."""
    if max_norm is not None or by_freq or sparse:
        return None
    padding = -1 if padding is None else padding % value(weight).shape[0]
    return b.call(heal.embedding.default, weight, ids, padding)


# -------------------------------------------------------------------------------- reductions


def _reduction(operator: Any) -> Rule:
    def rule(b: Builder, x: Any, dim: Any, keepdim: Any, dtype: Any) -> Node:
        result = b.call(operator.default, _tensor(b, x), _dims(dim), bool(keepdim))
        return _cast_to(b, result, dtype)

    return rule


def _var(b: Builder, x: Any, dim: Any, unbiased: Any, keepdim: Any, correction: Any) -> Node:
    if isinstance(dim, bool):  # var(x, unbiased)
        dim, unbiased = None, dim
    degrees = correction if correction is not None else 0 if unbiased is False else 1
    return b.call(heal.var.default, _tensor(b, x), _dims(dim), float(degrees), bool(keepdim))


def _std(b: Builder, *arguments: Any) -> Node:
    return b.call(heal.sqrt.default, _var(b, *arguments))


def _vector_norm(
    b: Builder, x: Any, order: Any, dim: Any, keepdim: Any, dtype: Any
) -> Node | None:
    if order not in (None, 2, 2.0):
        return None
    squares = b.call(heal.pow_scalar.default, _tensor(b, x), 2.0)
    total = b.call(heal.sum.default, squares, _dims(dim), bool(keepdim))
    return _cast_to(b, b.call(heal.sqrt.default, total), dtype)


def _cumsum(b: Builder, x: Any, dim: int, dtype: Any) -> Node:
    return _cast_to(b, b.call(heal.cumsum.default, _tensor(b, x), dim), dtype)


def _softmax(operator: Any) -> Rule:
    def rule(b: Builder, x: Any, dim: Any, _stacklevel: Any, dtype: Any) -> Node | None:
        if not isinstance(dim, int):
            return None
        return _cast_to(b, b.call(operator.default, _tensor(b, x), dim), dtype)

    return rule


def _layer_norm(b: Builder, x: Any, shape: Any, weight: Any, bias: Any, eps: Any) -> Node:
    shape, eps = _shape(shape), 1e-5 if eps is None else eps
    return b.call(heal.layer_norm.default, _tensor(b, x), shape, weight, bias, eps)


def _rms_norm(b: Builder, x: Any, shape: Any, weight: Any, eps: Any) -> Node:
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    return b.call(heal.rms_norm.default, _tensor(b, x), _shape(shape), weight, eps)


def _shape(shape: Any) -> list[int]:
    return [shape] if isinstance(shape, int) else list(shape)


def _loss(operator: Any) -> Rule:
    """The two losses; their old switches `size_average` and `reduce` have no meaning here."""

    def rule(
        b: Builder,
        x: Any,
        target: Any,
        weight: Any,
        size_average: Any,
        ignore_index: Any,
        reduce: Any,
        reduction: Any,
        *smoothing: Any,
    ) -> Node | None:
        if size_average is not None or reduce is not None:
            return None
        ignore_index = -100 if ignore_index is None else ignore_index
        options = (weight, ignore_index, reduction or "mean", *(s or 0.0 for s in smoothing))
        return b.call(operator.default, _tensor(b, x), target, *options)

    return rule


# -------------------------------------------------------------------------------------- ties


def _argmax(b: Builder, x: Any, dim: Any, keepdim: Any) -> Node:
    return b.call(heal.first_argmax.default, x, dim, bool(keepdim))


def _argmin(b: Builder, x: Any, dim: Any, keepdim: Any) -> Node:
    return b.call(heal.first_argmax.default, b.call(torch.neg, x), dim, bool(keepdim))


def _topk(b: Builder, x: Any, k: Any, dim: Any, largest: Any, _sorted: Any) -> Node:
    dim, largest = -1 if dim is None else dim, largest is not False
    return b.call(heal.stable_topk.default, x, k, dim, largest)


def _sort(b: Builder, x: Any, dim: Any, descending: Any) -> Node:
    dim = -1 if dim is None else dim
    return b.call(torch.sort, x, dim=dim, descending=bool(descending), stable=True)


def _argsort(b: Builder, x: Any, dim: Any, descending: Any) -> Node:
    dim = -1 if dim is None else dim
    return b.call(torch.argsort, x, dim=dim, descending=bool(descending), stable=True)


_UNARY = (
    "exp exp2 expm1 log log2 log10 log1p sin cos tanh erf erfc sigmoid silu sqrt rsqrt reciprocal"
)
_NORM_DIMS = "input ord dim keepdim dtype"
_LOSS = "input target weight size_average ignore_index reduce reduction"

FORMS: dict[str, Form] = {
    **{name: form(_unary(getattr(heal, name)), "input") for name in _UNARY.split()},
    "log_sigmoid": form(_unary(heal.logsigmoid), "input"),
    "special_expm1": form(_unary(heal.expm1), "input"),
    "special_erf": form(_unary(heal.erf), "input"),
    "special_expit": form(_unary(heal.sigmoid), "input"),
    "gelu": form(_gelu, "input approximate"),
    "softplus": form(_softplus, "input beta threshold"),
    **dict.fromkeys(("add", "__add__", "__radd__"), form(_add, "input other alpha")),
    **dict.fromkeys(("mul", "multiply", "__mul__", "__rmul__"), form(_mul, "input other")),
    **dict.fromkeys(("sub", "subtract", "__sub__"), form(_sub, "input other alpha")),
    **dict.fromkeys(("rsub", "__rsub__"), form(_rsub, "input other alpha")),
    **dict.fromkeys(
        ("div", "divide", "true_divide", "truediv", "__truediv__"),
        form(_div, "input other rounding_mode"),
    ),
    "__rtruediv__": form(_rdiv, "input other"),
    **dict.fromkeys(("itruediv", "div_"), form(_div_in_place, "input other")),
    **dict.fromkeys(("pow", "__pow__", "float_power"), form(_pow, "input exponent")),
    "__rpow__": form(_rpow, "input other"),
    "square": form(_square, "input"),
    "addcmul": form(_addcmul, "input tensor1 tensor2 value"),
    "addcdiv": form(_addcdiv, "input tensor1 tensor2 value"),
    "lerp": form(_lerp, "input end weight"),
    "embedding": form(
        _embedding, "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse"
    ),
    "dropout": form(_dropout, "input p training inplace"),
    "sum": form(_reduction(heal.sum), "input dim keepdim dtype"),
    "mean": form(_reduction(heal.mean), "input dim keepdim dtype"),
    "var": form(_var, "input dim unbiased keepdim correction"),
    "std": form(_std, "input dim unbiased keepdim correction"),
    "linalg_vector_norm": form(_vector_norm, _NORM_DIMS),
    "norm": form(_vector_norm, _NORM_DIMS),
    "cumsum": form(_cumsum, "input dim dtype"),
    "softmax": form(_softmax(heal.softmax), "input dim _stacklevel dtype"),
    "log_softmax": form(_softmax(heal.log_softmax), "input dim _stacklevel dtype"),
    "layer_norm": form(_layer_norm, "input normalized_shape weight bias eps"),
    "rms_norm": form(_rms_norm, "input normalized_shape weight eps"),
    "cross_entropy": form(_loss(heal.cross_entropy), _LOSS + " label_smoothing"),
    "nll_loss": form(_loss(heal.nll_loss), _LOSS),
    "argmax": form(_argmax, "input dim keepdim"),
    "argmin": form(_argmin, "input dim keepdim"),
    "topk": form(_topk, "input k dim largest sorted"),
    "sort": form(_sort, "input dim descending"),
    "argsort": form(_argsort, "input dim descending"),
}
#: Their gradients add; those of what is not trained stay as they are.
TRAINED = frozenset({"embedding"})
EXPANDING = frozenset({"expand", "expand_as", "broadcast_to"})
#: These look at ties, so they are rewritten for integers too.
TIES = frozenset({"argmax", "argmin", "topk", "sort", "argsort"})
