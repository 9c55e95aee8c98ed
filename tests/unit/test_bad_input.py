"""What does not fit gives one clear error, or is kept, correct and listed: no silent change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.exc import BackendCompilerFailed
from torch._subclasses import FakeTensorMode

from healpass import HealConfig, inductor_options
from healpass.backend import check_torch
from healpass.errors import ConfigError, StrictError, UnavailableError, UnsupportedTorchError
from healpass.graph.eligibility import device_reason
from healpass.graph.pipeline import rewrite
from tests.support.against_torch import integers, same_bits
from tests.support.rewriting import Rewritten

BF16 = torch.bfloat16
X, W = integers(4, 4), integers(4, 4, seed=1)


def reason_of(options, mode=None):
    """The error that `torch.compile(backend="heal")` wraps, and the text a user reads."""
    kwargs = {"mode": mode} if mode else {"options": options}
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(lambda x: x @ x, backend="heal", **kwargs)(X)
    return caught.value.inner_exception, str(caught.value)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"precizion": "heal"}, ConfigError, "Did you mean 'precision'?"),
        ({"precision": "hael"}, ConfigError, "Did you mean 'heal'?"),
        ({"strict": "yes"}, ConfigError, "True or False is needed"),
        ({"max_autotune": True}, ConfigError, "Inductor's own options are not accepted"),
        ({"debug": {"disable": ("promot",)}}, ConfigError, "Did you mean 'promote'?"),
        ({"m_invariant": True}, UnavailableError, "needs CUDA tensors"),
    ],
)
def test_a_wrong_option_is_named_in_what_torch_prints(options, kind, text):
    error, shown = reason_of(options)
    assert isinstance(error, kind)
    assert text in shown


def test_a_wrong_mode_is_named():
    error, _ = reason_of(None, mode="fastest")
    assert isinstance(error, ConfigError)
    assert "'fastest'" in str(error)


def test_torch_itself_refuses_mode_beside_options():
    with pytest.raises(RuntimeError, match="mode or options"):
        torch.compile(lambda x: x, backend="heal", mode="default", options={"precision": "heal"})


def test_the_second_door_is_as_strict():
    with pytest.raises(ConfigError, match="Did you mean 'precision'"):
        inductor_options(precizion="heal")


@pytest.mark.parametrize("version", ["2.10.1", "2.16.0", "2.16.0rc1+cu130", "1.13.1", "3.0.0"])
def test_torch_out_of_range_is_refused_with_the_way_out(version):
    with pytest.raises(UnsupportedTorchError, match=r"2\.11 to 2\.15") as caught:
        check_torch(version)
    assert version in str(caught.value).split("\n")[0]
    assert "pip install" in str(caught.value)


@pytest.mark.parametrize(
    "version", ["2.11.0", "2.13.0+cpu", "2.15.3a0+git12ab", torch.__version__]
)
def test_torch_in_range_is_accepted(version):
    check_torch(version)


# ------------------------------------------------------------------------ operands that do not fit


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [
        (torch.complex64, "complex64 operands"),
        (torch.int64, "int64 operands"),
        (torch.int8, "int8 operands"),
        (torch.float64, "float64 is wider than FP32 already"),
    ],
    ids=str,
)
def test_other_dtypes_are_kept_correct_and_listed(dtype, reason):
    def function(x, w):
        return (x @ w, torch.einsum("ij,kj->ik", x, w))

    compiled = same_bits(function, (X.to(dtype), W.to(dtype)))
    assert set(compiled.kept.values()) == {reason}


def test_strict_names_the_operator_and_its_line():
    compiled = Rewritten(lambda x: x.double() @ x.double(), HealConfig(strict=True))
    with pytest.raises(BackendCompilerFailed) as caught:
        compiled(X)
    assert isinstance(caught.value.inner_exception, StrictError)
    assert "1 of 1" in str(caught.value)
    assert "test_bad_input.py" in str(caught.value)
    assert "float64" in str(caught.value)


def test_meta_tensors_are_kept():
    compiled = Rewritten(lambda x: x @ x, HealConfig())
    result = compiled(X.to("meta"))
    assert (result.device.type, result.dtype, result.shape) == ("meta", BF16, (4, 4))
    assert compiled.kept == {"matmul": "device 'meta' is not supported"}


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_sparse_matmuls_stay_with_torch(layout):
    sparse = getattr(X.float(), layout)()
    compiled = Rewritten(lambda w: sparse @ w, HealConfig())
    assert torch.equal(compiled(W.float()), sparse @ W.float())
    assert not compiled.nodes


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: torch._int_mm(x, w).to(BF16),
        lambda x, w: torch._scaled_mm(
            x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn).t(), *SCALES, out_dtype=BF16
        ),
        lambda x, w: torch._weight_int8pack_mm(x.to(BF16), w, torch.ones(32, dtype=BF16)),
    ],
    ids=["_int_mm", "_scaled_mm", "_weight_int8pack_mm"],
)
def test_quantized_matmuls_run_as_traced(function):
    x, w = integers(32, 32).char(), integers(32, 32, seed=1).char()
    compiled = same_bits(function, (x, w))
    assert list(compiled.kept.values()) == ["quantized matmul: its format is the caller's choice"]


SCALES = torch.ones(()), torch.ones(())


class Int8Weight(torch.Tensor):
    """A weight-only quantized tensor, as torchao makes them: `F.linear` is its own."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=BF16)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, size, stride):
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            activation, weight = args[:2]
            assert activation.dtype == BF16, "its kernel knows BF16 activations only"
            return F.linear(activation, weight.codes.to(BF16) * weight.scale)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default), func
        return cls(args[0].codes, args[0].scale)


def test_a_quantized_weight_keeps_its_own_linear():
    weight = Int8Weight(W.char(), torch.ones((), dtype=BF16))

    def function(x, w):
        return F.linear(x @ w, weight) + x

    compiled = same_bits(function, (X.sign(), W.sign()))
    assert compiled.kept == {"linear": "operand is a Int8Weight: its own class defines its matmul"}
    assert len(compiled.nodes) == 2


@torch.library.custom_op("heal_test_input::gemv_4bit", mutates_args=())
def gemv_4bit(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    assert x.dtype == BF16
    return x @ codes.to(BF16)


@gemv_4bit.register_fake
def _(x, codes):
    return x.new_empty(x.shape[0], codes.shape[1])


def test_a_quantized_custom_operator_sees_its_dtypes_and_is_listed():
    def function(x, w, codes):
        return torch.ops.heal_test_input.gemv_4bit(x @ w, codes) @ w

    compiled = same_bits(function, (X.sign(), W.sign(), W.sign().char()))
    boundaries = [b for report in compiled.reports for b in report.boundaries]
    assert any("gemv_4bit" in b.detail and b.kind == "foreign operator" for b in boundaries)


# ---------------------------------------------------------------------------------- devices


@pytest.mark.parametrize(
    ("device", "hip", "reason"),
    [
        ("cpu", None, None),
        ("cuda", None, None),
        ("cuda", "6.2", "ROCm is not supported"),
        ("xpu", None, "device 'xpu' is not supported"),
        ("mps", None, "device 'mps' is not supported"),
        ("hpu", None, "device 'hpu' is not supported"),
    ],
)
def test_only_cpu_and_nvidia_are_supported(device, hip, reason):
    assert device_reason(device, hip) == reason


def graph_on(device):
    """`torch.relu(x @ x)` as Dynamo would trace it on a device that this machine need not have."""
    with FakeTensorMode():
        x = torch.empty(4, 4, device=device, dtype=BF16)
        y = x @ x
    graph = torch.fx.Graph()
    placeholder = graph.placeholder("x")
    product = graph.call_function(torch.matmul, (placeholder, placeholder))
    for node, value in ((placeholder, x), (product, y)):
        node.meta["example_value"] = value
    graph.output((product,))
    return torch.fx.GraphModule({}, graph)


@pytest.mark.parametrize("device", ["xpu", "mps"])
def test_a_graph_on_another_device_is_kept_and_listed(device):
    report = rewrite(graph_on(device), HealConfig())
    assert [node.reason for node in report.kept] == [f"device {device!r} is not supported"]
    with pytest.raises(StrictError, match=device):
        rewrite(graph_on(device), HealConfig(strict=True))


def test_rocm_is_kept_and_listed(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.2")
    report = rewrite(graph_on("cuda"), HealConfig())
    assert [node.reason for node in report.kept] == ["ROCm is not supported"]


# ------------------------------------------------------------- export and transforms around it


def compiled_heal(function):
    return torch.compile(function, backend="heal")


def square(x):
    return (x @ W).square().sum()


AROUND = {
    "grad": lambda wrap: torch.func.grad(wrap(square))(X),
    "vmap": lambda wrap: torch.func.vmap(wrap(lambda row: row @ W))(X),
    "jvp": lambda wrap: torch.func.jvp(wrap(square), (X,), (X,))[1],
    "jacrev": lambda wrap: torch.func.jacrev(wrap(lambda row: row @ W))(X[0]),
}


@pytest.mark.parametrize("name", AROUND)
def test_a_transform_around_a_compiled_function_is_torchs_own_answer(name):
    """torch runs compiled functions eagerly inside a transform: nothing is rewritten there."""
    assert torch.equal(AROUND[name](compiled_heal), AROUND[name](lambda function: function))


def test_exporting_a_compiled_module_gives_the_plain_model():
    model = torch.nn.Linear(4, 4, dtype=BF16)
    program = torch.export.export(compiled_heal(model), (X,))
    assert "heal" not in str(program.graph)
    assert torch.equal(program.module()(X), model(X))


def test_an_exported_program_is_rewritten_when_compiled():
    model = torch.nn.Linear(4, 4, dtype=BF16)
    compiled = Rewritten(torch.export.export(model, (X,)).module(), HealConfig())
    compiled(X)
    assert [node.heal_op for node in compiled.nodes] == ["heal::linear"]


@pytest.mark.parametrize(
    "shapes", [((0, 4), (4, 3)), ((3, 0), (0, 4)), ((1, 1), (1, 1)), ((4, 0), (0, 0))]
)
def test_empty_and_tiny_products(shapes):
    def function(x, w):
        return x @ w, F.linear(x, w.t()), torch.addmm(w.new_ones(w.shape[1]), x, w)

    same_bits(function, tuple(torch.ones(shape, dtype=BF16) for shape in shapes))


@pytest.mark.parametrize("special", [torch.inf, -torch.inf, torch.nan, 2.0**-133, 2.0**127])
def test_special_values_pass_as_torch_passes_them(special):
    x = torch.zeros(4, 4, dtype=BF16)
    x[1, 2] = special
    ours = Rewritten(lambda x, w: (x @ w, F.linear(x, w)), HealConfig())(
        x, torch.eye(4, dtype=BF16)
    )
    for result, wanted in zip(ours, (x @ torch.eye(4, dtype=BF16),) * 2, strict=True):
        assert torch.equal(result.isnan(), wanted.isnan())
        assert torch.equal(result.nan_to_num(7), wanted.nan_to_num(7))
