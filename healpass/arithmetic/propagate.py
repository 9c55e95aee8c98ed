"""Errors and magnitudes through a whole program. Layer `arithmetic`.

`propagate` applies one torch function to estimates: exact values in FP64 beside bounds on how far
computed ones may lie from them. Chained over a program it gives a bound for every output, from
magnitudes measured on the input, not from worst cases over all inputs (`estimate` has the theory).

Casts to 16 bits count as one rounding whether or not a pass removes them, unless the arithmetic
says that there are none.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from healpass.arithmetic.compound_rules import RULES
from healpass.arithmetic.error_rules import operand, refuse_in_place
from healpass.arithmetic.estimate import Analysis, Arithmetic, Estimate, exact, lifted
from healpass.errors import NoRuleError

__all__ = ["Analysis", "Arithmetic", "Estimate", "exact", "propagate"]


def propagate(function: Callable[..., Any], run: Analysis, *args: Any, **kwargs: Any) -> Any:
    """Apply a torch function to estimates.

    Args:
        function: A function of torch, or a method as `torch.Tensor.view`.
        run: The analysis that records what the function adds.
        *args: Its arguments; floating-point tensors are taken as exact.
        **kwargs: Its keyword arguments.

    Returns:
        What the function returns, with estimates in place of floating-point tensors. Their errors
        are running bounds; `run.bound` gives smaller ones.

    Raises:
        NoRuleError: There is no rule for the function, or not for these arguments.
    """
    raw = getattr(function, "__name__", str(function))
    name = raw.strip("_")
    if raw.endswith("_") and not raw.startswith("_"):
        raise NoRuleError(f"no error rule for {raw!r}: it writes into its operand.")
    if name not in _MOVES and name not in _SAME and name not in RULES:
        raise NoRuleError(
            f"no error rule for {name!r}: rules cover {', '.join(sorted((*RULES, *_MOVES)))}."
        )
    try:
        with torch.enable_grad():
            return _apply(function, name, run, args, kwargs)
    except (TypeError, KeyError, IndexError, RuntimeError) as error:
        raise NoRuleError(f"no error rule for {name!r} with these arguments: {error}") from error


def _apply(function: Callable[..., Any], name: str, run: Analysis, args: Any, kwargs: Any) -> Any:
    if name in _SAME:
        return lifted(args[0])
    if name in _MOVES:
        return _move(function, args, kwargs)
    args, kwargs = tuple(map(lifted, args)), {k: lifted(v) for k, v in kwargs.items()}
    if kwargs.get("inplace") is not None:
        refuse_in_place(kwargs.pop("inplace"))
    if name not in _LINEAR:
        args = tuple(run.refined(x) if isinstance(x, Estimate) else x for x in args)
    return RULES[name](run, *args, **kwargs)


#: Functions whose remainder is zero where one operand is exact: the errors of their operands need
#: not be as small as they can be made.
_LINEAR = frozenset(["add", "sub", "sum", "mean", "linear", "masked_fill", "to", "float"])

# ------------------------------------------------------------------------------------------- moves

#: Functions that return what they got, for autograd too: an error does not end at a `detach`.
_SAME = frozenset(["contiguous", "clone", "detach", "alias"])

#: Functions that move elements, or change their signs, and round nothing.
_MOVES = frozenset(
    [
        "view",
        "reshape",
        "transpose",
        "permute",
        "expand",
        "unsqueeze",
        "squeeze",
        "flatten",
        "cat",
        "stack",
        "getitem",
        "chunk",
        "split",
        "narrow",
        "repeat_interleave",
        "t",
        "mT",
        "index_select",
        "unbind",
        "tril",
        "triu",
        "neg",
        "embedding",
        "unflatten",
        "select",
        "where",
        "roll",
        "flip",
        "gather",
        "broadcast_to",
        "repeat",
        "narrow_copy",
        "movedim",
        "swapaxes",
        "view_as",
        "expand_as",
    ]
)


def _move(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    if function is operator.getitem and isinstance(args[0], tuple):
        return args[0][args[1]]  # what chunk, split or unbind returned
    if any(isinstance(leaf, torch.dtype) for leaf in _leaves(args)):
        raise TypeError("the bits themselves matter")
    name = getattr(function, "__name__", "")
    if name == "embedding" and (kwargs.get("max_norm") or (len(args) > 3 and args[3])):
        raise TypeError("max_norm computes")
    if name == "where":  # numbers among the two choices are values without an error
        args = (args[0], *map(operand, args[1:]))
    formats = {leaf.format for leaf in _leaves((args, kwargs)) if isinstance(leaf, Estimate)}
    fmt = formats.pop() if len(formats) == 1 and name != "where" else "fp32"
    values = function(*_mapped(args, "value"), **_mapped(kwargs, "value"))
    errors = function(*_mapped(args, "error"), **_mapped(kwargs, "error"))
    if isinstance(values, Tensor):
        return Estimate(values, errors.abs(), fmt)
    return tuple(Estimate(v, e.abs(), fmt) for v, e in zip(values, errors, strict=True))


def _leaves(x: Any) -> list[Any]:
    x = list(x.values()) if isinstance(x, dict) else x
    return [leaf for item in x for leaf in _leaves(item)] if isinstance(x, (list, tuple)) else [x]


def _mapped(x: Any, field: str) -> Any:
    """Arguments with each estimate's value or error, and each plain tensor's value or 0."""
    if isinstance(x, (list, tuple)):
        return type(x)(_mapped(item, field) for item in x)
    if isinstance(x, dict):
        return {key: _mapped(item, field) for key, item in x.items()}
    return getattr(lifted(x), field) if isinstance(lifted(x), Estimate) else x
