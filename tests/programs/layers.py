"""Layers of `torch.nn`: convolutions, norms, embeddings, pooling, parametrizations, hooks."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from tests.programs.record import program


@program(lambda r: (r(2, 4, 9), r.module(nn.Conv1d, 4, 6, 3, padding=1)))
def conv1d(x, conv):
    return F.gelu(conv(x))


@program(lambda r: (r(2, 4, 6, 6), r.module(nn.Conv2d, 4, 4, 3, stride=2, groups=2)))
def conv2d_grouped(x, conv):
    return F.silu(conv(x))


@program(lambda r: (r(1, 2, 4, 4, 4), r.module(nn.Conv3d, 2, 3, 2)))
def conv3d(x, conv):
    return conv(x).tanh()


@program(lambda r: (r(2, 3, 4, 4), r.module(nn.ConvTranspose2d, 3, 2, 2, stride=2)))
def conv_transpose(x, conv):
    return conv(x).sigmoid()


@program(lambda r: (r(2, 5, 4), r.weight(4, 1, 3)))
def causal_depthwise_conv(x, w):
    y = F.conv1d(F.pad(x.transpose(1, 2), (2, 0)), w, groups=4)
    return F.silu(y).transpose(1, 2)


@program(lambda r: (r(2, 3, 8, 8), r.module(nn.Conv2d, 3, 8, 4, stride=4), r.weight(1, 5, 8)))
def patch_embedding(x, conv, position):
    tokens = conv(x).flatten(2).transpose(1, 2)
    return torch.cat([torch.zeros_like(tokens[:, :1]), tokens], 1) + position


@program(lambda r: (r(3, 8), r.module(nn.LayerNorm, 8)))
def layer_norm(x, norm):
    return norm(x) * 1.1


@program(lambda r: (r(3, 8), r.module(nn.RMSNorm, 8, eps=1e-5)))
def rms_norm_module(x, norm):
    return norm(x) * 1.1


@program(lambda r: (r(3, 8), r.weight(8)))
def rms_norm_by_hand(x, w):
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * h.to(x.dtype)


@program(lambda r: (r(2, 6, 4), r.module(nn.GroupNorm, 3, 6)))
def group_norm(x, norm):
    return norm(x).relu() * 1.1


@program(lambda r: (r(2, 4, 5), r.module(nn.InstanceNorm1d, 4, affine=True)))
def instance_norm(x, norm):
    return norm(x) * 1.1


@program(lambda r: (r(5, 4), r.module(nn.BatchNorm1d, 4)))
def batch_norm_eval(x, norm):
    return norm(x) * 1.1


def trained(module):
    return module.train()


@program(lambda r: (r(5, 4), trained(r.module(nn.BatchNorm1d, 4))), mutates=True)
def batch_norm_train(x, norm):
    return norm(x) * 1.1


@program(
    lambda r: (r(3, 4, 5), trained(r.module(nn.InstanceNorm1d, 4, track_running_stats=True))),
    mutates=True,
)
def instance_norm_train(x, norm):
    return norm(x) * 1.1


@program(lambda r: (r(5, 4), trained(r.module(nn.BatchNorm1d, 4, track_running_stats=False))))
def batch_norm_without_statistics(x, norm):
    return norm(x) * 1.1


@program(lambda r: (r(2, 4, 5, 5),))
def local_response_norm(x):
    return F.local_response_norm(x, 3) * 1.1


@program(lambda r: (r(2, 3, 6, 6),))
def pools(x):
    return F.avg_pool2d(x, 2) * F.max_pool2d(x, 2) + F.adaptive_avg_pool2d(x, 3)


@program(lambda r: (r(2, 3, 8),))
def pools_1d(x):
    return F.lp_pool1d(x.abs() + 0.1, 2, 2) + F.adaptive_max_pool1d(x, 4) * F.avg_pool1d(x, 2)


@program(lambda r: (r(1, 2, 4, 4),))
def interpolates(x):
    bilinear = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    return bilinear * F.interpolate(x, size=(8, 8), mode="nearest")


@program(lambda r: (r(1, 2, 4, 4),))
def interpolates_bicubic(x):
    return F.interpolate(x, size=(6, 7), mode="bicubic", align_corners=True) * 1.1


@program(lambda r: (r(1, 2, 4, 4), r(1, 3, 3, 2)), grads=False)
def grid_sample(x, grid):
    return F.grid_sample(x, grid.tanh(), align_corners=False) * 1.1


@program(lambda r: (r(1, 2, 6, 6),))
def unfolds_and_folds(x):
    patches = F.unfold(x, 2, stride=2)
    return F.fold(patches.softmax(1), (6, 6), 2, stride=2)


@program(lambda r: (r.ids(10, 2, 5), r.module(nn.Embedding, 10, 8, padding_idx=0)))
def embedding(ids, table):
    return table(ids) * 8**0.5


@program(lambda r: (r.ids(10, 2, 5), r.weight(10, 8)))
def tied_embedding(ids, w):
    return F.linear(F.embedding(ids, w).cumsum(1), w)


@program(lambda r: (r.ids(10, 8), torch.tensor([0, 3, 5]), r.weight(10, 4)))
def embedding_bag(ids, offsets, w):
    return F.embedding_bag(ids, w, offsets, mode="mean") * 1.1


@program(lambda r: (r.ids(10, 2, 4), r.weight(10, 4), r(2, 4)))
def embedding_bag_weighted(ids, w, s):
    return F.embedding_bag(ids, w, mode="sum", per_sample_weights=s) * 1.1


class Mlp(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width, bias=False)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


@program(lambda r: (r(3, 8), r.module(Mlp)))
def mlp(x, module):
    return x + module(x)


@program(lambda r: (r(3, 8), r.module(Mlp)))
def shared_layers(x, module):
    for _ in range(3):
        x = x + module(x)
    return x


@program(lambda r: (r(3, 8), r.module(lambda: parametrizations.weight_norm(nn.Linear(8, 6)))))
def weight_norm(x, layer):
    return layer(x) * 1.1


@program(lambda r: (r(3, 8), r.module(lambda: parametrizations.spectral_norm(nn.Linear(8, 6)))))
def spectral_norm(x, layer):
    return layer(x) * 1.1


@program(
    lambda r: (r(3, 8), r.module(lambda: parametrizations.orthogonal(nn.Linear(8, 8)))),
    dtypes=(torch.float32,),
    grads=False,
    exact="FP32",
)
def orthogonal(x, layer):
    return layer(x) * 1.1


def hooked():
    module = Mlp()
    module.up.register_forward_hook(lambda m, args, result: result * 0.5)
    module.down.register_forward_pre_hook(lambda m, args: (args[0] + 0.1,))
    return module


@program(lambda r: (r(3, 8), r.module(hooked)))
def module_with_hooks(x, module):
    return module(x) * 1.1


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.steps += 1
        self.mean.lerp_(x.mean(0), 0.1)
        return x - self.mean


@program(lambda r: (r(3, 8), r.module(Counter)), mutates=True, coarse="a 16-bit buffer")
def writes_buffers(x, module):
    return module(x) * 1.1


class Lora(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(8, 6).requires_grad_(False)
        self.a, self.b = nn.Linear(8, 2, bias=False), nn.Linear(2, 6, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x)) * 2


@program(lambda r: (r(3, 8), r.module(Lora)))
def lora(x, layer):
    return layer(x).relu()


@program(lambda r: (r(3, 8), r.module(Mlp)))
def functional_call(x, module):
    scaled = {name: p * 0.5 for name, p in module.named_parameters()}
    return torch.func.functional_call(module, scaled, (x,))


@program(lambda r: (r(3, 8), r.module(lambda: nn.ModuleList(Mlp() for _ in range(2)))))
def ensemble(x, modules):
    return torch.stack([m(x) for m in modules]).mean(0)


@program(lambda r: (r(2, 5, 8), r.module(nn.TransformerEncoderLayer, 8, 2, 16, batch_first=True)))
def encoder_layer(x, layer):
    return layer(x) * 1.1


@program(
    lambda r: (
        r(2, 5, 8),
        r.module(lambda: nn.TransformerDecoderLayer(8, 2, 16, batch_first=True, norm_first=True)),
    )
)
def decoder_layer(x, layer):
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=x.dtype)
    return layer(x, x.flip(1), tgt_mask=mask, tgt_is_causal=True) * 1.1


@program(
    lambda r: (
        r(2, 5, 8),
        r.module(
            lambda: nn.TransformerEncoder(
                nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
                2,
                enable_nested_tensor=False,
            )
        ),
        r.mask(2, 5),
    )
)
def encoder_with_padding(x, encoder, keep):
    return encoder(x, src_key_padding_mask=~keep) * keep[..., None]


@program(lambda r: (r(3, 8), r.module(Mlp)), grads=False)
def copies_a_module_state(x, module):
    state = {k: v.clone() for k, v in module.state_dict().items()}
    return module(x) + sum(v.float().sum() for v in state.values())


@program(
    lambda r: (
        r(2, 4, 3),
        r.module(
            lambda: nn.Sequential(
                nn.Flatten(),
                nn.Linear(12, 8),
                nn.SiLU(),
                nn.LayerNorm(8),
                nn.Linear(8, 3),
                nn.LogSoftmax(-1),
            )
        ),
    )
)
def sequential(x, module):
    return module(x)


@program(lambda r: (r(2, 8), r.module(nn.Linear, 8, 8)))
def twice_under_one_name(x, layer):
    other = copy.copy(layer)
    return layer(x).exp() + other(x * 0.5)
