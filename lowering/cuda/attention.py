"""Attention on CUDA: problem -> check -> family -> tiles -> choices -> select.

`heal::integer_attention` on digits and `heal::attention` on states as stored share the kernels.
May import `compat`, `kernels`, `matmul` (device check, chains), `selfcheck`, `tiles`. One frozen
`AttentionProblem` goes through all steps. Head sizes, the number of digits, whether a key head has
at most 16 rows, and the generation (its chains) decide bits; else the architecture decides tiles.

Families (a row has the same bits for any batch, tile, hidden end of keys, GPU of a generation):

* decode, at most 16 rows: a program per fixed chunk of keys; a row's chunks are added in order;
* prefill: a program per tile of rows goes through all keys that the tile may see; with
  `m_invariant` it adds the sums of each chunk as decode does, so that no row tells its family.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.lowering import empty_strided, lowerings, to_dtype

from healpass.lowering import compat
from healpass.lowering.cuda import kernels, selfcheck
from healpass.lowering.cuda.matmul import chain_k
from healpass.lowering.cuda.matmul import check as check_device
from healpass.lowering.cuda.tiles import AttentionTile, attention_tiles
from healpass.lowering.states import States
from healpass.ops.attention.scoring import Scoring
from healpass.ops.products.numerics import Numerics

#: Numerics: a key head with at most so many rows is decoded.
DECODE_ROWS = 16
#: Numerics: keys per program of the decode family.
CHUNK = 256
#: The largest head size that the kernels take.
LARGEST_HEAD = 256
NAMES = ("attention", "attention_merge")
#: Numerics: the smallest depth of an INT8 and of an FP16 tensor-core product.
SMALLEST_E, SMALLEST_V = 32, 16
#: Tuning of the merge: chunks whose parts are on the way at once.
MERGE = {"UNROLL": 8}

aten = torch.ops.aten


@dataclass(frozen=True)
class AttentionProblem:
    """One attention, all that the steps below need to know.

    Attributes:
        query: Of `[B, H, L, E]`; H is a multiple of Hkv.
        key: Of `[B, Hkv, S, E]`.
        value: Of `[B, Hkv, S, Ev]`.
        scoring: All else that decides a weight; its tensors are Inductor's.
        numerics: As the operator takes it.
    """

    query: States
    key: States
    value: States
    scoring: Scoring
    numerics: str

    @classmethod
    def of_integers(cls, *call: Any) -> AttentionProblem:
        """Read the arguments of `heal::integer_attention`."""
        states = [States(call[i], call[i + 1]) for i in (0, 2, 4)]
        return cls.of_states(states, Scoring.read(*call[6:-1]), call[-1])

    @classmethod
    def of_floats(cls, *call: Any) -> AttentionProblem:
        """Read the arguments of `heal::attention`."""
        states = [States(x) for x in call[:3]]
        return cls.of_states(states, Scoring.read(*call[3:-1]), call[-1])

    @classmethod
    def of_states(
        cls, states: Sequence[States], scoring: Scoring, numerics: str
    ) -> AttentionProblem:
        """With a window that is a number.

        Args:
            states: Q, K and V.
            scoring: All else that decides a weight.
            numerics: As the operator takes it.
        """
        query, key, value = states
        if scoring.window is not None:
            scoring = replace(scoring, window=compat.as_int(scoring.window))
        return cls(query, key, value, scoring, numerics)

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.query.data.get_device_or_error()

    @property
    def capability(self) -> int:
        """As 90 for 9.0."""
        major, minor = torch.cuda.get_device_capability(self.device)
        return 10 * major + minor

    @property
    def chain(self) -> int:
        """Numerics: terms of a chain (`arithmetic.promotion`)."""
        return chain_k(self.capability)

    @property
    def group(self) -> sympy.Expr:
        """Query heads per key head."""
        return compat.V.graph.sizevars.simplify(sympy.floor(self.query.size[1] / self.key.size[1]))

    @property
    def rows(self) -> sympy.Expr:
        """Rows of one key head: its queries times the heads that share it."""
        return self.group * self.query.size[2]

    @property
    def key_heads(self) -> sympy.Expr:
        """Key heads of the whole batch."""
        return self.key.size[0] * self.key.size[1]

    @property
    def head_blocks(self) -> tuple[int, int]:
        """Head sizes of Q and V, padded as the tensor core needs them."""
        sizes = (int(self.query.size[-1]), int(self.value.size[-1]))
        padded = (1 << (size - 1).bit_length() for size in sizes)
        blocks = tuple(map(max, padded, (SMALLEST_E, SMALLEST_V)))
        return blocks[0], blocks[1]

    @property
    def tiles(self) -> list[AttentionTile]:
        """Tiles of the family, best guess first."""
        digits = max(self.key.digits, self.query.digits)
        tiles = attention_tiles(self.capability, max(self.head_blocks), digits, self.decodes)
        return [tile.halved() for tile in tiles] if self.m_invariant else tiles

    @property
    def m_invariant(self) -> bool:
        """Whether prefill has to give the bits of decode."""
        return Numerics.parse(self.numerics).m_invariant

    @property
    def decodes(self) -> bool:
        """Whether the decode family takes it."""
        return compat.is_true(sympy.Le(self.rows, DECODE_ROWS))

    @property
    def empty(self) -> bool:
        """Whether the result has no element, or no key to see."""
        sizes = (*self.query.size[:3], self.value.size[-1], self.key.size[2])
        return any(compat.is_true(sympy.Eq(size, 0)) for size in sizes)

    @property
    def output_size(self) -> list[sympy.Expr]:
        """`[B, H, L, EV]`."""
        return [*self.query.size[:3], self.value.size[-1]]

    def fixed(self, *size: Any) -> ir.FixedLayout:
        """Row-major FP32 layout."""
        return ir.FixedLayout(self.device, torch.float32, [sympy.sympify(s) for s in size])

    def buffer(self, *size: Any) -> ir.TensorBox:
        """FP32 memory that a kernel writes beside its output."""
        return empty_strided(list(size), None, dtype=torch.float32, device=self.device)

    def nodes(self) -> list[ir.IRNode]:
        """What the kernels read, in the order of the templates' inputs."""
        states = [x for s in (self.query, self.key, self.value) for x in s.nodes()]
        how, mask = self.scoring, self.expanded_mask()
        others = (mask, how.sinks, how.seed if how.dropout_p else None)
        return states + [compat.realize_inputs(x) for x in others if x is not None]

    def expanded_mask(self) -> ir.IRNode | None:
        """The mask, if any, in memory as `[B, H, L, S]`; what is broadcast has the stride 0."""
        if self.scoring.attn_mask is None:
            return None
        # (A view of something computed is no memory before, and its expansion has no strides.)
        mask = ir.TensorBox(compat.realize_inputs(self.scoring.attn_mask))
        size = [*self.query.size[:3], self.key.size[2]]
        expanded: ir.IRNode = compat.realize_inputs(lowerings[aten.expand.default](mask, size))
        return expanded

    def knobs(self) -> dict[str, Any]:
        """Numerics knobs that all kernels share."""
        block_e, block_v = self.head_blocks
        how, mask = self.scoring, self.scoring.attn_mask
        return {
            "Q_DIGITS": self.query.digits,
            "K_DIGITS": self.key.digits,
            "V_DIGITS": self.value.digits,
            "HAS_MASK": mask is not None,
            "BOOL_MASK": mask is not None and mask.get_dtype() == torch.bool,  # type: ignore[attr-defined]
            "HAS_SINKS": how.sinks is not None,
            "CAUSAL": how.is_causal,
            "SCALE": float(how.scale),
            "WINDOW": how.window,
            "SOFTCAP": how.softcap,
            "DROPOUT_P": how.dropout_p,
            "BLOCK_E": block_e,
            "BLOCK_V": block_v,
            "BLOCK_N": keys_per_block(max(block_e, block_v), self.key.digits, self.chain),
        }


@dataclass(frozen=True)
class Launch:
    """One kernel: its template, what it reads and writes.

    Attributes:
        template: A name in `kernels.GRIDS`.
        nodes: Inputs in the template's order; what it writes beside its output comes last.
        layout: Of the output.
        mutated: Those of `nodes` that it writes.
        programs: Key heads of the batch, rows, and chunks: what the grid is made of.
    """

    template: str
    nodes: list[ir.IRNode]
    layout: ir.Layout
    mutated: list[ir.IRNode]
    programs: list[Any]


def select(
    launch: Launch, knobs: dict[str, Any], tiles: list[AttentionTile], tiled: str = "BLOCK_M"
) -> ir.TensorBox:
    """Render the template for the best guess, or for all tiles where Inductor is to time them.

    Args:
        launch: The kernel.
        knobs: What all renderings share.
        tiles: The best guess first.
        tiled: The knob that a tile's `block` sets.
    """
    renderings = [
        knobs | {tiled: tile.block, "num_warps": tile.num_warps, "num_stages": tile.num_stages}
        for tile in tiles
    ]
    return kernels.select(
        launch.template,
        launch.nodes,
        launch.layout,
        renderings,
        mutated_inputs=launch.mutated,
        call_sizes=launch.programs,
    )


def is_single(size: list[sympy.Expr]) -> bool:
    """Whether a result is one number: Inductor stores that without a mask, from every lane."""
    return size[-1] == 1 and compat.is_true(sympy.Eq(math.prod(size), 1))


def keys_per_block(head_block: int, digits: int, chain: int) -> int:
    """Keys per block, each one chain: a function of padded head size, digits and chains alone.

    Args:
        head_block: The larger padded head size, in elements.
        digits: Of K; 0 for states as stored.
        chain: Terms of a chain.
    """
    return min(chain, 64 if head_block * (digits or 3) <= 256 else 32)


def lower_integers(*call: Any) -> tuple[ir.TensorBox, ir.TensorBox] | None:
    """Lower `heal::integer_attention` on CUDA; None where its reference shall run."""
    if not has_templates(call[0], call[4], call[-1]):
        return None
    return _lower(AttentionProblem.of_integers(*call))


def lower_floats(*call: Any) -> tuple[ir.TensorBox, ir.TensorBox] | None:
    """Lower `heal::attention` on CUDA; None where its reference implementation shall run."""
    if not has_templates(call[0], call[2], call[-1]):
        return None
    return _lower(AttentionProblem.of_floats(*call))


def _lower(problem: AttentionProblem) -> tuple[ir.TensorBox, ir.TensorBox] | None:
    """Output and logsumexp."""
    if problem.empty:
        return _nothing(problem)
    if is_single(problem.output_size):
        return None
    if not selfcheck.usable(NAMES, problem.device, "an attention"):
        return None
    return _decode(problem) if problem.decodes else _prefill(problem)


def has_templates(query: ir.TensorBox, value: ir.TensorBox, numerics: str) -> bool:
    """Whether the templates can take a call; warns if not.

    Args:
        query: As in `check`.
        value: As in `check`.
        numerics: As in `check`.
    """
    reason = check(query, value, numerics)
    if reason is not None:
        warnings.warn(
            f"attention runs without a template: {reason}.",
            selfcheck.TemplateWarning,
            stacklevel=3,
        )
    return reason is None


def check(query: ir.TensorBox, value: ir.TensorBox, numerics: str) -> str | None:
    """Why the templates cannot take operands of these head sizes and this device, or None.

    Args:
        query: Digits `[B, H, D, L, E]`, or `[B, H, L, E]` as stored.
        value: Digits `[B, Hkv, D, S, Ev]`, or `[B, Hkv, S, Ev]` as stored.
        numerics: As `heal::attention` takes it.
    """
    reason = check_device(query)
    if reason is not None:
        selfcheck.refuse_if_strict("an attention", reason)
        return reason
    sizes = [x.get_size()[-1] for x in (query, value)]
    if not all(compat.is_static(size) and 0 < int(size) <= LARGEST_HEAD for size in sizes):
        return f"head sizes {sizes} are not fixed numbers from 1 to {LARGEST_HEAD}"
    if Numerics.parse(numerics).precision == "layercast":
        return "layercast multiplies in FP32, for which there is no attention kernel"
    return None


def _nothing(problem: AttentionProblem) -> tuple[ir.TensorBox, ir.TensorBox]:
    """Zeros, and the denominator of no key: the sink alone, if there is one."""
    full, size = lowerings[aten.full.default], problem.output_size
    options = {"dtype": torch.float32, "device": problem.device}
    output, logsumexp = full(size, 0.0, **options), full(size[:-1], -math.inf, **options)
    sinks: Any = problem.scoring.sinks
    if sinks is not None:
        sinks = to_dtype(lowerings[aten.reshape.default](sinks, [-1, 1]), torch.float32)
        logsumexp = lowerings[aten.expand.default](sinks, size[:-1])
    return output, logsumexp


def _prefill(problem: AttentionProblem) -> tuple[ir.TensorBox, ir.TensorBox]:
    logsumexp = problem.buffer(*problem.output_size[:-1])
    launch = Launch(
        "attention",
        [*problem.nodes(), logsumexp],
        problem.fixed(*problem.output_size),
        mutated=[logsumexp],
        programs=[problem.key_heads, problem.rows, 1],
    )
    knobs = problem.knobs() | {"CHUNK": 0, "JOINED": CHUNK if problem.m_invariant else 0}
    return select(launch, knobs, problem.tiles), logsumexp


def _decode(problem: AttentionProblem) -> tuple[ir.TensorBox, ir.TensorBox]:
    batch, key_heads, keys, _ = problem.key.size
    chunks = compat.ceildiv(keys, CHUNK)
    size = (batch, key_heads, chunks, problem.rows)
    top, total = problem.buffer(*size), problem.buffer(*size)
    launch = Launch(
        "attention",
        [*problem.nodes(), top, total],
        problem.fixed(*size, problem.output_size[-1]),
        mutated=[top, total],
        programs=[problem.key_heads, problem.rows, chunks],
    )
    part = select(launch, problem.knobs() | {"CHUNK": CHUNK, "JOINED": 0}, problem.tiles)
    return _merge(problem, part, top, total)


def _merge(
    problem: AttentionProblem, part: ir.TensorBox, top: ir.TensorBox, total: ir.TensorBox
) -> tuple[ir.TensorBox, ir.TensorBox]:
    logsumexp = problem.buffer(*problem.output_size[:-1])
    sinks: list[Any] = [] if problem.scoring.sinks is None else [problem.scoring.sinks]
    nodes = [compat.realize_inputs(x) for x in (part, top, total, *sinks)]
    launch = Launch(
        "attention_merge",
        [*nodes, logsumexp],
        problem.fixed(*problem.output_size),
        mutated=[logsumexp],
        programs=[problem.key_heads, problem.rows, 1],
    )
    knobs = {"HAS_SINKS": bool(sinks), "BLOCK_V": problem.head_blocks[1], **MERGE}
    return select(launch, knobs, [AttentionTile(1, 1, 1)]), logsumexp


LOWERINGS = {
    torch.ops.heal.attention.default: lower_floats,
    torch.ops.heal.integer_attention.default: lower_integers,
}
