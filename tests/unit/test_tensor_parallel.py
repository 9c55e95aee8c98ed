"""The pass that takes sharded linear layers out of DTensor: what it matches, and what it leaves.

The process group is torch's fake one, whose collectives do nothing: graphs are looked at here.
Real processes run in `tests/integration/test_distributed.py`.
"""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from healpass import HealConfig
from tests.support.rewriting import Rewritten


@pytest.fixture(autouse=True)
def four_ranks():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


class Mlp(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.up = nn.Linear(8, 16, bias, dtype=torch.bfloat16)
        self.down = nn.Linear(16, 8, bias, dtype=torch.bfloat16)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def rewritten(up, down, *, bias=True, shape=(4,), **options):
    """The MLP cut over the ranks by two styles, run once."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("tp", "other")[: len(shape)])
    model = parallelize_module(Mlp(bias), mesh["tp"], {"up": up, "down": down})
    call = Rewritten(model, HealConfig(**{"outputs": "fp32"} | options))
    with torch.no_grad():
        result = call(torch.ones(2, 3, 8, dtype=torch.bfloat16))
    return call, result


def operators(call):
    return [(node.op, node.heal_op) for node in call.nodes if node.op == "linear"]


BOTH = [("linear", "heal::column_linear"), ("linear", "heal::row_linear")]


@pytest.mark.parametrize("precision", ["heal", "exact", "layercast"])
@pytest.mark.parametrize("bias", [True, False])
def test_both_styles_become_operators_on_local_tensors(precision, bias):
    call, result = rewritten(
        ColwiseParallel(), RowwiseParallel(), bias=bias, precision=precision, strict=True
    )
    assert operators(call) == BOTH
    assert not call.kept
    assert result.dtype == torch.float32
    code = call.graphs[0].code
    assert "from_local" not in code
    assert "redistribute" not in code


def test_the_bound_is_that_of_the_whole_sum():
    call, _ = rewritten(ColwiseParallel(), RowwiseParallel())
    bounds = {node.heal_op: node.bound for node in call.nodes}
    assert bounds["heal::row_linear"].startswith("16.1u"), "K is 16, of which a rank has 4"


@pytest.mark.parametrize(
    "styles",
    [
        (ColwiseParallel(), RowwiseParallel(output_layouts=Shard(1))),
        (ColwiseParallel(), RowwiseParallel(use_local_output=False)),
        (ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())),
    ],
    ids=["sequence parallel", "DTensor output", "gathered between"],
)
def test_another_arrangement_is_left_to_dtensor_and_listed(styles):
    call, _ = rewritten(*styles)
    assert "operand is a DTensor" in call.kept["linear"]


def test_the_pass_can_be_left_out():
    call, _ = rewritten(
        ColwiseParallel(), RowwiseParallel(), debug={"disable": ("tensor_parallel",)}
    )
    assert [heal_op for _, heal_op in operators(call)] == [None, None]


@pytest.mark.parametrize("name", ["cut_mm", "summed_mm"])
@pytest.mark.parametrize("numerics", ["heal", "exact5"])
def test_the_products_are_operators_in_good_order(name, numerics):
    group = init_device_mesh("cpu", (4,)).get_group().group_name
    torch.manual_seed(0)
    a = torch.randn(3, 4, requires_grad=True)
    b = torch.randn(4, 5, dtype=torch.bfloat16).requires_grad_()
    torch.library.opcheck(getattr(torch.ops.heal, name).default, (a, b, group, numerics))


@pytest.mark.parametrize("name", ["column_linear", "row_linear"])
def test_another_dtype_is_refused(name):
    wide = torch.ones(3, 4, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"got a torch\.float64 operand"):
        getattr(torch.ops.heal, name)(wide, wide, None, "0", "heal")
