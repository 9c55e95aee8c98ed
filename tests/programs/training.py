"""Losses, gradients inside a graph, transforms, custom functions, optimizers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.func import grad, jacrev, vmap
from torch.utils.checkpoint import checkpoint

from tests.programs.layers import Mlp
from tests.programs.record import program

TRANSFORM = "inside a transform of torch.func graphs run at the dtypes they were traced with"


@program(lambda r: (r(6, 9), r.ids(9, 6)))
def cross_entropy(x, labels):
    return F.cross_entropy(x, labels)


@program(lambda r: (r(6, 4), r.weight(9, 4), torch.tensor([1, -100, 3, 8, -100, 0])))
def cross_entropy_ignoring(x, w, labels):
    logits = F.linear(x, w)
    return F.cross_entropy(logits.float(), labels, ignore_index=-100, label_smoothing=0.1), logits


@program(lambda r: (r(2, 5, 4), r.weight(9, 4), r.ids(9, 2, 5)))
def shifted_labels(h, w, labels):
    logits = F.linear(h, w)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), shifted.flatten(), reduction="sum") / 8


@program(lambda r: (r(6, 9), r(6, 9).softmax(-1), r.positive(9)))
def soft_cross_entropy(x, target, weight):
    return F.cross_entropy(x, target, weight=weight, reduction="none")


@program(lambda r: (r(6, 9), r.ids(9, 6)))
def nll(x, labels):
    return F.nll_loss(F.log_softmax(x, -1), labels)


@program(lambda r: (r(6, 9), r(6, 9)))
def kl_div(x, y):
    return F.kl_div(x.log_softmax(-1), y.log_softmax(-1), reduction="batchmean", log_target=True)


@program(lambda r: (r.wide(6, 2, 5), r.ids(4, 2, 3) + 1), dtypes=(torch.float32,), exact="FP32")
def ctc(x, labels):
    lengths = torch.full((2,), 6), torch.tensor([3, 2])
    return F.ctc_loss(x.log_softmax(-1), labels, *lengths)


@program(lambda r: (r(6, 4), r.mask(6, 4)))
def binary_losses(x, target):
    y = target.to(x.dtype) * 0.75 + 0.125
    return F.binary_cross_entropy_with_logits(x, y) + F.binary_cross_entropy(x.sigmoid(), y)


@program(lambda r: (r(6, 4), r(6, 4)))
def distances(x, y):
    return F.mse_loss(x, y) + F.l1_loss(x, y) + F.smooth_l1_loss(x, y) + F.huber_loss(x, y)


@program(lambda r: (r(4, 6), r(4, 6)))
def contrastive(a, b):
    scores = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).t() / 0.2
    labels = torch.arange(4)
    return (F.cross_entropy(scores, labels) + F.cross_entropy(scores.t(), labels)) / 2


@program(lambda r: (r(4, 6), r(4, 6), r(4, 6)))
def margins(a, p, n):
    return F.triplet_margin_loss(a, p, n) + F.margin_ranking_loss(a, p, n.sign())


@program(lambda r: (r(2, 5, 4), r.weight(9, 4), r.ids(9, 2, 5), r(2, 5)))
def preference_loss(h, w, labels, base):
    logp = F.linear(h, w).log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
    return -F.logsigmoid(0.1 * ((logp - base).sum(-1)).diff())


@program(lambda r: (r(2, 5, 4), r.weight(9, 4)))
def entropy(h, w):
    logits = F.linear(h, w)
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, beta):
        ctx.save_for_backward(x)
        ctx.beta = beta
        return x * torch.sigmoid(beta * x)

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(ctx.beta * x)
        return grad_output * (s + ctx.beta * x * s * (1 - s)), None


@program(lambda r: (r(3, 4), r.weight(4, 4)), coarse="a custom autograd function keeps dtypes")
def custom_function(x, w):
    return Swish.apply(x @ w, 1.5) * 1.1


class RoundThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(x * 4) / 4

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output


@program(lambda r: (r(3, 4), r.weight(4, 4)), coarse="a custom autograd function keeps dtypes")
def straight_through(x, w):
    return F.linear(x, RoundThrough.apply(w)) * 1.1


def block(x, w):
    return x + F.silu(x @ w) @ w.t()


@program(lambda r: (r(3, 4), r.weight(4, 4)))
def checkpointed(x, w):
    return checkpoint(block, x, w, use_reentrant=False)


@program(lambda r: (r(3, 4), r.weight(4, 4)))
def checkpointed_twice(x, w):
    for _ in range(2):
        x = checkpoint(block, x, w, use_reentrant=False)
    return x


@program(lambda r: (r(4, 4), r(4)), coarse=TRANSFORM)
def func_grad(w, x):
    return grad(lambda x: (w @ x).tanh().square().sum())(x)


@program(lambda r: (r(4, 4), r(5, 4)), coarse=TRANSFORM)
def func_vmap(w, xs):
    return vmap(lambda x: (w @ x).softmax(-1))(xs)


@program(lambda r: (r(4, 4), r(4)), coarse=TRANSFORM)
def func_jacrev(w, x):
    return jacrev(lambda x: (w @ x).tanh())(x)


@program(lambda r: (r(4, 4), r(5, 4), r(5, 4)), grads=False, coarse=TRANSFORM)
def per_sample_gradients(w, xs, ys):
    return vmap(grad(lambda w, x, y: F.mse_loss(w @ x, y)), (None, 0, 0))(w, xs, ys)


@program(lambda r: (r(4, 4), r(5, 4)), coarse=TRANSFORM)
def vmap_of_a_layer(w, xs):
    return vmap(lambda x: F.layer_norm(F.linear(x, w), (4,)))(xs)


@program(lambda r: (r(4, 4), r(3, 4)), grads=False, coarse="a graph break at autograd.grad")
def gradient_inside(w, x):
    w = w.detach().requires_grad_()
    with torch.enable_grad():
        (g,) = torch.autograd.grad((x @ w).tanh().sum(), w)
    return g * 1.1


@program(lambda r: (r(3, 8), r.module(Mlp)), coarse=TRANSFORM)
def gradient_penalty(x, module):
    x = x.detach()
    return grad(lambda x: module(x).square().sum())(x).square().sum()


@program(lambda r: (r(4, 4), r(4, 4), r(4, 4)), grads=False, mutates=True, coarse="16-bit weights")
def sgd_by_hand(w, g, momentum):
    momentum.mul_(0.9).add_(g)
    w.add_(momentum, alpha=-0.1)
    return w.norm()


@program(
    lambda r: (r(4, 4), r(4, 4), r(4, 4) * 0, r.positive(4, 4)),
    grads=False,
    mutates=True,
    coarse="16-bit weights",
)
def adam_by_hand(w, g, m, v):
    m.lerp_(g, 0.1)
    v.mul_(0.99).addcmul_(g, g, value=0.01)
    w.addcdiv_(m, v.sqrt() + 1e-3, value=-0.1)
    return w * 1.1


@program(
    lambda r: ([r(4, 4), r(3)], [r(4, 4), r(3)]),
    grads=False,
    mutates=True,
    coarse="16-bit weights",
)
def foreach_update(weights, gradients):
    torch._foreach_mul_(weights, 0.99)
    torch._foreach_add_(weights, gradients, alpha=-0.1)
    return [w * 1.1 for w in weights]


@program(lambda r: ([r(4, 4), r(3)],), grads=False)
def clip_by_norm(gradients):
    total = torch.linalg.vector_norm(torch.stack([g.float().norm() for g in gradients]))
    return [g * (0.5 / (total + 1e-6)).clamp(max=1.0) * 1.1 for g in gradients]


@program(lambda r: (r(3, 4), r.weight(4, 4)))
def grad_switched_inside(x, w):
    with torch.no_grad():
        scale = (x @ w).abs().mean()
    with torch.set_grad_enabled(True):
        y = x @ w
    return y / scale


@program(lambda r: (r(3, 4), r.weight(4, 4)))
def gradient_hook(x, w):
    h = x @ w
    if h.requires_grad:
        h.register_hook(lambda g: g * 0.5)
    return h.tanh()


@program(lambda r: (r(3, 4), r.weight(4, 4), r.weight(4, 4)))
def distillation(x, student, teacher):
    with torch.no_grad():
        target = (x @ teacher).softmax(-1)
    return F.kl_div((x @ student).log_softmax(-1), target, reduction="sum")
