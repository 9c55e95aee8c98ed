"""Recurrences: torch's own cells, loops in Python, state-space models, scans."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.programs.record import program

UNCOMPILED = "torch does not compile nn.RNN, nn.GRU and nn.LSTM: they run as torch has them"


@program(lambda r: (r(2, 4, 3), r.module(nn.LSTM, 3, 5, batch_first=True)), coarse=UNCOMPILED)
def lstm(x, cell):
    y, (h, c) = cell(x)
    return y, h * 1.1, c


@program(lambda r: (r(4, 2, 3), r.module(nn.GRU, 3, 5, num_layers=2)), coarse=UNCOMPILED)
def gru(x, cell):
    return cell(x)[0] * 1.1


@program(
    lambda r: (r(2, 4, 3), r.module(nn.RNN, 3, 5, bidirectional=True, batch_first=True)),
    coarse=UNCOMPILED,
)
def rnn(x, cell):
    return cell(x)[0] * 1.1


@program(lambda r: (r(4, 2, 3), r.module(nn.LSTMCell, 3, 5)))
def lstm_cell(x, cell):
    state = None
    for step in x:
        state = cell(step, state)
    return state[0] * 1.1


@program(lambda r: (r(4, 2, 3), r.module(nn.GRUCell, 3, 5)))
def gru_cell(x, cell):
    h = torch.zeros(2, 5, dtype=x.dtype)
    states = []
    for step in x:
        h = cell(step, h)
        states.append(h)
    return torch.stack(states)


@program(lambda r: (r(2, 6, 4), r.weight(4, 3), r.weight(3, 4)))
def selective_scan(x, b, c):
    state, outputs = torch.zeros(2, 4, 3, dtype=x.dtype), []
    for t in range(x.shape[1]):
        dt = F.softplus(x[:, t])
        state = state * (-dt[..., None]).exp() + dt[..., None] * (x[:, t] @ b)[:, None]
        outputs.append((state * c.t()).sum(-1))
    return torch.stack(outputs, 1)


@program(lambda r: (r(2, 6, 4),))
def segment_sum(x):
    total = x.cumsum(-1)
    difference = total[..., :, None] - total[..., None, :]
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    return difference.masked_fill(~mask, -torch.inf).exp()


@program(lambda r: (r(2, 2, 6, 4), r(2, 2, 6, 4), r(2, 2, 6, 4), r.positive(2, 2, 6)))
def gated_delta_rule(q, k, v, beta):
    state, out = q.new_zeros(2, 2, 4, 4), []
    k = F.normalize(k, dim=-1)
    for t in range(q.shape[2]):
        read = torch.einsum("bhk,bhkv->bhv", k[:, :, t], state)
        delta = (v[:, :, t] - read) * beta[:, :, t, None] * 0.5
        state = state + k[:, :, t, :, None] * delta[..., None, :]
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, :, t], state))
    return torch.stack(out, 2)


@program(lambda r: (r(2, 6, 4), r.weight(4)))
def time_mix(x, mix):
    shifted = F.pad(x, (0, 0, 1, -1))
    return x * mix + shifted * (1 - mix)


@program(lambda r: (r(2, 7, 4), r.weight(4, 4)))
def chunked(x, w):
    x = F.pad(x, (0, 0, 0, -x.shape[1] % 4))
    parts = x.view(2, -1, 4, 4)
    return (parts @ w).cumsum(2).flatten(1, 2)[:, :7] * 1.1


@program(lambda r: (r(3, 4), r.weight(4, 4)), grads=False)
def power_iteration(v, w):
    for _ in range(4):
        v = F.normalize(v @ w, dim=-1)
    return v


@program(lambda r: (r(2, 6), r.weight(9, 6), r.weight(9, 6)), grads=False)
def greedy_loop(x, out, table):
    ids = []
    for _ in range(3):
        token = F.linear(x, out).argmax(-1)
        ids.append(token)
        x = F.silu(x * 1.1) + F.embedding(token, table).sigmoid()
    return torch.stack(ids), x.softmax(-1) * 1.1


@program(lambda r: (r(2, 5, 3), r.weight(7, 3)), grads=False)
def viterbi(x, w):
    score = F.log_softmax(F.linear(x, w), -1)
    best = score[:, 0]
    for t in range(1, 5):
        best = (best[:, :, None] + 0.1).amax(1) + score[:, t]
    return best.max(-1)


@program(lambda r: (r(8, 4), torch.tensor([0, 3, 8])), grads=False)
def packed_sequences(x, bounds):
    lengths = bounds.diff()
    segment = torch.repeat_interleave(torch.arange(2), lengths, output_size=8)
    return torch.zeros(2, 4, dtype=x.dtype).index_add(0, segment, x.exp()) / lengths[:, None] * 1.1
