"""HealCache in integers, and attention "heal": protocol, bytes, models that need it."""

import copy

import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import healpass.ops  # noqa: F401
from healpass.errors import CacheError, ConfigError
from healpass.integrations.attention import attention_forward
from healpass.integrations.transformers import HealCache, register
from tests.support.examples import load_example

register()
heal = torch.ops.heal
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
CONFIG = hf.LlamaConfig(**SIZES)
SLIDING = copy.deepcopy(CONFIG)
SLIDING.layer_types, SLIDING.sliding_window = ["full_attention", "sliding_attention"], 6
KINDS, KV = ("dynamic", "static"), ("int16", "int24")


def states(batch, length, seed, heads=2):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, length, 8)
    return [torch.randn(shape, generator=generator) for _ in range(2)]


def round_trip(x, kv):
    return heal.dequantize(*heal.quantize(x, kv))


def pair(kind, config, kv):
    """Our cache and the one of transformers that it stands for."""
    if kind == "static":
        return HealCache(config, 24, kv), StaticCache(config=config, max_cache_len=24)
    return HealCache(config, kv=kv), DynamicCache(config=config)


@pytest.mark.parametrize("kv", [*KV, "fp32"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_tells_its_bytes(kv, kind):
    cache, _ = pair(kind, CONFIG, kv)
    assert cache.nbytes == 0
    for layer in range(2):
        cache.update(*states(3, 5, layer), layer)
    tokens = 5 if kind == "dynamic" else 24
    cell = 8 * {"int16": 2, "int24": 3, "fp32": 4}[kv] + 4 * (kv != "fp32")  # with its scale
    assert cache.nbytes == 2 * 2 * 3 * 2 * tokens * cell  # layers, keys and values, rows, heads


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [CONFIG, SLIDING], ids=["full", "sliding"])
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), batch=st.integers(1, 3))
def test_it_hands_out_the_quantized_states_of_transformers_cache(kv, kind, config, lengths, batch):
    ours, theirs = pair(kind, config, kv)
    for step, length in enumerate(lengths):
        for layer in range(2):
            new = states(batch, length, 10 * step + layer)
            assert ours.get_mask_sizes(length, layer) == theirs.get_mask_sizes(length, layer)
            for x, y in zip(ours.update(*new, layer), theirs.update(*new, layer), strict=True):
                assert torch.equal(x, round_trip(y, kv))
        assert int(ours.get_seq_length()) == int(theirs.get_seq_length())
    assert ours.is_compileable == theirs.is_compileable
    assert ours.is_sliding == theirs.is_sliding
    assert ours.get_max_length() == theirs.get_max_length()
    static = kind == "static" and not any(theirs.is_sliding)
    assert ours.is_croppable == (theirs.is_croppable or static)  # theirs cannot crop a static one


def filled(kind, kv, batch=3, length=5):
    ours, theirs = pair(kind, CONFIG, kv)
    for layer in range(2):
        new = states(batch, length, layer)
        ours.update(*new, layer)
        theirs.update(*new, layer)
    return ours, theirs


def contents(cache, batch):
    """What a cache hands out, asked for by adding no token."""
    return [x for layer in range(2) for x in cache.update(*states(batch, 0, 0), layer)]


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("kind", KINDS)
def test_scales_move_with_their_digits(kind, kv):
    """The inverse: digits that move without their scales give other values."""
    ours, theirs = filled(kind, kv)
    order = torch.tensor([2, 0, 1])
    for cache in (ours, theirs):
        cache.reorder_cache(order)
    for layer in range(2):
        ours.layers[layer].offload()
        ours.layers[layer].prefetch()
    for x, y in zip(contents(ours, 3), contents(theirs, 3), strict=True):
        assert torch.equal(x, round_trip(y, kv))
    ours.layers[0].digits.reorder_cache(order)
    assert not torch.equal(contents(ours, 3)[0], round_trip(contents(theirs, 3)[0], kv))


def test_crop_repeat_select_and_reset():
    ours, theirs = filled("dynamic", "int16")
    for cache in (ours, theirs):
        cache.crop(-2)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3]))
    for x, y in zip(contents(ours, 2), contents(theirs, 2), strict=True):
        assert torch.equal(x, round_trip(y, "int16"))
    for kind in KINDS:
        cache = filled(kind, "int16")[0]
        cache.reset()
        assert int(cache.get_seq_length()) == 0
        new = states(3, 2, 7)
        found = cache.update(*new, 0)[0][:, :, :2]
        assert torch.equal(found, round_trip(new[0], "int16"))


def test_early_allocation():
    cache = HealCache(CONFIG, 16)
    cache.early_initialization(2, 2, 8, torch.bfloat16, torch.device("cpu"))
    assert cache.is_initialized
    assert cache.layers[0].digits.keys.shape == (2, 4, 16, 8)
    assert cache.layers[0].scales.keys.shape == (2, 2, 16, 1)


@pytest.mark.parametrize("kv", [*KV, "fp32"])
@pytest.mark.parametrize("config", [CONFIG, SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_cache_goes_on_where_it_was(kind, config, kv, tmp_path):
    first, second = pair(kind, config, kv)[0], pair(kind, config, kv)[0]
    for layer in range(2):
        first.update(*states(2, 8, layer), layer)
    first.save(tmp_path / "cache.safetensors")
    second.load(tmp_path / "cache.safetensors")
    assert int(second.get_seq_length()) == 8
    for layer in range(2):
        assert first.get_mask_sizes(3, layer) == second.get_mask_sizes(3, layer)
        new = states(2, 3, 5)
        for x, y in zip(first.update(*new, layer), second.update(*new, layer), strict=True):
            assert torch.equal(x, y)


def test_a_file_of_another_cache_is_refused(tmp_path):
    filled("static", "int16")[0].save(tmp_path / "cache")
    with pytest.raises(CacheError, match="'kv': 'int16'"):
        HealCache(CONFIG, 24, "int24").load(tmp_path / "cache")
    with pytest.raises(CacheError, match="max_cache_len=24"):
        HealCache(CONFIG, 25).load(tmp_path / "cache")


@pytest.fixture(scope="module")
def table():
    """The module that prints the tables of the note."""
    return load_example("attention_accuracy")


@pytest.mark.parametrize(("head_size", "most"), [(64, 1.035), (128, 1.018)])
def test_int16_takes_the_bytes_of_a_bf16_cache(table, head_size, most):
    """Measured: the memory behind every tensor the layer holds. The inverse are the others."""
    found = table.bytes_ratios(head_size)
    print({kv: f"{ratio:.4f}" for kv, ratio in found.items()})
    assert found["int16"] <= most
    assert found["int16"] < found["int24"] < found["fp32"]
    assert found["fp32"] == 2


# ------------------------------------------------------------------------------------- wrong use


def test_wrong_use_says_what_to_do():
    cache = HealCache(CONFIG, 8)
    keys, values = states(2, 3, 0)
    cache.update(keys, values, 0)
    before = cache.layers[0].digits.keys.clone()
    with pytest.raises(CacheError, match="HealCache is full"):
        cache.update(*states(2, 6, 1), 0)
    with pytest.raises(CacheError, match=r"float64 and values in torch\.float32"):
        cache.update(keys.double(), values, 0)
    with pytest.raises(CacheError, match="got batch 2, 4 heads"):
        cache.update(*states(2, 1, 0, heads=4), 0)
    with pytest.raises(CacheError, match="another model's configuration"):
        cache.update(keys, values, 2)
    with torch.enable_grad(), pytest.raises(CacheError, match=r"torch\.no_grad"):
        cache.update(keys.requires_grad_(), values, 0)
    assert torch.equal(cache.layers[0].digits.keys, before)
    assert int(cache.get_seq_length()) == 3


def test_attention_without_its_mask_function_is_refused(monkeypatch):
    model = hf.LlamaForCausalLM(copy.deepcopy(CONFIG))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "alone", attention_forward)
    model.set_attn_implementation("alone")
    with pytest.raises(ConfigError, match="has no mask function"):
        model(torch.arange(4)[None])
    assert "heal" in ALL_MASK_ATTENTION_FUNCTIONS


# ---------------------------------------------------------------------------------- whole models

MODELS = {
    "llama": (hf.LlamaForCausalLM, CONFIG),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig(**SIZES, sliding_window=4)),
    "gemma2": (
        hf.Gemma2ForCausalLM,
        hf.Gemma2Config(**SIZES, head_dim=8, sliding_window=4, attn_logit_softcapping=2.0),
    ),
    "gemma3": (
        hf.Gemma3ForCausalLM,
        hf.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4),
    ),
    "gpt_oss": (
        hf.GptOssForCausalLM,
        hf.GptOssConfig(
            **SIZES, head_dim=8, sliding_window=4, num_local_experts=2, num_experts_per_tok=1
        ),
    ),
}
IDS = torch.tensor([[0, 0, 0, 5, 9, 13, 21, 34], [11, 3, 7, 8, 20, 40, 2, 15]])
MASK = (IDS != 0).long()
VISIBLE = MASK.bool()


@pytest.fixture(params=MODELS)
def model(request):
    """A random FP32 model, and its FP64 twin; plain attention in both."""
    make, config = MODELS[request.param]
    torch.manual_seed(0)
    ours = make._from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    twin = make._from_config(copy.deepcopy(config), dtype=torch.float64).eval()
    for x in ours.parameters():
        torch.nn.init.normal_(x, std=0.3)
    twin.load_state_dict(ours.state_dict())
    if hasattr(twin, "set_experts_implementation"):
        twin.set_experts_implementation("eager")  # torch's grouped_mm has no FP64
    ALL_ATTENTION_FUNCTIONS.register("exact", exact_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("exact", sdpa_mask)
    for model in (ours, twin):
        model.set_attn_implementation("exact")
    return ours, twin


def exact_attention(module, query, key, value, attention_mask, scaling, softcap=None, s_aux=None,
                    **_):  # fmt: skip
    """Attention in the dtype of the model: transformers' own casts an FP64 softmax to FP32."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = scaling * query @ key.mT
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    if attention_mask is None:
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    scores = scores.masked_fill(~attention_mask, -1e9)
    sinks = scores.new_full((1,), -1e30) if s_aux is None else s_aux
    column = sinks[:, None, None].expand(*scores.shape[:-1], 1)
    weights = torch.softmax(torch.cat([column, scores], -1), -1)[..., 1:]
    return (weights @ value).transpose(1, 2), None


def distance(found, exact, rows=VISIBLE):
    return float((found.double() - exact)[rows].norm() / exact[rows].norm())


@pytest.mark.parametrize("attention", ["heal", "heal_int24", "heal_fp32"])
def test_models_with_windows_caps_and_sinks_agree_with_fp64(model, attention):
    """Within twice the FP32 model's error, or the coarseness of INT16 (numerics: fifty times)."""
    ours, twin = model
    exact = twin(IDS, attention_mask=MASK).logits
    single = distance(ours(IDS, attention_mask=MASK).logits, exact)
    ours.set_attn_implementation(attention)
    error = distance(ours(IDS, attention_mask=MASK).logits, exact)
    print(f"{attention}: {error:.2e}, FP32 {single:.2e}")
    assert error <= (2**8 if attention == "heal" else 2) * single


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_and_decode_in_chunks_equal_one_long_forward(model, kind):
    """With padding on the left; also equal to each prompt alone. Each has FP32's error only."""
    ours, twin = model
    exact = twin(IDS, attention_mask=MASK).logits
    single = distance(ours(IDS, attention_mask=MASK).logits, exact)
    ours.set_attn_implementation("heal_int24")
    for cuts in ((8,), (5, 6, 7, 8), (3, 7, 8)):
        cache = HealCache(ours.config, 12 if kind == "static" else None, "int24")
        parts, start = [], 0
        for end in cuts:
            positions = (MASK.cumsum(1) - 1).clamp_min(0)[:, start:end]
            parts.append(
                ours(
                    IDS[:, start:end],
                    attention_mask=MASK[:, :end],
                    position_ids=positions,
                    past_key_values=cache,
                ).logits
            )
            start = end
        positions = (MASK.cumsum(1) - 1).clamp_min(0)
        whole = twin(IDS, attention_mask=MASK, position_ids=positions).logits
        error = distance(torch.cat(parts, 1), whole)
        print(f"{kind} {cuts}: {error:.2e}, FP32 {single:.2e}")
        assert error <= 4 * single
    alone = ours(IDS[:1, 3:]).logits
    assert distance(alone, twin(IDS[:1, 3:]).logits, slice(None)) <= 4 * single


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_decoder_reads_the_cross_attention_from_the_layer(kind):
    config = hf.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.T5ForConditionalGeneration(config).eval()
    search = {"do_sample": False, "max_new_tokens": 6, "attention_mask": MASK}
    expected = model.generate(IDS, **search)
    room = 16 if kind == "static" else None
    parts = [HealCache(config, room, "int24"), HealCache(config, 8 if room else None, "int24")]
    found = model.generate(IDS, **search, past_key_values=EncoderDecoderCache(*parts))
    assert torch.equal(found, expected)
    assert parts[1].layers[1].keys.shape == (2, 4, 8, 8)


def test_generate_with_beams_gives_the_same_text_with_int24_as_with_fp32(llama_fp32):
    ids = torch.arange(1, 6)[None]
    search = {"num_beams": 3, "do_sample": False, "max_new_tokens": 6}
    expected = llama_fp32.generate(ids, **search)
    cache = HealCache(llama_fp32.config, kv="int24")
    assert torch.equal(llama_fp32.generate(ids, **search, past_key_values=cache), expected)
