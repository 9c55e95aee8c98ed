"""Which results `outputs="fp32"` hands out in FP32: what the caller gets, and nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from healpass import watch
from healpass.config import HealConfig
from healpass.graph.passes import promote_outputs
from healpass.graph.pipeline import rewrite
from tests.support.rewriting import Rewritten

BF16, FP32 = torch.bfloat16, torch.float32
FP32_OUT = HealConfig(outputs="fp32", kv="fp32")
X = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)).to(BF16)
WEIGHT = nn.Parameter(torch.eye(8, dtype=BF16))


def dtypes(function, *args, config=FP32_OUT):
    """The dtypes of the results of a function as the backend would compile it."""
    results = torch.compile(function, backend=as_the_backend(config))(*args)
    return [result.dtype for result in results]


def as_the_backend(config):
    def backend(graph_module, inputs):
        rewrite(graph_module, config, outermost=watch.is_outermost())
        return graph_module.forward

    return backend


def logits_and_loss(x):
    logits = x @ WEIGHT
    return logits, F.cross_entropy(logits.flatten(0, 1).float(), torch.arange(8))


def hidden_and_pooled(x):
    hidden = F.layer_norm(x @ WEIGHT, (8,))
    return hidden, hidden[:, 0] @ WEIGHT


def all_hidden_states(x):
    states = [x @ WEIGHT]
    states += [F.relu(states[-1] @ WEIGHT)]
    return (*states, states[-1] @ WEIGHT)


def embeddings_and_similarity(x):
    texts, images = x[0] @ WEIGHT, x[1] @ WEIGHT
    return texts, images, texts @ images.T


@pytest.mark.parametrize(
    "function", [logits_and_loss, hidden_and_pooled, all_hidden_states, embeddings_and_similarity]
)
def test_what_is_handed_out_is_wide_whoever_else_reads_it(function):
    found = dtypes(function, X)
    assert found == [FP32] * len(found)
    assert BF16 in dtypes(function, X, config=HealConfig())


def heads(x):
    return x.unflatten(-1, (2, 4)).transpose(1, 2)


def new_cache(x):
    key, cached = heads(x @ WEIGHT), heads(x @ WEIGHT)
    return F.scaled_dot_product_attention(heads(x), key, cached), key, cached


def grown_cache(x, past):
    key = torch.cat([past, heads(x @ WEIGHT)], 2)
    repeated = key[:, :, None].expand(2, 2, 1, -1, 4).reshape(2, 2, -1, 4)
    return F.scaled_dot_product_attention(heads(x), repeated, repeated), key


def attention_written_out(x):
    key, cached = heads(x @ WEIGHT), heads(x @ WEIGHT)
    return (heads(x) @ key.transpose(2, 3)).softmax(-1) @ cached, key, cached


def recurrent_state(x):
    held = x.new_zeros(2, 8)
    held.copy_((x @ WEIGHT).sum(1))
    return held @ WEIGHT, held


@pytest.mark.parametrize(
    ("function", "given"),
    [
        (new_cache, ()),
        (grown_cache, (heads(X),)),
        (attention_written_out, ()),
        (recurrent_state, ()),
    ],
)
def test_what_the_next_call_reads_again_keeps_its_dtype(function, given):
    first, *states = dtypes(function, X, *given)
    assert first == FP32
    assert states == [BF16] * len(states)


def test_without_the_rule_a_cache_would_be_widened(monkeypatch):
    monkeypatch.setattr(promote_outputs, "handed_on", lambda *_: set())
    assert dtypes(new_cache, X)[1:] == [FP32, FP32]


# ----------------------------------------------------------------------- graphs that are fragments


def broken(x):
    first = x @ WEIGHT
    torch._dynamo.graph_break()
    between = torch.add(first, 0)
    return between @ WEIGHT, first


def inner(x):
    return x @ WEIGHT


def calls_at_a_break(x):
    with torch.random.fork_rng():  # Dynamo skips this frame and compiles what it calls
        given = inner(x)
        assert given.dtype == x.dtype, "the code in between was written for this dtype"
        return given @ WEIGHT, given


class Calls(nn.Module):
    """What a module returns passes through torch's own frames to the caller."""

    def forward(self, x):
        return (x @ WEIGHT,)


def test_only_the_outermost_results_are_wide():
    assert dtypes(broken, X) == [FP32, BF16]
    assert dtypes(calls_at_a_break, X) == [BF16, BF16]
    assert dtypes(Calls(), X) == [FP32]


def test_code_between_two_graphs_fails_on_wide_values(monkeypatch):
    """The inverse: with every fragment's results widened, code in between gets another dtype."""
    monkeypatch.setattr(watch, "is_outermost", lambda: True)
    assert dtypes(broken, X) == [FP32, FP32]
    with pytest.raises(AssertionError, match="written for this dtype"):
        dtypes(calls_at_a_break, X)


def test_rounding_at_a_break_is_listed():
    run = Rewritten(inner)
    run(X)
    assert not run.reports[0].rounds_at_breaks
