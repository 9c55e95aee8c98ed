"""Products, pointwise arithmetic, reductions, integers and complex numbers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from tests.programs.record import program

ONE_ROUNDING = "one product, rounded once"
FUSED = "integers and choices only"
SINGLE = "its arithmetic is FP32 as it stands"


@program(lambda r: (r(4, 8), r.weight(8, 8)), exact=ONE_ROUNDING)
def product(x, w):
    return x @ w


@program(lambda r: (r(4, 8), r.weight(8, 8), r.weight(8)))
def residual(x, w, b):
    return x + F.silu(F.linear(x, w, b))


@program(lambda r: (r(2, 3, 8), r.weight(12, 8), r.weight(12, 8), r.weight(8, 12)))
def gated_mlp(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


@program(lambda r: (r(3, 1), r.weight(1, 5)), exact=ONE_ROUNDING)
def product_of_one_term(x, w):
    return x @ w


@program(lambda r: (r(3, 0), r(0, 5)), exact="zeros")
def product_of_no_terms(x, w):
    return x @ w + 1


@program(lambda r: (r(0, 8), r.weight(8, 4)), exact="nothing")
def no_rows(x, w):
    return F.softmax(x @ w, -1)


@program(lambda r: (r(8), r(8)))
def dot_and_outer(a, b):
    return torch.dot(a, b) * torch.outer(a, b)


@program(lambda r: (r(6, 8), r(8)))
def matrix_vector(a, b):
    return torch.mv(a, b).tanh()


@program(lambda r: (r(2, 3, 8), r(2, 8, 4), r(2, 3, 4)))
def baddbmm(a, b, c):
    return torch.baddbmm(c, a, b, beta=0.5, alpha=2.0).exp()


@program(lambda r: (r(3, 8), r.weight(8, 5), r(5)))
def addmm_scaled(a, w, c):
    return torch.addmm(c, a, w, beta=-1, alpha=0.25) * 3


@program(lambda r: (r(2, 5, 8), r(2, 7, 8)))
def einsum_scores(q, k):
    return torch.einsum("bqd,bkd->bqk", q, k).softmax(-1)


@program(lambda r: (r(2, 3, 4), r.weight(4, 2, 5)))
def einsum_heads(x, w):
    return torch.einsum("btd,dhe->bhte", x, w).sigmoid()


@program(lambda r: (r(3, 4), r(4, 3)))
def einsum_trace(a, b):
    return torch.einsum("ij,ji->", a, b).exp()


@program(lambda r: (r(2, 3, 4), r(4, 3, 5)))
def tensordot(a, b):
    return torch.tensordot(a, b, dims=([1, 2], [1, 0])).cos()


@program(lambda r: (r(3, 4), r.weight(4, 6), r.weight(6, 2)))
def multi_dot(a, b, c):
    return torch.linalg.multi_dot([a, b, c])


@program(lambda r: (r(5, 4), r(5, 4), r.weight(3, 4, 4), r.weight(3)))
def bilinear(a, b, w, bias):
    return F.bilinear(a, b, w, bias)


@program(lambda r: (r(5, 5), r.weight(5, 5)))
def trace(x, w):
    return (x @ w).trace() * x


@program(lambda r: (r(4, 8).t(), r.weight(4, 6)))
def transposed_input(x, w):
    return F.gelu(x @ w)


@program(lambda r: (r(1, 8).expand(5, 8), r.weight(8, 6)), grads=False)
def expanded_input(x, w):
    return F.gelu(x @ w, approximate="tanh")


@program(lambda r: (r(6, 16)[::2, ::2], r.weight(8, 6)), grads=False)
def strided_input(x, w):
    return F.mish(x @ w)


@program(lambda r: (r(), r(4)))
def scalar_tensor(s, x):
    return (s * x).exp() + s


@program(lambda r: (r(4, 8), 0.3))
def python_number(x, alpha):
    return (x * alpha + 1 / alpha).sin()


@program(lambda r: (r.positive(4, 8),))
def logs_and_roots(x):
    return x.log() + x.sqrt() + x.rsqrt() + x.reciprocal() + torch.log1p(x)


@program(lambda r: (r(4, 8),))
def exponentials(x):
    return torch.exp2(x) - torch.expm1(x) + torch.erf(x)


@program(lambda r: (r(4, 8),))
def angles(x):
    return torch.atan2(x.sin(), x.cos() + 2) + x.atan() + torch.asinh(x)


@program(lambda r: (r.positive(4, 8), r(4, 8)))
def powers(x, y):
    return x**y + x**2 + 2**y + x**-0.5


@program(lambda r: (r(4, 8), r(4, 8), r.positive(4, 8)))
def addcmul_addcdiv_lerp(a, b, c):
    return torch.lerp(torch.addcmul(a, b, c, value=0.5), torch.addcdiv(a, b, c), 0.3)


@program(lambda r: (r(4, 8), r(4, 8)))
def hypot_and_logaddexp(a, b):
    return torch.hypot(a, b) + torch.logaddexp(a, b)


@program(lambda r: (r(4, 8),))
def softplus_family(x):
    return F.softplus(x) + F.elu(x) + F.celu(x) + F.selu(x) + F.logsigmoid(x) + F.hardswish(x)


@program(lambda r: (r(4, 8), r.weight(1)))
def prelu_glu(x, w):
    return F.glu(F.prelu(x, w), -1) * 1.7


@program(lambda r: (r(4, 8),))
def remainders(x):
    return torch.fmod(x, 0.75) + torch.remainder(x, 0.8125) * 1.1


@program(lambda r: (r(4, 9),))
def mean_and_std(x):
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-3)


@program(lambda r: (r(4, 9),))
def var_mean(x):
    var, mean = torch.var_mean(x, 0, unbiased=False)
    return var / (1 + mean**2)


@program(lambda r: (r(4, 9),))
def norms(x):
    return x.norm(dim=-1) + torch.linalg.vector_norm(x, 3, -1) + x.norm(p=1, dim=-1)


@program(lambda r: (r(4, 9),))
def logsumexp(x):
    return x.logsumexp(-1) + torch.log_softmax(x, 0).sum(-1)


@program(lambda r: (r(4, 9),))
def cumulative(x):
    return x.cumsum(-1) + (1 + 0.1 * x).cumprod(-1)


@program(lambda r: (r(4, 9),))
def logcumsumexp(x):
    return x.logcumsumexp(-1) * x.sum()


@program(lambda r: (r.positive(3, 4),))
def prod(x):
    return x.prod(-1) * x.prod()


@program(lambda r: (r(4, 9),))
def amax_and_softmax(x):
    return (x - x.amax(-1, keepdim=True)).exp() / (x - x.max()).exp().sum(-1, keepdim=True)


@program(lambda r: (r(3, 8), r(3, 8)))
def cosine_similarity(a, b):
    return F.cosine_similarity(a, b) + F.normalize(a, dim=-1).sum(-1)


@program(lambda r: (r(3, 4), r(5, 4)))
def cdist(a, b):
    return torch.cdist(a, b)


@program(lambda r: (r(4, 4), r.weight(4, 4)))
def matrix_power(x, w):
    return torch.linalg.matrix_power(x @ w, 3)


@program(lambda r: (r(4, 8),), grads=False, exact=FUSED)
def comparisons(x):
    return (x > 0) & (x < 1), torch.where(x > 0, x, -x), x.sign(), x.isnan().any()


@program(lambda r: (r.ids(20, 4, 8), r.ids(5, 4, 8)), grads=False, exact=FUSED)
def integers(a, b):
    return a // (b + 1), a % (b + 1), a & b, a ^ b, a << b, (a - b).abs().sum(-1), a.bool().all(-1)


@program(lambda r: (r.ids(20, 4, 8), r(4, 8)))
def integers_times_floats(a, x):
    return x.exp() * 1.1 * a + a.to(x.dtype).mean() + (a / 3).sum()


@program(lambda r: (r.mask(8, 12), r(8, 12)))
def masked_mean(mask, x):
    return ((x * mask).sum(-1) / mask.sum(-1)).exp() * 1.1


@program(lambda r: (r.wide(4, 8), r.wide(4, 8)), exact=SINGLE)
def complex_product(a, b):
    z = torch.complex(a, b)
    return (z * z.conj() + z.exp()).abs(), torch.view_as_real(z * z)


@program(lambda r: (r(4, 8), r.weight(8, 8)))
def spectrum(x, w):
    return torch.fft.irfft(torch.fft.rfft((x @ w).float()) * 2, n=8).to(x.dtype).sigmoid() * 1.1


@program(lambda r: (r(5, 8), r.weight(8, 4)))
def mixed_dtypes(x, w):
    return x.float() @ w.float() + (x @ w).float().mean()


@program(lambda r: (r(5, 8), r.wide(8)), exact=SINGLE)
def promotes_to_float(x, scale):
    return x * scale + 1


@program(lambda r: (r(5, 8), r.weight(8, 4)))
def casts_down_and_up(x, w):
    h = (x @ w).to(torch.bfloat16)
    return (h.float() * 1.1).half().float() + 1


@program(lambda r: (r(4, 8),), exact=FUSED, grads=False)
def quantizes(x):
    scale = x.abs().amax(-1, keepdim=True).float() / 127
    return torch.clamp((x.float() / scale).round(), -127, 127).to(torch.int8)


@program(lambda r: (r.ids(255, 4, 8).to(torch.int8), r.positive(4, 1), r(3, 8)))
def dequantizes(q, scale, x):
    return F.linear(x, q.to(scale.dtype) * scale) + 1


@program(lambda r: (r(4, 8),), grads=False, exact=FUSED)
def constants(x):
    top = torch.finfo(x.dtype).max
    return x.new_full((2,), -1.5), torch.full_like(x, 2), x * 0 == 0, top > 1


@program(lambda r: (r(4, 8),))
def scalar_math(x):
    return x * math.sqrt(x.shape[-1]) / math.log(x.numel()) + x.sum().item() * 0
