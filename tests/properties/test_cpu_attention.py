"""The C++ kernel of attention keeps the operators' bounds, and reads only keys that are seen.

Each kind of scoring is compiled once, for all sizes; hypothesis then draws problems for it.
"""

from __future__ import annotations

import functools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bounds_integer_attention import (
    Case,
    assert_gradients_within_bound,
    assert_output_within_bound,
)
from torch._inductor.utils import run_and_get_code

import healpass.lowering as lowering
from healpass.lowering.cpu.attention import BLOCK_N
from healpass.ops.attention.scoring import Scoring

#: kv, mask, window, softcap, sinks, dropout_p: together, every branch of the kernel.
KINDS = (
    ("int16", "bool", None, 2.0, True, 0.0),
    ("int24", "causal", 5, None, False, 0.3),
    ("fp32", "float", 150, None, True, 0.0),
    ("fp32", "causal", None, None, False, 0.0),
)


@functools.cache
def compiled(kind):
    """One operator with one kind of scoring, for every size."""
    lowering.register()
    case = Case(kind[0], 1, 1, 1, 1, 1, 1, 1.0, 1.0, *kind[1:], None, 0)
    operator, numbers = case.operator, case.arguments()[3:]

    def attend(tensors):
        return operator(*tensors, *numbers)

    return torch.compile(attend, fullgraph=True, dynamic=True)


sizes = st.fixed_dictionaries({
    "heads": st.integers(2, 3),
    "groups": st.integers(2, 3),
    "length": st.sampled_from([2, 7, 130]),
    # Few lengths, because each pair of them is a formula to be derived.
    "keys": st.sampled_from([17, 150, 2500]),
    "head_size": st.sampled_from([3, 64]),
    "value_size": st.sampled_from([5, 40]),
    "spread": st.sampled_from([1e-6, 0.1, 1.0, 8.0]),
    "magnitude": st.sampled_from([1e-30, 1.0, 1e20]),
    "seed": st.integers(0, 2**20),
})  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))
@settings(max_examples=12)
@given(drawn=sizes)
def test_the_kernel_is_within_its_bound(kind, drawn):
    case = case_of(kind, **drawn)
    # One scale for all, or each would be a compile of its own; so would be sizes that are equal.
    operands, (*tensors, is_causal, _, window, cap, p, numerics) = (
        case.operands(),
        case.arguments(),
    )
    arguments = (*tensors, is_causal, 1.0, window, cap, p, numerics)
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        output, logsumexp = compiled(kind)([*operands, *tensors])
    assert_output_within_bound(case, operands, arguments, output, logsumexp)


FLOATS = KINDS[2]


def attend(kind, case, operands, **changes):
    """Output of the kernel; what a case's tensors would be, but for `changes`."""
    tensors = dict(zip(("attn_mask", "sinks", "seed"), case.arguments()[:3], strict=True))
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        return compiled(kind)([*operands, *(tensors | changes).values()])[0]


def case_of(kind, **sizes):
    kv, mask, window, softcap, sinks, dropout_p = kind
    given = {"heads": 2, "groups": 2, "length": 2, "keys": 150, "head_size": 64, "value_size": 40,
             "spread": 1.0, "magnitude": 1.0, "seed": 1} | sizes  # fmt: skip
    return Case(
        kv=kv, mask=mask, window=window, softcap=softcap, sinks=sinks, dropout_p=dropout_p,
        rule=None, **given,
    )  # fmt: skip


def test_decode_reads_only_blocks_of_keys_that_are_seen():
    """1,000 keys of a cache of 32,768: whatever is read of the others is NaN, and would show.

    An FP32 value that is NaN reaches the output if it is read, as its weight 0 makes NaN of it.
    """
    case = case_of(FLOATS, keys=32768)
    query, key, value = case.operands()
    seen = slice(20000, 21000)
    blocks = slice(seen.start // BLOCK_N * BLOCK_N, -(-seen.stop // BLOCK_N) * BLOCK_N)
    mask = torch.full((2, 1, 2, 32768), -math.inf)
    mask[..., seen] = 0.0
    expected = attend(FLOATS, case, (query, key, value), attn_mask=mask)
    unread = torch.full_like(value, math.nan)
    unread[:, :, blocks] = value[:, :, blocks]
    output = attend(FLOATS, case, (query, key, unread), attn_mask=mask)
    assert output.isfinite().all()
    assert torch.equal(output, expected)
    read = value.clone()
    read[:, :, blocks.start] = math.nan  # hidden, in a block that is read
    assert attend(FLOATS, case, (query, key, read), attn_mask=mask).isnan().all()


@pytest.mark.parametrize("kind", KINDS[:3], ids=lambda kind: kind[0])
def test_an_entry_does_not_depend_on_its_batch(kind):
    case = case_of(kind, length=130, keys=300)
    operands = [torch.cat([x, x.flip(0)]) for x in case.operands()]
    mask = case.arguments()[0]
    mask = None if mask is None else torch.cat([mask, mask.flip(0)])
    whole = attend(kind, case, operands, attn_mask=mask)
    half = None if mask is None else mask[:2]
    alone = attend(kind, case, [x[:2] for x in operands], attn_mask=half)
    dropped = case.dropout_p > 0  # the seed counts batch entries
    assert torch.equal(whole[:2], alone)
    assert dropped or torch.equal(whole[2:], alone.flip(0))


def test_a_hidden_scale_that_is_nan_has_no_effect_and_a_visible_one_reaches_its_rows():
    kind = KINDS[1]
    case = case_of(kind, length=130, keys=150)
    operands = list(case.operands())
    clean = attend(kind, case, operands)
    for index in (3, 5):  # of K, of V
        spoiled = list(operands)
        spoiled[index] = operands[index].clone()
        spoiled[index][:, :, 20] = math.nan
        output = attend(kind, case, spoiled)
        hidden = [*range(20), *range(25, 130)]  # causal, and a window of 5
        assert torch.equal(output[:, :, hidden], clean[:, :, hidden])
        assert output[:, :, 20:25].isnan().all()


def test_scores_past_the_range_of_fp32_saturate():
    """Huge queries meet huge keys: a row takes its largest score, and is finite."""
    kind = KINDS[1]
    case = case_of(kind)
    operands = list(case.operands())
    for index in (1, 3):
        operands[index] = torch.full_like(operands[index], 2.0**110)
    assert attend(kind, case, operands).isfinite().all()


def test_views_of_one_buffer_windows_and_caps_need_no_copy_and_no_operator():
    """Q, K and V cut from one projection; the cache of 2,048 keys is longer than the 16 queries.

    No buffer of the generated code is as large as an FP32 copy of the keys.
    """
    lowering.register()

    def layer(states, cache):
        query, new = states.split((4 * 32, 2 * 64), -1)
        query = query.unflatten(-1, (4, 32)).transpose(1, 2)
        digits = torch.ops.heal.quantize(query, "int16")
        rest = Scoring(0.2, is_causal=False, window=5000, softcap=20.0).arguments
        output = torch.ops.heal.integer_attention(*digits, *cache, *cache, *rest, "heal")[0]
        key, value = new.unflatten(-1, (2, 64)).transpose(1, 2).split(32, -1)
        plain = torch.ops.heal.attention(query, key, value, *rest, "heal")[0]
        return output, plain

    states = torch.randn(1, 16, 256)
    cache = torch.ops.heal.quantize(torch.randn(1, 2, 2048, 32), "int16")
    found, (source,) = run_and_get_code(torch.compile(layer, fullgraph=True), states, cache)
    assert not re.search(r"torch\.ops\.heal\.\w+\.default\(", source)
    shapes = re.findall(r"empty_strided_cpu\(\(([\d, ]*)\), \([\d, ]*\), torch.float32", source)
    largest = max(math.prod(map(int, re.findall(r"\d+", shape))) for shape in shapes)
    assert largest < 2 * 2048 * 32
    for ours, reference in zip(found, layer(states, cache), strict=True):
        assert (ours - reference).norm() <= 2.0**-20 * reference.norm()


@pytest.mark.parametrize("kv", ["int16", "fp32"])
def test_compiled_gradients_are_within_their_bounds(kv):
    """Grouped heads, and rows that see no key: torch's flash kernel does it, no score matrix."""
    lowering.register()
    case = case_of((kv, "bool", None, None, False, 0.0), length=40, keys=3, value_size=64)
    operands, arguments = case.operands(), case.arguments()

    def differentiate(grad, tensors, mask):
        call = (*tensors, mask, *arguments[1:])
        results = case.operator(*call)
        return (*results, *case.backward(grad, *call, *results))

    grad = torch.randn(2, 4, 40, 64, generator=torch.Generator().manual_seed(2))
    compiled = torch.compile(differentiate, fullgraph=True)
    found, (source,) = run_and_get_code(compiled, grad, operands, arguments[0])
    assert "_scaled_dot_product_flash_attention_for_cpu_backward" in source
    hidden = ~arguments[0].any(-1).expand(2, 4, 40)
    assert hidden.any()
    assert (found[1] == -math.inf).equal(hidden)
    assert_output_within_bound(case, operands, arguments, *found[:2])
    assert_gradients_within_bound(case, operands, arguments, grad, found[2:])


def test_one_query_of_fp32_goes_through_torchs_flash_kernel():
    """Grouped heads are folded into rows; a row that sees nothing is zero, its logsumexp -inf."""
    lowering.register()
    case = case_of(("fp32", "bool", None, None, False, 0.0), length=1, keys=3, value_size=64)
    mask = torch.tensor([[True, False, True], [False, False, False]])[:, None, None]
    operands, arguments = case.operands(), (mask, *case.arguments()[1:])
    compiled = torch.compile(lambda *tensors: case.operator(*tensors, *arguments[1:]))
    found, (source,) = run_and_get_code(compiled, *operands, mask)
    assert "_scaled_dot_product_flash_attention_for_cpu" in source
    assert_output_within_bound(case, operands, arguments, *found)
    assert (found[1][1] == -math.inf).all()
