"""Indexing, padding, joining, sorting; views, aliases, and writes into what the caller owns."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.programs.record import program

MOVES = "moves data"
TIES = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0, 0.0]])


@program(lambda r: (r(2, 6, 8), r.weight(8, 8)))
def pads_by_a_symbol(x, w):
    return F.pad(x @ w, (0, 0, 0, -x.shape[1] % 4)).exp()


@program(lambda r: (r(2, 3, 5, 5),))
def pad_modes(x):
    return F.pad(x, (1, 1, 1, 1), "reflect") * F.pad(x, (1, 1, 1, 1), "replicate") - F.pad(
        x, (1, 1, 1, 1), "circular"
    )


@program(lambda r: (r(2, 6, 8), r.weight(8, 8)))
def masked_scatter_broadcasts(x, w):
    return (x @ w).masked_scatter((torch.arange(x.shape[1]) < 3)[None, :, None], x).sin()


@program(lambda r: (r(2, 6, 8), r(5, 8), r.mask(2, 6)))
def image_tokens(x, image, where):
    slots = torch.zeros_like(where)
    slots[0, 1:6] = True
    return x.masked_scatter(slots[..., None].expand_as(x), image.tanh() * 0.3) * where[..., None]


@program(lambda r: (r(6, 4), r.ids(6, 5)))
def index_select_and_gather(x, ids):
    return x.index_select(0, ids).exp() + x.gather(0, ids[:, None].expand(5, 4))


@program(lambda r: (r(6, 4), r(3, 4), torch.tensor([4, 0, 2])))
def index_put_accumulates(x, v, ids):
    return x.index_put((ids,), v * 0.1, accumulate=True).tanh()


@program(lambda r: (r(6, 4), r(5, 4), torch.tensor([0, 1, 0, 5, 1])))
def scatter_add_repeats(x, v, ids):
    return torch.zeros_like(x).index_add(0, ids, v.exp()) + x


@program(lambda r: (r(6, 4), r(6, 4), torch.tensor([[0, 1, 0, 2]] * 6)))
def scatter_reduce(x, v, ids):
    return x.scatter_reduce(1, ids, v * 1.3, "sum") + x.scatter_reduce(1, ids, v, "amax")


@program(lambda r: (r(3, 4), r(1, 4), r.weight(4, 4)))
def cat_with_new(x, new, w):
    return torch.cat([x, new @ w]).exp()


@program(lambda r: (r(2, 3, 4), r(2, 1, 4), r.weight(4, 4)), grads=False, exact="a 16-bit cache")
def extends_a_cache(cache, x, w):
    return torch.cat([cache, x @ w], 1)


@program(lambda r: (r(2, 6, 4), r(2, 1, 4), r.weight(4, 4)), mutates=True, coarse="16-bit cache")
def writes_a_static_cache(cache, x, w):
    cache[:, 3:4] = x @ w
    return torch.softmax(x @ cache.transpose(1, 2), -1) @ cache


@program(lambda r: (r(2, 6, 4), r(2, 1, 4)), mutates=True, coarse="16-bit cache")
def index_copies_into_a_cache(cache, x):
    cache.index_copy_(1, torch.tensor([2]), x * 1.1)
    return cache.mean(1)


@program(lambda r: (r(4, 8), r.weight(8, 8)), mutates=True)
def adds_in_place(x, w):
    h = x @ w
    h += x
    h.mul_(1.1).clamp_(-2, 2)
    h[:, 0] = 0.3
    return F.relu_(h) * h.mean()


@program(lambda r: (r(4, 8),), mutates=True, coarse="the caller's 16-bit tensor")
def mutates_its_input(x):
    x.mul_(1.3).add_(0.1)
    return x.sum(-1)


@program(lambda r: (r(4, 8), r(4, 8)), mutates=True, coarse="the caller's 16-bit tensor")
def mutates_through_a_view(x, y):
    x.view(-1)[3:9] += y.reshape(-1)[:6] * 0.3
    return x * 2


@program(lambda r: (r(4, 8),), exact=MOVES, grads=False)  # the caller adds up its gradients
def returns_its_input(x):
    return x, x * 1.5, x


@program(lambda r: (r(4, 8),), exact=MOVES, coarse="the engine adds up gradients of views")
def returns_views(x):
    return x.t(), x[1:], x.view(2, 16), x.unsqueeze(0)


@program(lambda r: (r(4, 8), r.weight(8, 8)))
def returns_aliases_of_one_result(x, w):
    h = F.gelu(x @ w)
    return h, h.view(2, 16), h[0]


@program(lambda r: (r(4, 8),), exact=MOVES)
def returns_one_tensor_twice(x):
    y = x * 2
    return y, y, y.detach()


@program(
    lambda r: (r(4, 8),),
    reference=lambda x: (x.abs(), (x < 0).sum()),
    exact=MOVES,
    grads=False,
    dtypes=(torch.bfloat16, torch.float16),
)
def views_of_bits(x):
    bits = x.view(torch.int16)
    return (bits & 0x7FFF).view(x.dtype), (bits < 0).sum()


@program(lambda r: (r(4, 8), r.weight(8, 8)))
def chunks(x, w):
    a, b = (x @ w).chunk(2, -1)
    c, d = torch.split(x, [3, 5], -1)
    return a * b.sigmoid(), c.sum() - d.exp().sum()


@program(lambda r: (r(3, 4, 5),))
def list_of_unbind(x):
    return torch.stack([row.softmax(-1) * i for i, row in enumerate(x.unbind(1))], 1)


@program(lambda r: (r(3, 4),))
def generator_of_rows(x):
    return sum(row.exp() * (i + 1) for i, row in enumerate(x))


@program(lambda r: (r(2, 3, 4, 5),))
def permutes(x):
    return x.permute(0, 2, 1, 3).reshape(2, 4, 15).transpose(1, 2).contiguous().view(2, -1).exp()


@program(lambda r: (r(4, 6),))
def as_strided_windows(x):
    return x.unfold(1, 3, 1).mean(-1) + torch.as_strided(x, (4, 4), (6, 1)).exp()


@program(lambda r: (r(4, 6),))
def rolls_and_flips(x):
    return (x.roll(1, -1) + x.flip(0)).exp() + torch.rot90(x[:, :4])[..., :1]


@program(lambda r: (r(4, 4),))
def triangles(x):
    return x.tril().exp() + torch.triu(x, 1) + torch.diag(x.diagonal() * 0.7)


@program(lambda r: (r(2, 3, 4),))
def repeats(x):
    return x.repeat_interleave(2, 1).exp() + x.repeat(1, 2, 1) + x[:, :1].expand(2, 6, 4)


@program(lambda r: (r(5, 7),), exact=MOVES)
def sorts(x):
    values, order = x.sort(-1, descending=True)
    return values, order, x.argsort(0)


@program(lambda r: (TIES.to(r.dtype),), grads=False, exact=MOVES)
def ties(x):
    stable = torch.sort(x, stable=True, descending=True)
    return x.argmax(-1), x.max(-1), stable.values, stable.indices, x.argmin(-1), x.amax(-1)


@program(lambda r: (r(5, 9), r.weight(9, 9)))
def topk_mask(x, w):
    logits = x @ w
    kth = logits.topk(3, -1).values[..., -1:]
    return logits.masked_fill(logits < kth, float("-inf")).softmax(-1)


@program(lambda r: (r(5, 9), r.weight(9, 9)), grads=False)
def top_p_filter(x, w):
    probs = (x @ w).softmax(-1)
    sorted_probs, order = probs.sort(-1, descending=True)
    keep = sorted_probs.cumsum(-1) - sorted_probs < 0.8
    return torch.zeros_like(probs).scatter(-1, order, sorted_probs * keep)


@program(lambda r: (r(5, 9),), grads=False, exact=MOVES)
def median_and_kthvalue(x):
    return x.median(-1).values, x.kthvalue(3, -1).values, x.aminmax(dim=0).max


@program(lambda r: (r(5, 9),), grads=False, exact=MOVES)
def nonzero_and_masked_select(x):
    return x.nonzero(), x[x > 0], torch.masked_select(x, x < -1)


@program(lambda r: (r(6, 4),))
def boolean_index(x):
    return x[torch.tensor([True, False, True, True, False, True])].exp().sum(0)


@program(lambda r: (r(6, 4), r.ids(4, 6)))
def picks_with_arange(x, ids):
    return x[torch.arange(6), ids].exp(), x[..., None, :2].shape[0]


@program(lambda r: (r.ids(9, 12),), grads=False, exact="integers")
def counts(ids):
    return torch.bincount(ids, minlength=9), ids.unique().numel(), F.one_hot(ids, 9).sum(0)


@program(lambda r: (r.positive(8), r(5)))
def searchsorted(edges, x):
    edges = edges.cumsum(0)
    return torch.searchsorted(edges.detach(), x), torch.bucketize(x, edges.detach()), edges * 1.1


@program(lambda r: (r(4, 4), r(4)))
def functional_scatters(x, v):
    return x.select_scatter(v * 0.3, 0, 1).slice_scatter(
        x[:, :2].exp(), 1, 2
    ) + x.diagonal_scatter(v)


@program(lambda r: (r(3, 4), r(4)))
def where_and_fill(x, v):
    return (
        torch.where(x > 0, v, torch.tensor(0.5, dtype=x.dtype)).masked_fill(x < -1, 2.0).exp()
        * v.tanh()
    )


@program(lambda r: (r(3, 4), r(3, 4)))
def stacks(a, b):
    return (
        torch.stack([a, b * 1.1], -1).flatten(1)
        + torch.hstack([a, b])
        - torch.dstack([a, b]).reshape(3, 8)
    )


@program(lambda r: (r(3, 4), r(4, 1)))
def broadcasts(a, b):
    x, y = torch.broadcast_tensors(a[:, None], b)
    return x * y + torch.meshgrid(a[0], b[:, 0], indexing="ij")[0].exp()


@program(lambda r: (r(2, 8, 2, 2),))
def pixel_shuffle(x):
    return F.pixel_unshuffle(F.pixel_shuffle(x, 2).exp(), 2) + F.channel_shuffle(x, 2)


@program(lambda r: (r(3, 4), r.weight(4, 4)), mutates=True)
def out_argument(x, w):
    h = torch.empty_like(x)
    torch.mm(x, w, out=h)
    return h.exp()


@program(lambda r: (r(2, 5, 4),))
def detaches(x):
    return x * x.detach() + (x.softmax(-1) - x).detach()


@program(lambda r: (r(4, 6),), grads=False)
def reshapes_by_a_symbol(x):
    n = x.shape[0] * x.shape[1] // 2
    return x.reshape(n, -1).exp() + torch.arange(n, dtype=x.dtype)[:, None] / n
