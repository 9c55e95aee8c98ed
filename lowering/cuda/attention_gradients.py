"""Attention's gradients on CUDA: a kernel for that of Q, one for those of K and V.

May import `attention` and what it may. Both kernels compute the weights again from the scores, so
no score matrix exists; sums over queries run in order within one program, without atomics. The
gradients of a mask and of sinks are the operators' reference implementation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch._inductor import ir

from healpass.lowering import compat
from healpass.lowering.cuda import selfcheck
from healpass.lowering.cuda.attention import (
    AttentionProblem,
    Launch,
    has_templates,
    is_single,
    select,
)
from healpass.lowering.cuda.tiles import attention_backward_tiles

Gradients = tuple[ir.TensorBox, ir.TensorBox, ir.TensorBox]
NAMES = ("attention_backward_query", "attention_backward_key")


def lower_integers(grad: ir.TensorBox, *call: Any) -> Gradients | None:
    """Lower `heal::integer_attention_backward`; None where its reference shall run."""
    if not has_templates(call[0], call[4], call[-3]):
        return None
    return _lower(AttentionProblem.of_integers(*call[:-2]), grad, *call[-2:])


def lower_floats(grad: ir.TensorBox, *call: Any) -> Gradients | None:
    """Lower `heal::attention_backward`; None where its reference implementation shall run."""
    if not has_templates(call[0], call[2], call[-3]):
        return None
    return _lower(AttentionProblem.of_floats(*call[:-2]), grad, *call[-2:])


def _lower(
    problem: AttentionProblem, grad: ir.TensorBox, output: ir.TensorBox, logsumexp: ir.TensorBox
) -> Gradients | None:
    # The logsumexp holds what the sinks add to the denominator.
    problem = replace(problem, scoring=replace(problem.scoring, sinks=None))
    results = [list(states.size) for states in (problem.query, problem.key)]
    if problem.empty or any(map(is_single, results)):
        return None
    if not selfcheck.usable(NAMES, problem.device, "the gradient of an attention"):
        return None
    return _kernels(problem, *compat.realize_inputs(grad, output, logsumexp))


def _kernels(
    problem: AttentionProblem, grad: ir.IRNode, output: ir.IRNode, logsumexp: ir.IRNode
) -> Gradients:
    states, (batch, key_heads, keys, _) = problem.nodes(), problem.key.size
    delta = problem.buffer(*problem.output_size[:-1])
    block = block_of(max(problem.head_blocks), problem.key.digits)
    query_tiles, key_tiles = attention_backward_tiles(
        problem.capability, max(problem.head_blocks), problem.key.digits
    )
    of_query = select(
        Launch(
            NAMES[0],
            [grad, *states, output, logsumexp, delta],
            problem.fixed(*problem.query.size),
            mutated=[delta],
            programs=[problem.key_heads, problem.rows, 1],
        ),
        problem.knobs() | {"BLOCK_N": block},
        query_tiles,
    )
    of_value = problem.buffer(batch, key_heads, keys, problem.output_size[-1])
    of_key = select(
        Launch(
            NAMES[1],
            [grad, *states, logsumexp, delta, of_value],
            problem.fixed(*problem.key.size),
            mutated=[of_value],
            programs=[problem.key_heads, keys, 1],
        ),
        problem.knobs() | {"BLOCK_M": block},
        key_tiles,
        tiled="BLOCK_N",
    )
    return of_query, of_key, of_value


def block_of(head_block: int, digits: int) -> int:
    """Queries or keys per block: a function of padded head size and digits alone."""
    return 32 if head_block * (digits or 3) <= 256 else 16


LOWERINGS = {
    torch.ops.heal.attention_backward.default: lower_floats,
    torch.ops.heal.integer_attention_backward.default: lower_integers,
}
