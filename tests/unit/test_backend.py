"""The backend as torch calls it: modes, options, graph breaks, training, caches, both doors."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import healpass
from healpass import HealConfig
from healpass.backend import inductor_patches
from healpass.cache_key import CacheKey, source_hash
from healpass.graph.pipeline import PASSES
from tests.support.against_torch import random
from tests.support.rewriting import Rewritten

U = 2.0**-24
BF16 = torch.bfloat16


class Tiny(nn.Module):
    """Two layers with a norm: enough for Inductor to fuse across our operators."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16, dtype=BF16), nn.Linear(16, 8, dtype=BF16)

    def forward(self, x):
        return x + self.down(F.silu(self.up(F.layer_norm(x, (8,)))))


def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


def budget(model, x):
    """The FP64 result, and how far off an FP32 one, rounded once to BF16, may be."""
    exact = copy.deepcopy(model).double()(x.double())
    single = copy.deepcopy(model).float()(x.float())
    before = 2 * (single - exact).abs().max() + 4 * U * exact.abs().max()
    return exact, before + 2.0**-8 * (exact.abs() + before)


def check(result, model, x):
    exact, allowed = budget(model, x)
    ratio = ((result - exact).abs() / allowed).max()
    print(f"observed/bound {ratio:.3f}")
    assert result.dtype == BF16
    assert ratio <= 1


X = random(3, 8)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"fullgraph": True},
        {"mode": "default"},
        {"options": {"precision": "layercast", "mode": "max-autotune-no-cudagraphs"}},
    ],
    ids=str,
)
def test_ways_to_ask_give_a_result_within_the_bound(kwargs):
    model = tiny()
    check(torch.compile(model, backend="heal", **kwargs)(X), model, X)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_every_grad_mode(context):
    model = tiny()
    with context():
        result = torch.compile(model, backend="heal", fullgraph=True)(X)
    check(result.detach().clone(), model, X)
    assert result.is_inference() == (context is torch.inference_mode)
    assert result.requires_grad == (context is torch.enable_grad)


def test_outputs_fp32():
    model = tiny()
    result = torch.compile(model, backend="heal", options={"outputs": "fp32"})(X)
    exact, _ = budget(model, X)
    assert result.dtype == torch.float32
    assert (result - exact).abs().max() <= 2.0**-16 * exact.abs().max(), "no BF16 rounding is left"


def test_the_untouched_baseline_runs_the_graph_as_traced():
    model = tiny()
    compiled = Rewritten(model, HealConfig(precision="traced"))
    assert torch.equal(compiled(X), model(X))
    assert not compiled.nodes


def test_a_dtype_as_the_precision_is_the_models_or_refused():
    """It casts nothing: FP32 asked of a BF16 model would be BF16 in silence."""
    assert torch.equal(Rewritten(tiny(), HealConfig(precision="bf16"))(X), tiny()(X))
    with pytest.raises(BackendCompilerFailed, match="healpass casts no model"):
        Rewritten(tiny(), HealConfig(precision="fp32"))(X)
    with pytest.raises(BackendCompilerFailed, match="healpass casts no model"):
        Rewritten(lambda x: x @ x.t(), HealConfig(precision="fp32"))(X)
    with torch.autocast("cpu", BF16), pytest.raises(BackendCompilerFailed, match="autocast"):
        Rewritten(lambda x: x @ x.t(), HealConfig(precision="fp32"))(X.float())
    options = healpass.inductor_options(precision="fp32")
    with pytest.raises(BackendCompilerFailed, match="healpass casts no model"):
        torch.compile(tiny(), options=options)(X)
    wide = tiny().float()
    assert torch.equal(Rewritten(wide, HealConfig(precision="fp32"))(X.float()), wide(X.float()))


def test_training_gives_gradients_rounded_once():
    """Nearly as near to the FP64 gradients as those are to themselves rounded to BF16."""
    model, reference = tiny(), tiny().double()
    compiled = torch.compile(model, backend="heal", options={"outputs": "fp32"})
    compiled(X).square().sum().backward()
    reference(X.double()).square().sum().backward()
    for ours, exact in zip(model.parameters(), reference.parameters(), strict=True):
        rounding = (exact.grad.to(BF16) - exact.grad).norm()
        ratio = (ours.grad - exact.grad).norm() / rounding
        print(f"observed/bound {ratio / 1.1:.3f}")
        assert ours.grad.dtype == BF16
        assert ratio <= 1.1


def test_one_graph_serves_all_lengths_when_dynamic():
    model = tiny()
    compiled = Rewritten(model, HealConfig())
    dynamic = torch.compile(model, backend=compiled._backend, dynamic=True)
    for length in (2, 3, 17, 64):
        x = random(length, 8)
        check(dynamic(x), model, x)
    assert len(compiled.graphs) == 1


def test_a_graph_break_leaves_two_good_graphs():
    model = tiny()

    def function(x):
        h = model(x)
        torch._dynamo.graph_break()
        return model(h)

    compiled = Rewritten(function, HealConfig(outputs="fp32"))
    result = compiled(X)
    assert len(compiled.graphs) == 2
    assert not compiled.kept
    exact = copy.deepcopy(model).double()
    exact = exact(exact(X.double()))
    assert (result - exact).abs().max() <= 2.0**-16 * exact.abs().max(), "FP32 across the break"


def test_two_configurations_of_one_model_do_not_mix():
    model = tiny()
    heal = torch.compile(model, backend="heal", options={"outputs": "fp32"})
    plain = torch.compile(model, backend="heal", options={"precision": "traced"})
    assert heal(X).dtype == torch.float32
    assert plain(X).dtype == BF16
    assert heal(X).dtype == torch.float32
    assert torch.equal(heal(X), heal(X))


def test_the_second_door_gives_the_same_bits():
    model = tiny()
    first = torch.compile(model, backend="heal")(X)
    torch._dynamo.reset()
    second = torch.compile(model, options=healpass.inductor_options())(X)
    assert torch.equal(first, second)


@pytest.fixture
def bf16_shortcut():
    """torch's permission to run FP32 matmuls in BF16 inside, for all of a process."""
    flags = torch.backends.mkldnn.matmul
    before = flags.fp32_precision
    flags.fp32_precision = "bf16"
    yield
    flags.fp32_precision = before


def test_shortcuts_that_torch_permits_are_not_taken(bf16_shortcut):
    model, x = tiny(), random(64, 8)
    check(torch.compile(model, backend="heal")(x), model, x)
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16", "the flag is the user's"


@pytest.mark.parametrize("name", PASSES)
def test_each_pass_can_be_left_out(name):
    model = tiny()
    compiled = Rewritten(model, HealConfig(debug={"disable": (name,)}))
    result, plain = compiled(X), model(X)
    exact, _ = budget(model, X)
    assert result.dtype == BF16
    assert (result - exact).norm() <= (plain - exact).norm()
    assert name not in [p["name"] for report in compiled.reports for p in report.passes]
    assert bool(compiled.nodes) == (name != "matmul")


# ------------------------------------------------------------------------------------ caches


def hits_and_misses(model, **options):
    torch._dynamo.reset()
    counters.clear()
    torch.compile(model, backend="heal", options=options)(X)
    seen = counters["inductor"]
    return seen["fxgraph_cache_hit"], seen["fxgraph_cache_miss"]


def test_the_same_options_hit_the_cache_and_changed_ones_miss(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = tiny().eval().requires_grad_(False)
    with (
        torch._inductor.config.patch(fx_graph_cache=True),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        assert hits_and_misses(model) == (0, 1)
        assert hits_and_misses(model) == (1, 0)
        assert hits_and_misses(model, strict=True) == (0, 1), (
            "an option that the graph does not show"
        )
        assert hits_and_misses(model, strict=True) == (1, 0)
        monkeypatch.setattr("healpass.cache_key.source_hash", lambda: "another version")
        assert hits_and_misses(model) == (0, 1), "healpass itself has changed"


LINEAR = """
import torch
from torch._dynamo.utils import counters

def hits(options):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8, dtype=torch.bfloat16)
    torch.compile(model, backend="heal", options=options)(torch.ones(3, 8, dtype=torch.bfloat16))
    aot, inductor = counters["aot_autograd"], counters["inductor"]
    return aot["autograd_cache_hit"] + inductor["fxgraph_cache_hit"]
"""


def test_a_second_process_hits_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    first = LINEAR + "print(hits({'precision': 'heal'}))"
    second = LINEAR + "print(hits({'precision': 'heal'}), hits({'precision': 'layercast'}))"
    cold, same, changed = (
        int(word)
        for script in (
            first,
            second,
        )  # two fresh processes: this one is in whatever state tests left
        for word in subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        ).stdout.split()
    )
    assert cold == 0
    assert same >= 1
    assert changed == 0


def test_the_key_holds_source_options_and_the_users_own_pass():
    ours = CacheKey(HealConfig())
    assert ours.uuid() == CacheKey(HealConfig()).uuid()
    assert ours.uuid() != CacheKey(HealConfig(strict=True)).uuid()
    assert source_hash() in ours.uuid()

    class Users(CacheKey):
        def uuid(self):
            return "theirs"

    assert "theirs" in CacheKey(HealConfig(), chained=Users(HealConfig())).uuid()
    assert CacheKey(HealConfig(), chained=print).uuid() is None, "no uuid: torch must not cache"


def test_a_pass_of_the_user_still_runs():
    seen = []
    with torch._inductor.config.patch(post_grad_custom_pre_pass=seen.append):
        torch.compile(tiny(), backend="heal")(X)
    assert len(seen) >= 1


FIELDS = {"precision": "exact", "debug": {"simulate": "h100", "order": 2}}
GIVEN = {"mapping": FIELDS, "HealConfig": HealConfig(**FIELDS)}


@pytest.mark.parametrize("way", GIVEN)
def test_every_door_takes_a_configuration_or_a_mapping(way, monkeypatch):
    seen = []
    monkeypatch.setattr(
        healpass.backend, "_inductor", lambda gm, _, config, *__: seen.append(config) or gm.forward
    )
    torch.compile(tiny(), backend="heal", options=GIVEN[way])(X)
    torch._dynamo.reset()  # else the second model runs the code of the first
    tiny_model = tiny()
    tiny_model.compile(backend="heal", options=GIVEN[way])
    tiny_model(X)
    seen.append(healpass.inductor_options(GIVEN[way])["pre_grad_custom_pass"].config)
    report = healpass.explain(tiny(), GIVEN[way])(X)
    assert seen == [HealConfig(**FIELDS)] * 3
    assert report.config == dataclasses.asdict(HealConfig(**FIELDS))


def test_no_patch_of_inductor_reorders_sums():
    patches = inductor_patches(HealConfig())
    assert patches["emulate_precision_casts"] is False
    assert inductor_patches(HealConfig(precision="traced")) == {}


def test_reset_reaches_the_backend(monkeypatch):
    from healpass.backend import heal_backend

    dropped = []
    trees = types.SimpleNamespace(reset_cudagraph_trees=lambda: dropped.append(True))
    torch.compile(tiny(), backend="heal")(X)
    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", trees)
    heal_backend.reset()
    assert len(dropped) == 1
    torch._dynamo.reset()
    assert len(dropped) > 1
