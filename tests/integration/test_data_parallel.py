"""Gradients of a fixed cut into four micro-batches: the same bits on 1, 2 and 4 ranks."""

from __future__ import annotations

import multiprocessing
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from healpass.integrations.data_parallel import ExactGradients
from tests.support.bits import differing

heal = torch.ops.heal
MICRO_BATCHES = 4
RANKS = (1, 2, 4)


@pytest.fixture(autouse=True)
def with_gradients(no_gradients):
    """Whatever this folder's tests do without."""
    with torch.enable_grad():
        yield


class Network(torch.nn.Module):
    """Two layers in exact operators, so that a micro-batch's gradient has one value."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first = torch.nn.Parameter(torch.randn(16, 12, generator=generator))
        self.bias = torch.nn.Parameter(torch.randn(16, generator=generator))
        self.last = torch.nn.Parameter(torch.randn(7, 16, generator=generator).bfloat16())

    def forward(self, x, target):
        hidden = heal.gelu(heal.linear(x, self.first, self.bias, "exact5"))
        return heal.cross_entropy(heal.linear(hidden, self.last, None, "exact5"), target)


def micro_batch(index: int):
    """Gradients of very different magnitude, so that the order of a float sum shows."""
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(5, 12, generator=generator) * 10.0 ** (index - 2)
    return x, torch.randint(0, 7, (5,), generator=generator)


def gradients(ranks: int, rank: int, group=None) -> list[torch.Tensor]:
    network = Network()
    found = ExactGradients(network.parameters(), MICRO_BATCHES)
    for index in range(rank, MICRO_BATCHES, ranks):
        network(*micro_batch(index)).backward()
        found.take()
    found.reduce(group)
    return [parameter.grad for parameter in network.parameters()]


def worker(rank: int, folder: str) -> None:
    """One of four processes: the gradients in groups of 1, 2 and 4 of them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    groups = {ranks: dist.new_group(list(range(ranks))) for ranks in RANKS}
    for ranks, group in groups.items():
        if rank < ranks:
            torch.save(gradients(ranks, rank, group), f"{folder}/{ranks}.{rank}")
    dist.destroy_process_group()


def test_1_2_and_4_processes_have_the_bits_of_one():
    alone = gradients(1, 0)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=worker, args=(rank, folder)) for rank in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0
        for ranks in RANKS:
            for rank in range(ranks):
                saved = torch.load(Path(folder) / f"{ranks}.{rank}")
                assert differing(saved, alone) == 0, (ranks, rank)


def test_the_mean_is_that_of_fp64():
    network = Network()
    total = [torch.zeros(p.shape, dtype=torch.float64) for p in network.parameters()]
    for index in range(MICRO_BATCHES):
        network.zero_grad()
        network(*micro_batch(index)).backward()
        for sums, parameter in zip(total, network.parameters(), strict=True):
            sums += parameter.grad.double()
    for found, sums in zip(gradients(1, 0), total, strict=True):
        exact = sums / MICRO_BATCHES
        unit = 2.0**-23 if found.dtype == torch.float32 else 2.0**-8
        row = exact.abs() if exact.dim() < 2 else exact.abs().amax(-1, keepdim=True)
        bound = unit * exact.abs() + 4 * 2.0**-39 * row.amax()
        error = (found.double() - exact).abs()
        print(f"observed/bound {float((error / bound).max()):.3f}")
        assert (error <= bound).all()


def test_the_order_of_micro_batches_does_not_show_and_of_floats_it_does():
    """The inverse: floating-point sums of the same gradients in two orders."""
    network = Network()
    found, floats = [], []
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        exact = ExactGradients(network.parameters(), MICRO_BATCHES)
        total = [torch.zeros(p.shape) for p in network.parameters()]
        for index in order:
            network(*micro_batch(index)).backward()
            total = [t + p.grad for t, p in zip(total, network.parameters(), strict=True)]
            exact.take()
        exact.reduce()
        found.append([p.grad.clone() for p in network.parameters()])
        floats.append(total)
        network.zero_grad()
    assert differing(*found) == 0
    assert differing(*floats) > 0


def test_infinities_become_nan_in_their_row_only():
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    exact = ExactGradients([parameter], 1)
    parameter.grad = torch.tensor([[1.0, float("inf"), 2.0], [1.0, 2.0, 4.0]])
    exact.take()
    exact.reduce()
    assert parameter.grad[0].isnan().all()
    assert torch.equal(parameter.grad[1], torch.tensor([1.0, 2.0, 4.0]))


def test_a_missing_micro_batch_is_an_error():
    exact = ExactGradients(Network().parameters(), MICRO_BATCHES)
    with pytest.raises(ValueError, match="made for 4 micro-batches, and the ranks have taken 0"):
        exact.reduce()
