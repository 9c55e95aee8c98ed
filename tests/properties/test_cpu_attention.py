"""The C++ kernel of attention keeps the operators' bounds, and reads only keys that are seen.

Each kind of scoring is compiled once, for all sizes; hypothesis then draws problems for it.
"""

from __future__ import annotations

import functools

import healpass.lowering as lowering
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bounds_integer_attention import Case, assert_output_within_bound

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
    kv, mask, window, softcap, sinks, dropout_p = kind
    case = Case(
        kv=kv, mask=mask, window=window, softcap=softcap, sinks=sinks, dropout_p=dropout_p,
        rule=None, **drawn,
    )  # fmt: skip
    # One scale for all, or each would be a compile of its own; so would be sizes that are equal.
    operands, (*tensors, is_causal, _, window, cap, p, numerics) = (
        case.operands(),
        case.arguments(),
    )
    arguments = (*tensors, is_causal, 1.0, window, cap, p, numerics)
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        output, logsumexp = compiled(kind)([*operands, *tensors])
    assert_output_within_bound(case, operands, arguments, output, logsumexp)
