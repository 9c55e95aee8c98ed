"""Errors and magnitudes through a whole program. Layer `arithmetic`.

An `Estimate` is a tensor's exact value (in FP64) beside a bound on how far a computed one may lie
from it. `propagate` applies one torch function to estimates: inputs that differ from the exact
ones by their errors go through the function, and the function's own FP32 arithmetic adds to it.
Chained over a graph this is a running error analysis (Wilkinson 1986; Higham, section 3.3): the
bound of an output follows from magnitudes measured on the input, not from worst cases over all
inputs.

Every rule is f(x + e) - f(x), bounded over the whole interval, plus the roundings of f. Casts to
16 bits count as one rounding whether or not a pass removes them. FP64's own roundings are not
counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from healpass.arithmetic.error_rules import RULES
from healpass.arithmetic.estimate import Arithmetic, Estimate, exact, lifted

__all__ = ["Arithmetic", "Estimate", "exact", "propagate"]


def propagate(function: Callable[..., Any], how: Arithmetic, *args: Any, **kwargs: Any) -> Any:
    """Apply a torch function to estimates.

    Args:
        function: A function of torch, or a method as `torch.Tensor.view`.
        how: The arithmetic of matmuls.
        *args: Its arguments; floating-point tensors are taken as exact.
        **kwargs: Its keyword arguments.

    Returns:
        What the function returns, with estimates in place of floating-point tensors.

    Raises:
        ValueError: There is no rule for the function.
    """
    name = getattr(function, "__name__", str(function)).strip("_")
    if name in _MOVES:
        return _move(function, args, kwargs)
    if name not in RULES:
        raise ValueError(
            f"no error rule for {name!r}: rules cover {', '.join(sorted((*RULES, *_MOVES)))}."
        )
    named = {key: lifted(argument) for key, argument in kwargs.items()}
    return RULES[name](how, *map(lifted, args), **named)


# ------------------------------------------------------------------------------------------- moves

#: Functions that move elements and compute nothing.
_MOVES = frozenset(
    [
        "view",
        "reshape",
        "transpose",
        "permute",
        "expand",
        "unsqueeze",
        "squeeze",
        "contiguous",
        "flatten",
        "cat",
        "stack",
        "getitem",
        "chunk",
        "split",
        "narrow",
        "clone",
        "detach",
        "repeat_interleave",
        "t",
        "mT",
        "index_select",
        "unbind",
        "tril",
        "triu",
        "neg",
    ]
)


def _move(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    if isinstance(args[0], tuple):  # an element of what chunk, split or unbind returned
        return function(*args, **kwargs)
    formats = {leaf.format for leaf in _leaves(args) if isinstance(leaf, Estimate)}
    fmt = formats.pop() if len(formats) == 1 else "fp32"
    values = function(*_mapped(args, "value"), **kwargs)
    errors = function(*_mapped(args, "error"), **kwargs)
    if isinstance(values, Tensor):
        return Estimate(values, errors.abs(), fmt)
    return tuple(Estimate(v, e.abs(), fmt) for v, e in zip(values, errors, strict=True))


def _leaves(x: Any) -> list[Any]:
    return [leaf for item in x for leaf in _leaves(item)] if isinstance(x, (list, tuple)) else [x]


def _mapped(x: Any, field: str) -> Any:
    """Arguments with each estimate's value or error, and each plain tensor's value or 0."""
    if isinstance(x, (list, tuple)):
        return type(x)(_mapped(item, field) for item in x)
    return getattr(lifted(x), field) if isinstance(lifted(x), Estimate) else x
