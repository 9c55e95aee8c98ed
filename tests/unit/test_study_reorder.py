"""Linear layers in another order of summation: the same sums, added otherwise."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from healpass.study.run.reorder import Reordered, can_reorder
from tests.support.tiny_llama import make_llama


class Layers(nn.Module):
    """A table of rows, both kinds of linear layer, and an output that shares the table."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 96)
        self.up, self.down = nn.Linear(96, 70), Conv1D(96, 70)
        self.norm = nn.LayerNorm(96)
        self.head = nn.Linear(96, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.down(self.up(self.embedding(ids))))


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return Layers().requires_grad_(False)


IDS = torch.arange(11).reshape(1, 11)


def permuted(model, seed):
    other = copy.deepcopy(model)
    Reordered(other).use(seed)
    return other


def test_sums_of_integers_are_equal_in_any_order(layers):
    for parameter in layers.parameters():
        parameter.copy_(torch.randint_like(parameter, -3, 4))
    assert layers(IDS).abs().max() < 2**24
    assert torch.equal(permuted(layers, 1)(IDS), layers(IDS))


def test_each_seed_is_another_order_for_every_linear_layer(layers):
    one, two = permuted(layers, 1), permuted(layers, 2)
    assert not torch.equal(one(IDS), two(IDS))
    for name in ("up", "down", "head"):
        weights = [getattr(model, name).weight for model in (layers, one, two)]
        assert not torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[1], weights[2])
        for weight in weights:
            assert torch.equal(weight.flatten().sort().values, weights[0].flatten().sort().values)


def test_a_shared_table_is_still_looked_up(layers):
    assert torch.equal(permuted(layers, 1).embedding.weight, layers.embedding.weight)


def test_the_model_itself_is_what_changes_and_a_seed_says_how(layers):
    assert torch.equal(permuted(layers, 3)(IDS), permuted(layers, 3)(IDS))


def test_orders_follow_one_another_and_end_in_the_natural_one(layers):
    other = copy.deepcopy(layers)
    orders = Reordered(other)
    assert torch.equal(other(IDS), layers(IDS))
    for seed in (1, 2, 0, 1):
        orders.use(seed)
        wanted = permuted(layers, seed)
        assert torch.equal(other(IDS), wanted(IDS))
        assert torch.equal(other.head.weight, wanted.head.weight)
    orders.use(0)
    for name in ("up", "down", "head"):
        assert torch.equal(getattr(other, name).weight, getattr(layers, name).weight)


def test_matrices_elsewhere_are_noticed(layers):
    assert can_reorder(layers)
    layers.experts = nn.Parameter(torch.zeros(2, 3, 4))
    assert not can_reorder(layers)


def test_a_language_model_can_be_reordered():
    model = make_llama(torch.float32)
    assert can_reorder(model)
    wanted = model(IDS).logits
    found = permuted(model, 1)(IDS).logits
    assert not torch.equal(found, wanted)
