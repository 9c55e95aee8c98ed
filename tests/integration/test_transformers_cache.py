"""HealCache in FP32 follows transformers' protocol, and loses or overwrites nothing."""

import copy
import functools
import warnings

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from healpass.errors import CacheError, ConfigError
from healpass.integrations.transformers import HealCache

pytestmark = pytest.mark.filterwarnings("ignore:HealCache is filled by a model")

CONFIG = transformers.LlamaConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
SLIDING = copy.deepcopy(CONFIG)
SLIDING.layer_types = ["full_attention", "sliding_attention"]
SLIDING.sliding_window = 6

KINDS = ("dynamic", "static")
#: Integers have tests of their own, in test_transformers_integers.py.
FP32Cache = functools.partial(HealCache, kv="fp32")


def states(batch, length, dtype, seed, heads=2):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, length, 8)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]


def pair(kind, config):
    """Our cache and the one of transformers that it stands for."""
    if kind == "static":
        return FP32Cache(config, 24), StaticCache(config=config, max_cache_len=24)
    return FP32Cache(config), DynamicCache(config=config)


chunks = st.lists(st.integers(1, 5), min_size=1, max_size=4)
dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [CONFIG, SLIDING], ids=["full", "sliding"])
@given(lengths=chunks, batch=st.integers(1, 3), dtype=dtypes)
def test_it_hands_out_what_the_cache_of_transformers_does(kind, config, lengths, batch, dtype):
    ours, theirs = pair(kind, config)
    for step, length in enumerate(lengths):
        for layer in range(2):
            new = states(batch, length, dtype, 10 * step + layer)
            assert ours.get_mask_sizes(length, layer) == theirs.get_mask_sizes(length, layer)
            expected = theirs.update(*new, layer)
            found = ours.update(*new, layer)
            for x, y in zip(found, expected, strict=True):
                assert x.dtype == dtype
                assert torch.equal(x, y)
        assert int(ours.get_seq_length()) == int(theirs.get_seq_length())
    assert ours.is_compileable == theirs.is_compileable
    assert ours.is_sliding == theirs.is_sliding
    assert ours.get_max_length() == theirs.get_max_length()


@pytest.mark.parametrize("kind", KINDS)
@given(dtype=dtypes)
def test_it_stores_fp32_or_wider(kind, dtype):
    cache, _ = pair(kind, SLIDING)
    for layer in range(2):
        cache.update(*states(1, 3, dtype, 0), layer)
        for buffer in (cache.layers[layer].keys, cache.layers[layer].values):
            assert buffer.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_an_fp32_state_survives_where_a_bf16_cache_rounds_it(kind):
    """The inverse: what the cache of a BF16 model would keep differs."""
    wide = states(1, 3, torch.float32, 0)
    cache, theirs = pair(kind, CONFIG)
    assert torch.equal(cache.update(*wide, 0)[0][:, :, :3], wide[0])
    narrow = theirs.update(*(x.bfloat16() for x in wide), 0)[0].float()
    assert not torch.equal(narrow[:, :, :3], wide[0])


@pytest.mark.parametrize("kind", KINDS)
def test_beams_reset_and_early_allocation(kind):
    ours, theirs = pair(kind, CONFIG)
    order = torch.tensor([2, 0, 0])
    for cache in (ours, theirs):
        for layer in range(2):
            cache.update(*states(3, 4, torch.bfloat16, layer), layer)
        cache.reorder_cache(order)
    assert torch.equal(ours.layers[1].keys, theirs.layers[1].keys.float())
    ours.reset()
    assert int(ours.get_seq_length()) == 0
    ours.update(*states(3, 2, torch.bfloat16, 5), 0)
    assert int(ours.get_seq_length()) == 2


def test_early_allocation_is_fp32_too():
    cache = FP32Cache(CONFIG, 16)
    cache.early_initialization(2, 2, 8, torch.bfloat16, torch.device("cpu"))
    assert cache.is_initialized
    assert cache.layers[0].keys.dtype == torch.float32
    assert cache.layers[0].keys.shape == (2, 2, 16, 8)


def test_crop_and_repeat_work_on_a_growing_cache():
    cache = FP32Cache(CONFIG)
    keys, values = states(2, 5, torch.bfloat16, 0)
    for layer in range(2):
        cache.update(keys, values, layer)
    cache.crop(-2)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert torch.equal(cache.layers[1].keys, keys[:, :, :3].float())


@given(first=st.integers(1, 8), second=st.integers(1, 8))
def test_a_static_cache_is_never_overwritten_past_its_end(first, second):
    cache = FP32Cache(CONFIG, max_cache_len=8)
    cache.update(*states(1, first, torch.bfloat16, 0), 0)
    before = cache.layers[0].keys.clone()
    if first + second <= 8:
        cache.update(*states(1, second, torch.bfloat16, 1), 0)
        assert torch.equal(cache.layers[0].keys[:, :, :first], before[:, :, :first])
        return
    with pytest.raises(CacheError, match="HealCache is full"):
        cache.update(*states(1, second, torch.bfloat16, 1), 0)
    assert torch.equal(cache.layers[0].keys, before)
    assert int(cache.get_seq_length()) == first


def test_wrong_use_says_what_to_do():
    cache = FP32Cache(CONFIG)
    cache.update(*states(2, 3, torch.bfloat16, 0), 0)
    with pytest.raises(CacheError, match="another model's configuration"):
        cache.update(*states(2, 3, torch.bfloat16, 0), 2)
    with pytest.raises(CacheError, match="one cache per model and batch size"):
        cache.update(*states(3, 1, torch.bfloat16, 0), 0)
    with pytest.raises(CacheError, match="4 heads of size 8"):
        cache.update(*states(2, 1, torch.bfloat16, 0, heads=4), 0)
    with pytest.raises(CacheError, match="max_cache_len=0"):
        FP32Cache(CONFIG, max_cache_len=0)
    with pytest.raises(ConfigError, match="Did you mean 'fp32'"):
        FP32Cache(CONFIG, kv="fp23")


def test_layers_with_another_kind_of_state_are_refused():
    hybrid = copy.deepcopy(CONFIG)
    hybrid.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(CacheError, match="linear_attention"):
        FP32Cache(hybrid)


def test_layers_that_share_a_cache_hold_none():
    shared = copy.deepcopy(CONFIG)
    shared.layer_types = ["full_attention", "mlp"]
    assert type(FP32Cache(shared).layers[1]).__name__ == "DummyLayer"


def test_an_uncompiled_16_bit_model_is_warned_of(llama, llama_fp32):
    ids = torch.arange(4)[None]
    with pytest.warns(UserWarning, match="not compiled"):
        llama(ids, past_key_values=FP32Cache(llama.config))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not compiled")
        llama_fp32(ids, past_key_values=FP32Cache(llama.config))


def test_an_fp32_model_generates_the_same_with_it(llama_fp32):
    ids = torch.arange(1, 6)[None].repeat(2, 1)
    expected = llama_fp32.generate(ids, do_sample=False, max_new_tokens=8)
    for cache in (FP32Cache(llama_fp32.config), FP32Cache(llama_fp32.config, 16)):
        found = llama_fp32.generate(ids, do_sample=False, max_new_tokens=8, past_key_values=cache)
        assert torch.equal(found, expected)


def test_beam_search_reorders_it(llama_fp32):
    ids = torch.arange(1, 6)[None]
    search = {"num_beams": 3, "do_sample": False, "max_new_tokens": 6}
    expected = llama_fp32.generate(ids, **search)
    found = llama_fp32.generate(ids, **search, past_key_values=FP32Cache(llama_fp32.config))
    assert torch.equal(found, expected)


def test_the_version_of_transformers_has_the_hook_that_heal_model_uses():
    hook = transformers.GenerationMixin._prepare_cache_for_generation
    names = hook.__code__.co_varnames[: hook.__code__.co_argcount]
    assert names == (
        "self",
        "generation_config",
        "model_kwargs",
        "generation_mode",
        "batch_size",
        "max_cache_length",
    )
