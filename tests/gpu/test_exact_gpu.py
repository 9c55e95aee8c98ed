"""`precision="exact"` on a GPU: the CPU's bits, for every tile, row count and a whole model."""

from __future__ import annotations

import hashlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from healpass import HealConfig
from healpass.lowering.cuda import exact_matmul, selfcheck_exact
from healpass.lowering.cuda.exact_tiles import ExactTile
from tests.support.fake_cuda import always
from tests.support.rewriting import Rewritten

OPTIONS = {"precision": "exact", "outputs": "fp32"}
HIDDEN, HEADS, KEY_HEADS, SIZE, INNER, LAYERS, VOCABULARY = 576, 9, 3, 64, 1536, 30, 49152


def on_gpu(check: selfcheck_exact.Check) -> Tensor:
    return selfcheck_exact.on_gpu(torch.cuda.current_device())(check).cpu()


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_every_template_gives_the_bits_of_its_reference():
    assert selfcheck_exact.examine(on_gpu) == {}


@pytest.mark.parametrize("rows", [1, 7, 16, 33, 64, 129, 1000])
def test_a_row_has_the_same_bits_for_every_number_of_rows(rows):
    check = selfcheck_exact.ExactProduct(("exact_gemm",), torch.bfloat16, 1000, 576, 1536)
    a, b = check.operands()
    whole = check(a, b)
    part = torch.compile(check, backend="heal", dynamic=False, options=OPTIONS)
    torch._dynamo.reset()
    assert same_bits(part(a[:rows].cuda(), b.cuda()).cpu(), whole[:rows])


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("tile", [(64, 64, 64, 8, 3), (128, 32, 64, 8, 3), (128, 64, 128, 8, 2)])
def test_tiles_and_the_number_format_of_the_tensor_core_leave_bits_alone(tile, half, monkeypatch):
    check = selfcheck_exact.ExactProduct(("exact_gemm",), torch.bfloat16, 300, 304, 1536)
    monkeypatch.setattr(exact_matmul, "exact_tiles", always([ExactTile(*tile)]))
    monkeypatch.setattr(exact_matmul, "prefers_half", always(half))
    torch._inductor.utils.clear_inductor_caches()
    with torch._inductor.config.patch({"fx_graph_cache": False}):
        assert same_bits(on_gpu(check), check(*check.operands()))


# -------------------------------------------------------------------------------- whole model


class Block(nn.Module):
    """A layer of SmolLM2: norms, RoPE, grouped attention, gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        wide = (HEADS + 2 * KEY_HEADS) * SIZE
        self.qkv = nn.Linear(HIDDEN, wide, bias=False)
        self.out = nn.Linear(HEADS * SIZE, HIDDEN, bias=False)
        self.gate_up = nn.Linear(HIDDEN, 2 * INNER, bias=False)
        self.down = nn.Linear(INNER, HIDDEN, bias=False)
        self.first, self.second = nn.RMSNorm(HIDDEN, eps=1e-5), nn.RMSNorm(HIDDEN, eps=1e-5)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(self.first(x)).reshape(batch, length, -1, SIZE).transpose(1, 2)
        q, k, v = qkv.split([HEADS, KEY_HEADS, KEY_HEADS], 1)
        q, k = ((y * cos) + (turned(y) * sin) for y in (q, k))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, -1))
        gate, up = self.gate_up(self.second(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


class Decoder(nn.Module):
    """A random model of SmolLM2-135M's size."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN, eps=1e-5)

    def forward(self, ids: Tensor) -> Tensor:
        position = torch.arange(ids.shape[1], device=ids.device).to(torch.float32)
        even = torch.arange(0, SIZE, 2, device=ids.device).to(torch.float32) / SIZE
        angles = position[:, None] * torch.exp(even * -11.5)[None]
        cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, cos.to(x.dtype), sin.to(x.dtype))
        return self.norm(x[:, -8:]) @ self.embedding.weight.t()


def digest(logits: Tensor) -> str:
    return hashlib.sha256(
        logits.cpu().contiguous().view(torch.int32).numpy().tobytes()
    ).hexdigest()


@torch.no_grad()
def test_the_digest_of_a_model_of_smollm2s_size_is_the_cpus():
    torch.manual_seed(0)
    model = Decoder().bfloat16().eval()
    ids = torch.randint(0, VOCABULARY, (2, 48))
    wanted = digest(Rewritten(model, HealConfig(**OPTIONS))(ids))
    torch._dynamo.reset()
    compiled = torch.compile(model.cuda(), backend="heal", options=OPTIONS)
    found = digest(compiled(ids.cuda()))
    print(f"digest on CPU {wanted[:16]}, on {torch.cuda.get_device_name()} {found[:16]}")
    assert found == wanted


# ------------------------------------------------------------------------------------ training


def gradients(device: str, kv: str) -> list[Tensor]:
    """Of a table that is read by index, through grouped attention, compiled for a device."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(50, 3 * SIZE, generator=generator).to(device).requires_grad_()
    weight = torch.randn(SIZE, 3 * SIZE, generator=generator).to(device).requires_grad_()
    ids = torch.randint(0, 50, (2, 70), generator=generator).to(device)

    def loss(table: Tensor, weight: Tensor) -> Tensor:
        x = table[ids]
        q = x.unflatten(-1, (3, SIZE)).transpose(1, 2)
        k = F.linear(x, weight)[:, None]
        seen = F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
        return seen.square().mean()

    torch._dynamo.reset()
    call = torch.compile(loss, backend="heal", dynamic=False, options=OPTIONS | {"kv": kv})
    found = torch.autograd.grad(call(table, weight), (table, weight))
    return [gradient.cpu() for gradient in found]


@pytest.mark.parametrize("kv", ["int16", "int24"])
def test_the_gradients_of_a_training_step_are_the_cpus(kv):
    for found, wanted in zip(gradients("cuda", kv), gradients("cpu", kv), strict=True):
        assert same_bits(found, wanted)
