"""Fingerprints: what a digest depends on, and what not."""

from __future__ import annotations

import hashlib
import json
from collections import namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import healpass
from healpass.errors import ConfigError
from healpass.fingerprint import check_expected, digest, fingerprint, state_digest
from healpass.numerics_version import NUMERICS_VERSION

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_the_definition_byte_by_byte():
    found = digest(torch.tensor([[1.0, -0.0, float("-inf")]]))
    body = bytes.fromhex("0000803f00000000000080ff")
    assert found == hashlib.sha256(b"healpass logits 1\nfloat32\n1,3\n" + body).hexdigest()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_neither_a_zeros_sign_nor_a_nans_payload_nor_the_layout_shows(dtype):
    width = torch.int32 if dtype == torch.float32 else torch.int16
    nan = torch.tensor([float("nan"), float("nan")], dtype=dtype)
    other = (nan.view(width) + torch.tensor([1, 3], dtype=width)).view(dtype)
    other = torch.where(torch.tensor([True, False]), -other, other)
    zeros = torch.tensor([0.0, -0.0], dtype=dtype)
    first = digest(torch.stack([nan, zeros, zeros + 1]))
    assert first == digest(torch.stack([other, -zeros, zeros + 1]))
    turned = torch.stack([nan, zeros, zeros + 1]).t().contiguous().t()
    assert not turned.is_contiguous()
    assert first == digest(turned)


@given(bits=st.integers(-(2**31), 2**31 - 1), flip=st.integers(0, 31))
def test_every_other_bit_shows(bits, flip):
    flipped = bits ^ (1 << flip if flip < 31 else -(1 << 31))
    x, y = (torch.tensor([n], dtype=torch.int32).view(torch.float32) for n in (bits, flipped))
    same = bool((x.isnan() & y.isnan()).all() or (x == y).all())
    assert (digest(x) == digest(y)) == same


def test_shape_and_dtype_show():
    x = torch.zeros(6)
    found = {digest(x), digest(x.reshape(2, 3)), digest(x.reshape(3, 2)), digest(x.bfloat16())}
    assert len(found | {digest(x.half()), digest(x[:0]), digest(x[0])}) == 7


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match="float64"):
        digest(torch.zeros(2, dtype=torch.float64))


def test_the_state_shows_every_weight_and_buffer():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).bfloat16()
    first = state_digest(model)
    assert first == state_digest(model)
    for tensor in (model[0].bias, model[1].running_mean):
        with torch.no_grad():
            tensor[0] += 1
        assert state_digest(model) != first
        first = state_digest(model)


Output = namedtuple("Output", "logits")


class Model(torch.nn.Module):
    """What `fingerprint` needs of a causal language model."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(7, 8, dtype=torch.bfloat16)
        self.head = torch.nn.Linear(8, 7, dtype=torch.bfloat16)

    def forward(self, input_ids, use_cache):
        del use_cache
        return Output(self.head(self.embedding(input_ids)))


def test_a_fingerprint_names_what_it_depends_on():
    torch.manual_seed(0)
    config = healpass.HealConfig(precision="exact", outputs="fp32", exact_products=3)
    tokens = torch.tensor([[1, 2, 3]])
    found = fingerprint(Model(), tokens, config)
    data = json.loads(found.to_json())
    assert data["options"] == {"precision": "exact", "outputs": "fp32", "exact_products": 3}
    assert data["numerics_version"] == NUMERICS_VERSION
    assert data["tokens"] == [[1, 2, 3]]
    assert data["dtype"] == "float32"
    assert data["shape"] == [1, 3, 7]
    assert str(found).startswith("digest")


@pytest.mark.parametrize("text", ["", "12", "g" * 64, "0" * 65])
def test_what_is_no_digest_is_refused(text):
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        check_expected(text)
    assert check_expected(" " + "AB" * 32 + "\n") == "ab" * 32
