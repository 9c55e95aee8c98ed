"""Attention with masks of all kinds, positions, caches, FlexAttention, routing."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.programs.record import program

sdpa = F.scaled_dot_product_attention


def qkv(r, b=2, h=2, q=5, k=5, d=8, kv=None):
    return r(b, h, q, d), r(b, kv or h, k, d), r(b, kv or h, k, d)


@program(qkv)
def plain(q, k, v):
    return sdpa(q, k, v) * 1.1


@program(qkv)
def causal(q, k, v):
    return sdpa(q, k, v, is_causal=True) * 1.1


@program(lambda r: qkv(r, q=3, k=7))
def causal_bottom_right(q, k, v):
    rows, columns = q.shape[-2], k.shape[-2]
    mask = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
    return sdpa(q, k, v, attn_mask=mask) * 1.1


@program(lambda r: (*qkv(r), r.mask(2, 1, 1, 5)))
def padding_mask(q, k, v, mask):
    return sdpa(q, k, v, attn_mask=mask) * 1.1


@program(lambda r: (*qkv(r), r(1, 2, 5, 5)))
def float_mask(q, k, v, bias):
    return sdpa(q, k, v, attn_mask=bias, scale=0.3) * 1.1


@program(lambda r: (*qkv(r), r.mask(2, 5)))
def minimum_mask(q, k, v, keep):
    low = torch.finfo(q.dtype).min
    causal_mask = torch.full((5, 5), low, dtype=q.dtype).triu(1)
    mask = causal_mask[None, None].masked_fill(~keep[:, None, None], low)
    return sdpa(q, k, v, attn_mask=mask) * 1.1


@program(lambda r: (*qkv(r), r.ids(2, 2, 5)))
def document_mask(q, k, v, documents):
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return sdpa(q, k, v, attn_mask=same & torch.ones(5, 5, dtype=torch.bool).tril()) * 1.1


@program(lambda r: qkv(r, q=8, k=8))
def sliding_window(q, k, v):
    i = torch.arange(q.shape[-2])
    distance = i[:, None] - i[None]
    return sdpa(q, k, v, attn_mask=(distance >= 0) & (distance < 3)) * 1.1


@program(lambda r: (*qkv(r), r.weight(16, 2)))
def relative_bias(q, k, v, table):
    i = torch.arange(q.shape[-2])
    bias = table[(i[:, None] - i[None]).clamp(-8, 7) + 8].permute(2, 0, 1)[None]
    return sdpa(q, k, v, attn_mask=bias) * 1.1


@program(qkv)
def alibi(q, k, v):
    i = torch.arange(q.shape[-2], dtype=q.dtype)
    slopes = torch.tensor([0.5, 0.25], dtype=q.dtype)[:, None, None]
    return sdpa(q, k, v, attn_mask=(-(i[:, None] - i).abs() * slopes)[None]) * 1.1


@program(lambda r: qkv(r, h=4, kv=2))
def grouped_queries(q, k, v):
    return sdpa(q, k, v, is_causal=True, enable_gqa=True) * 1.1


@program(lambda r: qkv(r, h=4, kv=1))
def multi_query_by_expand(q, k, v):
    return sdpa(q, k.expand(-1, 4, -1, -1), v.expand(-1, 4, -1, -1)) * 1.1


@program(lambda r: qkv(r, q=1, k=6))
def decode_step(q, k, v):
    return sdpa(q, k, v) * 1.1


@program(lambda r: (r(2, 5, 8), r(2, 5, 8), r(2, 5, 6)))
def three_dimensions(q, k, v):
    return sdpa(q, k, v) * 1.1


@program(lambda r: (*qkv(r), r.mask(5, 5)))
def rows_that_see_nothing(q, k, v, mask):
    mask = mask.clone()
    mask[2] = False
    return torch.nan_to_num(sdpa(q, k, v, attn_mask=mask)) * 1.1


@program(lambda r: (*qkv(r), r.mask(5, 5)))
def by_hand(q, k, v, mask):
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
    scores = scores.masked_fill(~mask, -1e4)
    return torch.matmul(scores.softmax(-1, dtype=torch.float32).to(q.dtype), v)


@program(qkv)
def soft_capped(q, k, v):
    scores = 2 * torch.tanh(torch.einsum("bhqd,bhkd->bhqk", q, k) / 2)
    return scores.softmax(-1) @ v


@program(qkv)
def sinks(q, k, v):
    scores = q @ k.mT * q.shape[-1] ** -0.5
    sink = torch.full_like(scores[..., :1], 0.3)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v


@program(qkv)
def linear_attention(q, k, v):
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return (q @ (k.mT @ v)) / (q @ k.sum(-2, keepdim=True).mT)


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


@program(qkv)
def rotary(q, k, v):
    t = torch.arange(q.shape[-2], dtype=torch.float32)[:, None]
    angle = t * 10000 ** (-torch.arange(0, 4, dtype=torch.float32) / 4)
    cos, sin = (f(torch.cat([angle, angle], -1)).to(q.dtype) for f in (torch.cos, torch.sin))
    return sdpa(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True) * 1.1


@program(lambda r: (r.wide(2, 5, 8),), exact="its arithmetic is FP32 as it stands")
def complex_rotary(x):
    angles = torch.outer(torch.arange(5).float(), torch.tensor([1.0, 0.1, 0.01, 0.001]))
    z = torch.view_as_complex(x.reshape(2, 5, 4, 2))
    return torch.view_as_real(z * torch.polar(torch.ones_like(angles), angles)).flatten(2)


@program(lambda r: (r(2, 5, 8), r.weight(24, 8), r.weight(8, 8)))
def self_attention_block(x, w, o):
    q, k, v = F.linear(x, w).view(2, -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
    y = sdpa(q, k, v, is_causal=True)
    return x + F.linear(y.transpose(1, 2).reshape(x.shape), o)


@program(lambda r: (r(2, 5, 8), r.module(torch.nn.MultiheadAttention, 8, 2, batch_first=True)))
def multihead_module(x, attention):
    return attention(x, x, x, need_weights=False)[0] * 1.1


@program(lambda r: (r(2, 5, 8), r(2, 3, 8), r.module(torch.nn.MultiheadAttention, 8, 2)))
def multihead_module_with_weights(x, y, attention):
    return attention(x.transpose(0, 1), y.transpose(0, 1), y.transpose(0, 1))


def dropped_like(results, q, k, v):
    kept = (results[0] != 0).to(results[1].dtype)
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return kept * 2, (weights * kept * 2) @ v


@program(qkv, replay=dropped_like)
def dropout_by_hand(q, k, v):
    kept = F.dropout(torch.ones_like(q[..., :1] * k[..., 0][..., None, :]), 0.5)
    return kept, ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) * kept) @ v


def dropped_in_sdpa(result, q, k, v):
    return sdpa(q, k, v) * 2 * (result != 0)


@program(
    lambda r: (*qkv(r)[:2], torch.eye(5, dtype=r.dtype).expand(2, 2, 5, 5)),
    replay=dropped_in_sdpa,
    grads=False,
)
def dropout_in_sdpa(q, k, v):
    return sdpa(q, k, v, dropout_p=0.5)


def window(b, h, q, k):
    return (q >= k) & (q - k < 4)


def biased(score, b, h, q, k):
    return score + (q - k) * 0.1


@program(
    lambda r: qkv(r, q=16, k=16, d=16),
    reference=lambda q, k, v: (
        sdpa(q, k, v, attn_mask=(torch.arange(16)[:, None] - torch.arange(16)) * 0.1) * 1.1
    ),
    grads=False,
    coarse="FlexAttention with a score function of its own is kept",
)
def flex_score_mod(q, k, v):
    return flex_attention(q, k, v, score_mod=biased) * 1.1


def flex_reference(q, k, v):
    distance = torch.arange(16)[:, None] - torch.arange(16)
    return sdpa(q, k, v, attn_mask=(distance >= 0) & (distance < 4)) * 1.1


@program(lambda r: qkv(r, q=16, k=16, d=16), reference=flex_reference, grads=False)
def flex_block_mask(q, k, v):
    mask = create_block_mask(window, None, None, 16, 16, device="cpu")
    return flex_attention(q, k, v, block_mask=mask) * 1.1


@program(lambda r: (r(6, 8), r.weight(4, 8), r.weight(4, 8, 8)))
def routed_experts(x, router, experts):
    weights, chosen = F.linear(x, router).softmax(-1).topk(2, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for i in range(4):
        out += (F.silu(x @ experts[i]) * (weights * (chosen == i)).sum(-1, keepdim=True)).to(
            x.dtype
        )
    return out


@program(lambda r: (r(6, 8), r.weight(4, 8), r.weight(4, 8, 8)))
def gathered_experts(x, router, experts):
    weight, chosen = F.linear(x, router).sigmoid().topk(2, -1)
    h = torch.bmm(
        x[:, None].repeat_interleave(2, 1).flatten(0, 1)[:, None], experts[chosen.flatten()]
    )
    return (h.view(6, 2, 8) * weight[..., None]).sum(1)


@program(lambda r: (r(6, 8), r.weight(4, 8), r.weight(4, 8, 8)), grads=False)
def sorted_experts(x, router, experts):
    chosen = F.linear(x, router).argmax(-1)
    order = chosen.argsort(stable=True)
    out = torch.zeros_like(x)
    return (
        out.index_add(0, order, torch.einsum("td,tde->te", x[order], experts[chosen[order]])) * 1.1
    )
