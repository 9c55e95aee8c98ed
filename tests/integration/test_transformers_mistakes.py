"""A user's mistake shows its own error, and leaves the process and other models as they were."""

import warnings
from unittest import mock

import pytest
import torch

import healpass
from healpass import uncompiled, watch
from healpass.errors import CacheError, StrictError
from healpass.integrations.transformers import HealCache, heal_model
from tests.support.entering import interpreted
from tests.support.tiny_llama import make_llama

IDS = torch.tensor([[5, 6, 7]])


#: An error leaves the frames that it went through skipped.
BROKEN = mock.patch.object(uncompiled, "_trace_again", return_value=None)


def wrong_batch(model):
    cache = HealCache(model.config)
    model(IDS, past_key_values=cache)
    with pytest.raises(CacheError, match="holds 1 rows, and the model was called with 3"):
        model.generate(IDS.repeat(3, 1), past_key_values=cache, max_new_tokens=2, do_sample=False)


def wrong_model(model):
    other = make_llama(num_hidden_layers=3)
    with pytest.raises(CacheError, match="another model's configuration"):
        model(IDS, past_key_values=HealCache(make_llama(num_hidden_layers=1).config))
    del other


def integers_with_gradients(model):
    with torch.enable_grad(), pytest.raises(CacheError, match=r"torch\.no_grad"):
        model(IDS, past_key_values=HealCache(model.config))


def no_inputs(model):
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()


def both_inputs(model):
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(IDS, inputs_embeds=torch.zeros(1, 3, 32))


def unknown_argument_of_a_part(model):
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model.model(attention_mask=IDS)


MISTAKES = [
    wrong_batch, wrong_model, integers_with_gradients, no_inputs, both_inputs,
    unknown_argument_of_a_part,
]  # fmt: skip


def whole_graphs(graphs, *models):
    """Call the models as they should be called: each is one graph, compiled as a whole."""
    before, breaks = len(graphs), dict(torch._dynamo.utils.counters["graph_break"])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*uncompiled")
        warnings.filterwarnings("error", message=".*not compiled")
        for model in models:
            assert model(IDS, use_cache=False).logits.dtype == torch.float32
    assert dict(torch._dynamo.utils.counters["graph_break"]) == breaks
    return len(graphs) - before == len(models)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_leaves_every_model_compiled_as_a_whole(llama, mistake):
    with interpreted() as graphs:
        heal_model(llama)
        other = heal_model(make_llama(), precision="layercast")
        mistake(llama)
        assert whole_graphs(graphs, llama, other)
        mistake(llama)
        assert whole_graphs(graphs, llama, other) is False  # nothing is compiled anew
        llama.generate(IDS, max_new_tokens=2, do_sample=False)


def test_a_mistake_in_the_middle_of_fragments_leaves_models_of_the_class_whole(llama):
    """A graph break splits the call; what raises then is in code that all models share."""
    broken = heal_model(make_llama())
    with interpreted() as graphs:
        heal_model(llama), heal_model(broken)
        broken.model.embed_tokens.register_forward_hook(lambda *_: torch._dynamo.graph_break())
        with pytest.raises(RuntimeError, match=r"index|size|shape"):
            broken(IDS, labels=IDS[:, :2], use_cache=False)
        assert whole_graphs(graphs, llama)


def test_without_restoring_the_frames_a_mistake_ends_whole_graphs(llama):
    """The inverse: Dynamo skips the frames that raised from then on."""
    with interpreted() as graphs, BROKEN:
        heal_model(llama)
        no_inputs(llama)
        llama(IDS, use_cache=False)
        no_inputs(llama)
        with pytest.raises((AssertionError, UserWarning)):
            assert whole_graphs(graphs, llama)


def test_a_model_compiled_without_heal_model_recovers_too(llama):
    """Entries share no code with `model.compile`, whose mistakes do not reach them."""
    plain = make_llama()
    plain.compile(backend="eager", dynamic=True)
    with pytest.raises(ValueError, match="exactly one of"):
        plain()
    with interpreted() as graphs:
        assert whole_graphs(graphs, heal_model(llama))


def test_a_fallback_of_torch_is_said_once(llama, monkeypatch):
    monkeypatch.setattr(watch, "compile_limits", dict)
    with interpreted(), torch._dynamo.config.patch(recompile_limit=1):
        heal_model(llama)
        llama(IDS, use_cache=False)
        with pytest.warns(UserWarning, match=r"uncompiled.*LlamaForCausalLM.*recompile_limit"):
            llama(IDS, use_cache=False, logits_to_keep=1)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*uncompiled")
            llama(IDS, use_cache=False, logits_to_keep=1)
    assert not healpass.status(llama).whole


@pytest.mark.parametrize("options", [{"strict": True}, {"precision": "exact"}])
def test_a_fallback_of_torch_is_refused(llama, monkeypatch, options):
    monkeypatch.setattr(watch, "compile_limits", dict)
    with interpreted(), torch._dynamo.config.patch(recompile_limit=1):
        heal_model(llama, **options)
        llama(IDS, use_cache=False)
        for _ in range(2):
            with pytest.raises(StrictError, match=r"LlamaForCausalLM.*recompile_limit"):
                llama(IDS, use_cache=False, logits_to_keep=1)
        llama(IDS, use_cache=False)


@pytest.mark.skipif(not watch.compile_limits(), reason="this torch has no limit per compile")
def test_more_kinds_of_call_than_torch_allows_by_itself(llama):
    with interpreted() as graphs, torch._dynamo.config.patch(recompile_limit=1):
        heal_model(llama, strict=True)
        for kind in ({}, {"logits_to_keep": 1}, {"labels": IDS}, {"output_hidden_states": True}):
            llama(IDS, use_cache=False, **kind)
    assert len(graphs) == 4
