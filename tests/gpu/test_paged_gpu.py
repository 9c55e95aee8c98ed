"""Attention over pages on a GPU: its check, and a CUDA graph that serves later steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from healpass.lowering.cuda import selfcheck_paged
from healpass.ops.attention.paged import PagedAttention
from tests.support.bits import differing
from tests.support.paged_runs import Batch

heal = torch.ops.heal


def test_every_kernel_passes_its_check():
    index = torch.cuda.current_device()
    assert selfcheck_paged.examine(selfcheck_paged.on_gpu(index)) == {}


@pytest.mark.parametrize("numerics", ["exact5", "heal", "layercast"])
def test_a_cuda_graph_holds_a_step_and_serves_another(numerics):
    selfcheck_paged.on_gpu(torch.cuda.current_device())  # registers the kernels
    first, second = (
        Batch(queries, (40, 300, 7)).call(numerics) for queries in ((5, 1, 7), (1, 9, 3))
    )
    call = [x.cuda() if isinstance(x, Tensor) else x for x in first]
    heal.paged_attention(*call)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = heal.paged_attention(*call)
    for step in (first, second):
        for memory, x in zip(call, step, strict=True):
            if isinstance(x, Tensor):
                memory.copy_(x)
        graph.replay()
        wanted = heal.paged_attention(*(x.cuda() if isinstance(x, Tensor) else x for x in step))
        assert differing(output.cpu(), wanted.cpu()) == 0
        if numerics == "exact5":
            assert differing(output.cpu(), PagedAttention.read(*step).attend()) == 0
