"""Regions, loops, masks made inside, and state-space models, compiled as their users compile them.

Errors are compared with those of FP32: `|heal - exact| <= 2 |fp32 - exact| + 4u |exact|` in the
maximum norm (`against_torch`); 16-bit arithmetic is some thousand times worse.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch._higher_order_ops.scan import scan
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from healpass import explain
from healpass.config import HealConfig
from healpass.integrations.transformers import heal_model
from tests.support.against_torch import U


def ratio(result, wide, exact):
    """Observed/bound."""
    budget = 2 * (wide.double() - exact).abs().max() + 4 * U * exact.abs().max()
    return float((result.double() - exact).abs().max() / budget)


def compiled_ratio(function, operands, *, dynamic=False):
    run = torch.compile(function, backend="heal", dynamic=dynamic, options={"outputs": "fp32"})
    with torch.no_grad():
        result = run(*operands)
        wide, exact = (
            function(*(x.to(dtype) if x.is_floating_point() else x for x in operands))
            for dtype in (torch.float32, torch.float64)
        )
    found = ratio(result, wide, exact)
    print(f"observed/bound {found:.3f}")
    return found


@torch.compiler.nested_compile_region
def norm(x, w):
    return F.rms_norm(x, (32,), w)


def normed_twice(x, w, a):
    return norm(norm(x, w) @ a, w)


def recurrence(x, w, a):
    carry, rows = scan(lambda c, row: (torch.tanh(c * w + row @ a), c * 2), x[0] * 1, x)
    return carry + rows.sum(0)


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


@pytest.mark.parametrize(
    ("function", "dynamic"),
    [(normed_twice, False), (recurrence, False), (recurrence, True)],
    ids=["region", "loop", "loop of any length"],
)
def test_regions_and_loops_through_inductor(function, dynamic):
    operands = (random(5, 32), torch.ones(32).bfloat16(), random(32, 32) / 8)
    assert compiled_ratio(function, operands, dynamic=dynamic) <= 1


def test_exact_reads_one_weight_twice():
    """A layer that is run again (ALBERT): its weight's scales were one name twice in C++."""
    x, w = random(6, 16), random(16, 16) / 4
    run = torch.compile(
        lambda x, w: torch.relu(x @ w) @ w, backend="heal", options={"precision": "exact"}
    )
    with torch.no_grad():
        result = run(x, w)
    exact = torch.relu(x.double() @ w.double()) @ w.double()
    bound = 2.0**-8 * exact.abs().max()  # of the output, rounded to BF16
    assert (result.double() - exact).abs().max() <= bound


def attended_by_document(query, documents):
    def mask(b, h, i, j):
        return (documents[i] == documents[j]) & (i >= j)

    length = query.shape[-2]
    block_mask = create_block_mask(mask, None, None, length, length, device="cpu")
    return flex_attention(query, query, query, block_mask=block_mask)


@pytest.mark.parametrize("precision", ["heal", "layercast", "exact"])
def test_a_mask_made_inside_the_compiled_function(precision):
    """The mask is made by vmap, and by packets of overloads."""
    query, documents = random(1, 2, 130, 16), torch.arange(130) // 40
    options = {"precision": precision, "outputs": "fp32"}
    with torch.no_grad():
        run = torch.compile(attended_by_document, backend="heal", options=options)
        result = run(query, documents)
        exact = attended_by_document(query.double(), documents)
        plain = attended_by_document(query, documents)
    error, rounded = (float((x.double() - exact).abs().max()) for x in (result, plain))
    print(f"error {error:.1e}, in BF16 {rounded:.1e}")
    assert error <= rounded / 4  # INT16 keys and values are 64 times finer


# --------------------------------------------------------------------- models with a recurrence

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": None,
    "pad_token_id": 0,
}
STATES = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 8}
MODELS = {
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=50, hidden_size=32, state_size=8, num_hidden_layers=1)
    ),
    "mamba2": lambda: hf.Mamba2ForCausalLM(
        hf.Mamba2Config(
            vocab_size=50,
            hidden_size=32,
            state_size=8,
            num_hidden_layers=1,
            num_heads=4,
            head_dim=16,
            n_groups=2,
            chunk_size=4,
        )
    ),
    "bamba": lambda: hf.BambaForCausalLM(
        hf.BambaConfig(
            **SIZES, **STATES, num_hidden_layers=2, mamba_chunk_size=4, attn_layer_indices=[1]
        )
    ),
    "falcon_h1": lambda: hf.FalconH1ForCausalLM(
        hf.FalconH1Config(
            **SIZES, **STATES, num_hidden_layers=1, mamba_d_ssm=64, mamba_chunk_size=4
        )
    ),
    "qwen3_next": lambda: hf.Qwen3NextForCausalLM(
        hf.Qwen3NextConfig(
            **SIZES,
            num_hidden_layers=2,
            head_dim=8,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            layer_types=["linear_attention", "full_attention"],
        )
    ),
    "recurrent_gemma": lambda: hf.RecurrentGemmaForCausalLM(
        hf.RecurrentGemmaConfig(
            **SIZES,
            num_hidden_layers=2,
            lru_width=32,
            attention_window_size=16,
            block_types=["recurrent", "attention"],
        )
    ),
    "jamba": lambda: hf.JambaForCausalLM(
        hf.JambaConfig(
            **SIZES,
            num_hidden_layers=2,
            mamba_d_state=8,
            num_experts=2,
            num_experts_per_tok=1,
            attn_layer_period=2,
            attn_layer_offset=1,
            use_mamba_kernels=False,
        )
    ),
}
IDS = torch.tensor([[5, 6, 7, 8, 9], [3, 4, 5, 6, 7]])


def made(name):
    torch.manual_seed(0)
    return MODELS[name]().eval().bfloat16()


QUICK = (("mamba2", "heal"), ("jamba", "exact"))
CASES = [
    pytest.param(name, precision, marks=() if (name, precision) in QUICK else (pytest.mark.deep,))
    for name in MODELS
    for precision in ("heal", "layercast", "exact")
]


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_the_passes_take_models_with_a_recurrence(name, precision):
    """With symbolic sizes, by plain torch; the deep test below compiles."""
    model = made(name)
    wide = copy.deepcopy(model).float()
    config = HealConfig(precision=precision, outputs="fp32")
    found = []

    def call(ids):
        found.append(model(ids, use_cache=False).logits)

    with torch.no_grad(), torch._dynamo.config.patch(assume_static_by_default=False):
        expected, plain = wide(IDS).logits, model(IDS).logits
        explain(call, config)(IDS)
    error, rounded = (float((x.float() - expected).norm()) for x in (*found, plain))
    print(f"error {error:.1e}, in BF16 {rounded:.1e}")
    assert error <= rounded / 4


@pytest.mark.deep
@pytest.mark.parametrize("name", MODELS)
def test_models_with_a_recurrence_generate(name):
    model = made(name)
    wide = copy.deepcopy(model).float()
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        expected = wide.generate(IDS, **options)
        plain = model.generate(IDS, **options)
        result = heal_model(model).generate(IDS, **options)
    errors = [float((x.logits[0].float() - expected.logits[0]).norm()) for x in (result, plain)]
    print(f"error {errors[0]:.1e}, in BF16 {errors[1]:.1e}")
    assert errors[0] <= errors[1] / 4
