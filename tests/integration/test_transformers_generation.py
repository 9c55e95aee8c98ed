"""generate and decode loops on a healed model: autocast, offloading, prompt lookup, batching."""

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import transformers

import healpass.integrations.border as border
from healpass.errors import CacheError, ConfigError
from healpass.integrations.transformers import HealCache, entries, heal_model, unheal_model
from tests.support.entering import interpreted
from tests.support.tiny_llama import make_llama

IDS = torch.tensor([[1, 2, 3, 1, 2, 3]])
GREEDY = {"max_new_tokens": 6, "do_sample": False}
KV = ("int16", "int24", "fp32")
KINDS = ("dynamic", "static")


@pytest.fixture
def text(llama_fp32):
    """What the FP32 model says."""
    return llama_fp32.generate(IDS, **GREEDY)


# --------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv", KV)
def test_generation_under_autocast_with_fp32_weights(llama_fp32, text, kv, kind):
    """As accelerate's mixed_precision and TRL's bf16=True wrap it: keys FP32, values BF16."""
    with interpreted(), torch.autocast("cpu", torch.bfloat16):
        heal_model(llama_fp32, kv=kv)
        assert torch.equal(llama_fp32.generate(IDS, **GREEDY, cache_implementation=kind), text)


def test_accelerate_prepares_a_healed_model(llama_fp32, text, accelerate):
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    with interpreted():
        model = accelerator.prepare(heal_model(llama_fp32))
        assert torch.equal(accelerator.unwrap_model(model).generate(IDS, **GREEDY), text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv", KV)
def test_a_cache_hands_out_each_state_in_its_own_dtype(llama, kv, kind):
    cache = HealCache(llama.config, 8 if kind == "static" else None, kv)
    keys, values = torch.randn(2, 1, 2, 3, 8).unbind(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = cache.update(keys, values.bfloat16(), 0)
    assert [x.dtype for x in found] == [torch.float32, torch.bfloat16]
    pairs = [(torch.bfloat16, torch.float16), (torch.float32, torch.float64)]
    for first, second in pairs:  # the inverse: no autocast makes these
        with pytest.raises(CacheError, match="Cast them to one dtype"):
            cache.update(keys.to(first), values.to(second), 1)


# ------------------------------------------------------------------------------ kinds of generate


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_offloaded_caches_on_the_cpu(llama, text, kind):
    """transformers' own need CUDA; on the CPU there is nothing to offload."""
    with interpreted():
        heal_model(llama, kv="int24")
        assert torch.equal(llama.generate(IDS, **GREEDY, cache_implementation=kind), text)
        cache = HealCache(llama.config, kv="int24", offloading=True)
        assert torch.equal(llama.generate(IDS, **GREEDY, past_key_values=cache), text)


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("room", [None, 32])
def test_prompt_lookup_and_assistants_take_tokens_back(llama, text, kv, room):
    with interpreted():
        heal_model(llama, kv=kv)
        for way in (
            {"prompt_lookup_num_tokens": 2},
            {"assistant_model": make_llama(hidden_size=16)},
        ):
            cache = HealCache(llama.config, room, kv)
            assert torch.equal(llama.generate(IDS, **GREEDY, **way, past_key_values=cache), text)


@pytest.mark.parametrize("kv", KV)
def test_a_static_cache_that_was_cropped_goes_on_as_if_nothing_had_been_there(llama, kv):
    states = torch.randn(4, 2, 2, 3, 8)
    caches = [HealCache(llama.config, 8, kv) for _ in range(2)]
    for cache in caches:
        cache.update(*states[:2], 0)
    caches[0].update(*states[2:], 0)
    caches[0].crop(-3)
    for cache in caches:
        found = cache.update(*states[2:].flip(0), 0)
        assert int(cache.get_seq_length()) == 6
        last = found if cache is caches[0] else last  # noqa: F821
    assert all(torch.equal(x, y) for x, y in zip(found, last, strict=True))
    with pytest.raises(CacheError, match="negative"):
        caches[0].crop(3)


def test_a_static_window_that_has_rolled_refuses_to_take_back(llama):
    llama.config.layer_types = ["full_attention", "sliding_attention"]
    llama.config.sliding_window = 4
    heal_model(llama)
    cache = HealCache(llama.config, 32)
    with pytest.raises(CacheError, match="keeps only the last 4"):
        llama.generate(IDS, **GREEDY, past_key_values=cache, prompt_lookup_num_tokens=2)
    cache.layers[1].update(*torch.randn(2, 1, 2, 6, 8))
    with pytest.raises(CacheError, match="window of 4 tokens has overwritten"):
        cache.layers[1].crop(-1)


def test_continuous_batching_is_refused_with_a_way_out(llama):
    heal_model(llama)
    with pytest.raises(ConfigError, match="unheal_model"):
        llama.generate_batch([[1, 2, 3]], max_new_tokens=2)
    with pytest.raises(ConfigError, match="paged"):
        llama.generate(IDS, cache_implementation="paged", max_new_tokens=2)
    unheal_model(llama)
    assert "init_continuous_batching" not in vars(llama)


# ------------------------------------------------------------------------------------------ loops


def loop(model, steps=5, **first):
    """Greedy decoding by hand, without a cache of one's own."""
    found = model(IDS, use_cache=True, **first)
    tokens = [found.logits[:, -1:].argmax(-1)]
    for _ in range(steps):
        found = model(tokens[-1], past_key_values=found.past_key_values)
        tokens.append(found.logits[:, -1:].argmax(-1))
    return torch.cat([IDS, *tokens], 1), found


def test_a_loop_by_hand_is_given_the_cache_that_generate_gets(llama, text):
    with interpreted():
        answer, found = loop(heal_model(llama, kv="int24"))
    assert torch.equal(answer, text)
    assert isinstance(found.past_key_values, HealCache)
    assert found.past_key_values.kv == "int24"


def test_without_it_the_loop_would_round(llama, llama_fp32, monkeypatch):
    """The inverse: logits of the loop, by the cache of transformers, are those of BF16 states."""
    expected = loop(llama_fp32)[1].logits
    with interpreted():
        heal_model(llama, kv="int24")
        ours = float((loop(llama)[1].logits - expected).norm())
        monkeypatch.setattr(border, "_makes_cache", lambda *_: False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rounded = float((loop(llama)[1].logits - expected).norm())
    assert rounded > 100 * ours


def test_a_loop_that_trains_gets_a_cache_that_carries_gradients(llama):
    with interpreted(), torch.enable_grad():
        found = heal_model(llama)(IDS, use_cache=True)
        assert found.past_key_values.kv == "fp32"
        found.logits.sum().backward()
    assert llama.model.layers[0].self_attn.k_proj.weight.grad is not None


def test_a_cache_of_transformers_is_warned_of_once(llama):
    with interpreted():
        heal_model(llama)
        cache = transformers.DynamicCache(config=llama.config)
        with pytest.warns(UserWarning, match="given a DynamicCache, which rounds"):
            llama(IDS, past_key_values=cache)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*rounds keys")
            llama(IDS[:, :1], past_key_values=cache)


# ------------------------------------------------------------------------------ copies and undoing

ANSWER = """
import pickle, sys, torch
model = torch.load(sys.argv[1], weights_only=False)
print(type(model._compiled_call_impl).__name__, model._compiled_call_impl.owner is model)
ids = torch.tensor([[1, 2, 3, 1, 2, 3]])
print(model.generate(ids, max_new_tokens=2, do_sample=False).tolist())
"""


def test_a_saved_model_is_healed_in_a_fresh_process(llama, text, tmp_path):
    torch.save(heal_model(llama, kv="int24"), tmp_path / "model.pt")
    done = subprocess.run(
        [sys.executable, "-W", "error:.*not compiled", "-c", ANSWER, tmp_path / "model.pt"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["Entry True", str(text[:, :8].tolist())]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)  # fmt: skip
def test_a_copy_is_healed_by_itself(llama, text, copied):
    with interpreted() as graphs:
        other = copied(heal_model(llama, kv="int24"))
        assert entries(other) == entries(llama)
        assert torch.equal(other.generate(IDS, **GREEDY), text)
        assert graphs
        unheal_model(other)
    assert entries(llama)
    assert llama._compiled_call_impl.owner is llama


def state(model):
    """All that heal_model could leave behind in a model."""
    return [
        (name, sorted(vars(part)), part._compiled_call_impl)
        for name, part in model.named_modules()
    ], model.config._attn_implementation


@pytest.mark.parametrize("options", [{}, {"precision": "exact"}, {"precision": "traced"}])
def test_a_model_that_is_unhealed_is_what_it_was(llama, options):
    before = state(llama)
    expected = llama.generate(IDS, **GREEDY, return_dict_in_generate=True, output_logits=True)
    with interpreted():
        heal_model(llama, **options)
        llama(IDS)
        assert state(llama) != before
        assert unheal_model(llama) is llama
    assert state(llama) == before
    found = llama.generate(IDS, **GREEDY, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
    assert unheal_model(llama) is llama


def test_the_last_of_two_precisions_counts(llama):
    plain = copy.deepcopy(llama)
    with interpreted():
        heal_model(llama, precision="layercast")
        heal_model(llama, precision="traced")
        assert llama.config._attn_implementation == plain.config._attn_implementation
        assert "_prepare_cache_for_generation" not in vars(llama)
        found = llama(IDS, use_cache=True)
        assert torch.equal(found.logits, plain(IDS).logits)
        assert type(found.past_key_values) is transformers.DynamicCache
        heal_model(llama, precision="heal", kv="int24")
        assert heal_model(llama)(IDS, use_cache=True).past_key_values.kv == "int16"


def test_what_the_user_put_there_comes_back(llama):
    llama.compile(backend="eager")
    mine = llama._compiled_call_impl
    heal_model(heal_model(llama))
    assert llama._compiled_call_impl is not mine
    unheal_model(llama)
    assert llama._compiled_call_impl is mine
