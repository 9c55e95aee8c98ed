"""`heal::mm` and `heal::bmm` on CUDA: problem -> check -> operands -> tiles -> choices -> select.

May import `compat`, `kernels`, `operands`, `selfcheck`, `tiles`. One frozen `MatmulProblem` goes
through all steps. Everything that decides bits is a function of it: K and the dtypes, whether
M <= 16, `numerics`, and the generation, whose tensor core decides how long a chain is. Within a
generation the architecture and the hints of symbolic sizes decide tiles only.

Families (rows of one family have the same bits for every M, tile and GPU of one generation):

* decode, M <= 16: BF16 pieces cut in registers, no scales, fixed chunks of K added in order;
* gemm, M > 16 and every `bmm`: FP16 pieces with power-of-two scales, one sum over K;
* layercast, `numerics="layercast"`: chains of IEEE FP32 multiply-adds;
* invariant, `m_invariant` and M > 16: the arithmetic of decode, so that no row tells what M is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.lowering import lowerings
from torch._inductor.virtualized import ops

from healpass.arithmetic.bounds import HARDWARE
from healpass.arithmetic.promotion import TILE_K
from healpass.lowering import compat
from healpass.lowering.cuda import kernels, selfcheck
from healpass.lowering.cuda.operands import Operand, as_pieces, as_stored
from healpass.lowering.cuda.tiles import (
    Tile,
    decode_tiles,
    gemm_tiles,
    invariant_tiles,
    layercast_tiles,
)
from healpass.ops.products.numerics import Numerics

#: Numerics: depth of a K tile, the chains of which are summed before the accumulator rounds.
BLOCK_K = TILE_K
#: Numerics: the decode family ends here (rows of the smallest tensor-core tile).
DECODE_ROWS = 16
#: Numerics: most chunks that the decode family cuts K into, and fewest K tiles of a chunk.
MOST_CHUNKS, FEWEST_TILES = 8, 4
#: Numerics: pieces of an operand in the decode family (8 significant bits each).
BF16_PIECES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
#: Tuning: up to here B is read by few tiles of rows and cut in registers, and A with it if few
#: tiles of columns read it. (A cut A beside a whole B: ptxas serialises wgmma, Triton 3.6.)
FEW_COLUMNS, FEW_ROWS = 256, 128
#: Tuning: depth of a K tile in FP32 (one chain runs through all); Triton 3.6 takes no less.
LAYERCAST_BLOCK_K = 16
#: Tuning: from here on chips have a copy engine that fetches tiles by tensor descriptor.
TMA_CAPABILITY = 90
#: The oldest architecture with BF16 tensor cores, and the oldest that adds as H100 does.
LOWEST_CAPABILITY, HOPPER = 80, 90


def chain_k(capability: int) -> int:
    """K of a chain (`arithmetic.promotion`): 32 on sm_80 to sm_89, then 64."""
    return HARDWARE["a100" if capability < HOPPER else "h100"].promote_every


@dataclass(frozen=True)
class MatmulProblem:
    """One product `[(batch,) m, k] @ [(batch,) k, n]`, all that the steps below need to know."""

    a: ir.TensorBox
    b: ir.TensorBox
    numerics: Numerics
    batch: sympy.Expr | None
    m: sympy.Expr
    n: sympy.Expr
    k: sympy.Expr
    device: torch.device
    capability: int
    groups: ir.TensorBox | None = None

    @classmethod
    def of(
        cls, a: ir.TensorBox, b: ir.TensorBox, numerics: str, groups: ir.TensorBox | None = None
    ) -> MatmulProblem:
        """Describe the product of two IR nodes; with `groups`, of rows routed to matrices.

        Args:
            a: `[(B,) M, K]`.
            b: `[(B,) K, N]`, or `[G, K, N]` with groups.
            numerics: As `heal::mm` takes it.
            groups: INT32 `[G]`, where each group of rows ends; or None.
        """
        *batch, m, k = a.get_size()
        device = a.get_device_or_error()
        major, minor = torch.cuda.get_device_capability(device)
        n = b.get_size()[-1]
        lead = batch[0] if batch else None
        return cls(
            a, b, Numerics.parse(numerics), lead, m, n, k, device, 10 * major + minor, groups
        )

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Dtypes of A and B."""
        return self.a.get_dtype(), self.b.get_dtype()

    @property
    def size(self) -> list[sympy.Expr]:
        """Shape of the result."""
        return [*([] if self.batch is None else [self.batch]), self.m, self.n]

    @property
    def chain_k(self) -> int:
        """Numerics: K of a chain."""
        return chain_k(self.capability)

    @property
    def hints(self) -> tuple[int, int]:
        """Typical M and N."""
        m, n = compat.size_hint((self.m, self.n), fallback=1024)
        return m, n

    def layout(self, *lead: int) -> ir.FixedLayout:
        """Row-major FP32 layout of the result, or of that many partial results."""
        return ir.FixedLayout(self.device, torch.float32, [*map(sympy.Integer, lead), *self.size])

    def divides_k(self, depth: int) -> bool:
        """Whether K is known to be a multiple of `depth`: no mask is needed then."""
        return compat.V.graph.sizevars.statically_known_true(sympy.Eq(sympy.Mod(self.k, depth), 0))


def lower(
    a: ir.TensorBox,
    b: ir.TensorBox,
    numerics: str = "heal",
    groups: ir.TensorBox | None = None,
) -> ir.TensorBox | None:
    """Lower `heal::mm` or `heal::bmm` on CUDA; None where the operator's reference shall run.

    Args:
        a: `[(B,) M, K]` in FP16, BF16 or FP32.
        b: `[(B,) K, N]`, or `[G, K, N]` with groups; any of those.
        numerics: As `heal::mm` takes it.
        groups: INT32 `[G]`, where each group of rows ends; or None.
    """
    reason = check(a)
    if reason is not None:
        selfcheck.refuse_if_strict("a matmul", reason)
        warnings.warn(
            f"a matmul runs without a template: {reason}.", selfcheck.TemplateWarning, stacklevel=2
        )
        return None
    problem = MatmulProblem.of(a, b, numerics, groups)
    if any(compat.is_true(sympy.Eq(size, 0)) for size in (*problem.size, problem.k)):
        return _zeros(problem)
    return lower_matmul(problem)


def lower_grouped(
    a: ir.TensorBox, b: ir.TensorBox, offs: ir.TensorBox, numerics: str = "heal"
) -> ir.TensorBox | None:
    """Lower `heal::grouped_mm` where rows or columns are routed; its gradient sums run as meant.

    A row has the arithmetic of the gemm family, so its bits do not tell who shares its group.

    Args:
        a: FP16, BF16 or FP32; ranks of both as `heal::grouped_mm` takes them.
        b: Any of those.
        offs: INT32 `[G]`, where each group ends.
        numerics: As `heal::grouped_mm` takes it.
    """
    if len(a.get_size()) == 3:  # columns are routed: the transpose of routed rows
        permute = lowerings[torch.ops.aten.permute.default]
        turned = lower_grouped(permute(b, [1, 0]), permute(a, [0, 2, 1]), offs, numerics)
        return None if turned is None else permute(turned, [1, 0])
    ragged_sum = len(b.get_size()) == 2
    # (A result of one element is stored without a mask: see `_by_descriptor`.)
    known = not ragged_sum and b.get_size()[0].is_number and compat.is_many(b.get_size()[-1])
    if not known or Numerics.parse(numerics).precision == "layercast":
        return None
    return lower(a, b, numerics, offs)


def check(a: ir.TensorBox) -> str | None:
    """Why this device cannot run the templates, or None."""
    device = a.get_device_or_error()
    if device.type != "cuda" or torch.version.hip is not None:
        return f"{device.type} is not an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < LOWEST_CAPABILITY:
        return f"compute capability {major}.{minor} is below 8.0, which has no BF16 tensor cores"
    return None


def lower_matmul(problem: MatmulProblem) -> ir.TensorBox | None:
    """Lower one product; None if its template failed its own check on this GPU."""
    name = family(problem)
    if not selfcheck.usable((name,), problem.device, "a matmul"):
        return None
    if name in ("decode", "invariant"):
        return _lower_decode(problem)
    layercast = problem.numerics.precision == "layercast"
    return _lower_layercast(problem) if layercast else _lower_gemm(problem)


def family(problem: MatmulProblem) -> str:
    """The template of a product: a function of its rank, `numerics`, and whether M <= 16.

    A decode chunk is a number in the kernel's text, so a symbolic K (tokens summed over in a
    weight gradient) takes the other families, whatever M.
    """
    if problem.groups is not None:
        return "grouped"
    if problem.batch is None and problem.k.is_number:
        if compat.is_true(sympy.Le(problem.m, DECODE_ROWS)):
            return "decode"
        if problem.numerics.m_invariant:
            return "invariant"
    name = "layercast" if problem.numerics.precision == "layercast" else "gemm"
    return name if problem.batch is None else f"{name}_batched"


def decode_chunk(k: int) -> tuple[int, int]:
    """Terms of K per program and the number of chunks: a function of K alone."""
    tiles = -(-k // BLOCK_K)
    chunks = min(MOST_CHUNKS, max(1, tiles // FEWEST_TILES))
    chunk = -(-tiles // chunks) * BLOCK_K
    return chunk, -(-k // chunk)


def _lower_decode(problem: MatmulProblem) -> ir.TensorBox:
    name = family(problem)
    partials = name == "decode"
    fma = problem.numerics.precision == "layercast"
    chunk, splits = decode_chunk(int(problem.k))
    a_pieces, b_pieces = (BF16_PIECES[dtype] for dtype in problem.dtypes)
    knobs: dict[str, Any] = {
        "A_PIECES": a_pieces,
        "B_PIECES": b_pieces,
        "CHUNK": chunk,
        "SPLITS": splits,
        "FMA": fma,
        "EVEN_K": problem.divides_k(chunk),
        "BLOCK_K": _decode_depth(problem, fma=fma, partials=partials),
        "PARTIALS": partials,
    }
    nodes = list(compat.realize_inputs(problem.a, problem.b))
    if not partials:
        tiles = invariant_tiles(problem.capability, b_pieces, fma=fma)
        return kernels.select(name, nodes, problem.layout(), _renderings(knobs, tiles))
    tiles = decode_tiles(problem.capability, problem.hints[1], pieces_b=b_pieces, fma=fma)
    layout = problem.layout(splits) if splits > 1 else problem.layout()
    parts = kernels.select(name, nodes, layout, _renderings(knobs, tiles))
    return parts if splits == 1 else _add_in_order(parts, splits)


def _decode_depth(problem: MatmulProblem, *, fma: bool, partials: bool) -> int:
    """K of a tile: a chain of the tensor core (numerics), or what FP32 adds at once (tuning)."""
    if not fma:
        return problem.chain_k
    return BLOCK_K if partials else LAYERCAST_BLOCK_K


def _add_in_order(partials: ir.TensorBox, splits: int) -> ir.TensorBox:
    """Sum `[splits, M, N]` over its first dimension, first to last; fuses with what follows."""
    load = partials.make_loader()

    def inner(index: Any) -> Any:
        total = load([0, *index])
        for chunk in range(1, splits):
            total = ops.add(total, load([chunk, *index]))
        return total

    return ir.Pointwise.create(
        device=partials.get_device(),
        dtype=torch.float32,
        inner_fn=inner,
        ranges=partials.get_size()[1:],
    )


def _lower_layercast(problem: MatmulProblem) -> ir.TensorBox:
    batched = problem.batch is not None
    knobs: dict[str, Any] = {"BATCHED": batched, "EVEN_K": problem.divides_k(LAYERCAST_BLOCK_K)}
    knobs |= {"BLOCK_K": LAYERCAST_BLOCK_K}
    nodes = list(compat.realize_inputs(problem.a, problem.b))
    tiles = layercast_tiles(problem.capability, *problem.hints)
    return kernels.select(family(problem), nodes, problem.layout(), _renderings(knobs, tiles))


def _lower_gemm(problem: MatmulProblem) -> ir.TensorBox:
    a, b = gemm_operands(problem)
    groups = problem.groups
    tma = groups is None and _by_descriptor(problem, a, b)
    knobs: dict[str, Any] = {
        "BATCHED": problem.batch is not None,
        "A_PIECES": a.pieces,
        "B_PIECES": b.pieces,
        "A_CUT": a.cut,
        "B_CUT": b.cut,
        "A_SCALED": a.exponent is not None,
        "B_SCALED": b.exponent is not None,
        "EVEN_K": problem.divides_k(BLOCK_K),
        "BLOCK_K": BLOCK_K,
        "CHAIN_K": problem.chain_k,
        "GROUPED": groups is not None,
        "GROUPS": 0 if groups is None else int(problem.b.get_size()[0]),
        "TMA": tma,
        "A_TURNED": tma and a.is_turned(-1),
        "B_TURNED": tma and b.is_turned(-1),
    }
    planes = (a.planes, b.planes)
    tiles = gemm_tiles(problem.capability, *problem.hints, planes, BLOCK_K, cut=b.cut, tma=tma)
    nodes = a.nodes + b.nodes + ([] if groups is None else [compat.realize_inputs(groups)])
    return kernels.select(family(problem), nodes, problem.layout(), _renderings(knobs, tiles))


def _by_descriptor(problem: MatmulProblem, a: Operand, b: Operand) -> bool:
    """Whether the chip has a copy engine that can fetch all tiles.

    It reads zeros past the end, where the other way wraps around. So a result of one element,
    which Inductor stores without a mask, must not come this way.
    """
    many = compat.is_many(problem.n)
    fits = a.fits_descriptors() and b.fits_descriptors()
    return problem.capability >= TMA_CAPABILITY and many and fits


def gemm_operands(problem: MatmulProblem) -> tuple[Operand, Operand]:
    """A and B as the tensor core takes them; two BF16 operands as they are, all else in FP16."""
    if problem.dtypes == (torch.bfloat16, torch.bfloat16):
        return as_stored(problem.a), as_stored(problem.b)
    rows, columns = problem.hints
    b = as_pieces(problem.b, axis=-2, cut=rows <= FEW_ROWS)
    a = as_pieces(problem.a, axis=-1, cut=b.cut and columns <= FEW_COLUMNS)
    return a, b


def _renderings(knobs: dict[str, Any], tiles: list[Tile]) -> list[dict[str, Any]]:
    """The knobs with those of each tile."""
    return [tile.knobs | knobs for tile in tiles]


def _zeros(problem: MatmulProblem) -> ir.TensorBox:
    """An empty sum is zero; an empty result has no elements."""
    return lowerings[torch.ops.aten.full.default](
        problem.size, 0.0, dtype=torch.float32, device=problem.device
    )


LOWERINGS: dict[Any, Callable[..., Any]] = {
    torch.ops.heal.mm.default: lower,
    torch.ops.heal.bmm.default: lower,
    torch.ops.heal.grouped_mm.default: lower_grouped,
}
