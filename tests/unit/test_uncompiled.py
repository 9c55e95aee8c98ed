"""What torch leaves uncompiled is noticed, whatever the reason and whatever the door."""

from __future__ import annotations

import warnings
from unittest import mock

import pytest
import torch
from torch import nn

import healpass
from healpass import watch
from healpass.config import HealConfig
from healpass.errors import StrictError

BF16 = torch.bfloat16


def product(x: torch.Tensor) -> torch.Tensor:
    return x @ x.T


def forks_the_seed(x):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return product(x)


def prints_in_a_loop(x):
    for _ in range(2):
        x = x @ x.T
        print("traced?")
    return x


@torch.compiler.disable
def hidden(x):
    return product(x)


def calls_what_is_disabled(x):
    return hidden(x + 1) + 1


def compiles(x):
    return product(x) + 1


def plain_backend(config: HealConfig):
    """A backend that torch takes for HEAL's and that compiles nothing: graphs run as traced."""

    def backend(graph_module, inputs):
        watch.note(healpass.report.GraphReport())
        return watch.counted(graph_module.forward)

    backend.heal_config = config
    return backend


@pytest.fixture(autouse=True)
def watched():
    """As when torch looks the backend up by its name."""
    watch.keep_watch()


X = torch.eye(4, dtype=BF16)
LEFT_OUT = [
    (forks_the_seed, "skipped", "context manager"),
    (prints_in_a_loop, "skipped", "print"),
    (calls_what_is_disabled, "disabled", "disable"),
]


def attempt(function, config, calls=2, x=X):
    """Call a compiled function; return it, and what each call raised or warned of."""
    compiled = torch.compile(function, backend=plain_backend(config))
    said = []
    for _ in range(calls):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                compiled(x)
                ours = [str(w.message) for w in caught if "healpass" in str(w.message)]
                said.append(ours[0] if ours else None)
            except StrictError as error:
                said.append(error)
    return compiled, said


@pytest.mark.parametrize(("function", "kind", "reason"), LEFT_OUT)
def test_heal_warns_once_and_names_the_cause(function, kind, reason):
    compiled, (first, second) = attempt(function, HealConfig())
    assert reason in first
    assert function.__name__ in first.split("\n")[0], "the first line suffices"
    assert "Way out" in first
    assert second is None
    found = healpass.status(compiled)
    assert not found.whole
    assert [(f.kind, reason in f.reason) for f in found.uncompiled if f.ends_a_promise] == [
        (kind, True)
    ]
    assert function.__name__ in str(found)


@pytest.mark.parametrize("options", [{"precision": "exact"}, {"strict": True}])
@pytest.mark.parametrize(("function", "kind", "reason"), LEFT_OUT)
def test_exact_and_strict_refuse_every_call(function, kind, reason, options):
    _, said = attempt(function, HealConfig(**options))
    assert all(isinstance(error, StrictError) and reason in str(error) for error in said)


@pytest.mark.parametrize("config", [HealConfig(), HealConfig(precision="exact")])
def test_what_compiles_is_not_mentioned(config):
    compiled, said = attempt(compiles, config)
    assert said == [None, None]
    assert healpass.status(compiled).whole


def test_the_untouched_arithmetic_promises_nothing():
    _, said = attempt(forks_the_seed, HealConfig(precision="traced"))
    assert said == [None, None]


def test_suppressed_errors_are_no_way_around():
    def failing(graph_module, inputs):
        raise RuntimeError("no code for this")

    failing.heal_config = HealConfig(precision="exact")
    compiled = torch.compile(product, backend=failing)
    with torch._dynamo.config.patch(suppress_errors=True):
        for _ in range(2):
            with pytest.raises(StrictError, match="no code for this"):
                compiled(X)


def test_a_reset_of_dynamo_ends_a_refusal_and_not_the_watch():
    compiled, _ = attempt(prints_in_a_loop, HealConfig(strict=True))
    torch._dynamo.reset()
    with pytest.raises(StrictError):
        compiled(X)  # found again, not remembered: the record is new
    assert len(healpass.status(compiled).uncompiled) == 1
    torch._dynamo.reset()
    _, said = attempt(forks_the_seed, HealConfig())
    assert said[0] is not None


def test_without_the_watch_nothing_is_noticed():
    """The inverse: it is the hooks that notice."""
    with mock.patch.object(watch, "current_region", return_value=None):
        _, said = attempt(forks_the_seed, HealConfig(precision="exact"))
    assert said == [None, None]


def test_an_error_that_the_caller_is_handling_already_changes_nothing():
    compiled = torch.compile(forks_the_seed, backend=plain_backend(HealConfig(strict=True)))
    try:
        raise KeyError("being handled")
    except KeyError:
        with pytest.raises(StrictError):
            compiled(X)


class Careful(nn.Module):
    """Refuses odd batches in a frame that Dynamo can only skip when that happens."""

    def forward(self, x):
        try:
            if x.shape[0] % 2:
                raise ValueError("an even batch is needed")
            return product(x)
        finally:
            self.calls = 1


ISOLATED = {"isolate_recompiles": True}
KINDS = [{}, ISOLATED] if "isolate_recompiles" in torch.compile.__kwdefaults__ else [{}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [HealConfig(), HealConfig(precision="exact")])
def test_a_users_mistake_shows_and_leaves_the_process_as_it_was(config, kind):
    backend = plain_backend(config)
    first, other = (torch.compile(Careful(), backend=backend, **kind) for _ in range(2))
    first(X)
    with pytest.raises(ValueError, match="even batch"):
        first(torch.eye(3, dtype=BF16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first(torch.eye(6, dtype=BF16))
        other(torch.eye(8, dtype=BF16))
    assert healpass.status(other).uncompiled == healpass.status(first).uncompiled == ()
    assert healpass.status(first).whole


def test_a_call_that_runs_no_graph_at_all_is_noticed():
    from torch.utils.flop_counter import FlopCounterMode

    compiled = torch.compile(compiles, backend=plain_backend(HealConfig(precision="exact")))
    compiled(X)
    expected = compiled(X)
    for _ in range(2):
        with FlopCounterMode(display=False), pytest.raises(StrictError, match="FlopCounterMode"):
            compiled(X)
    with torch.compiler.set_stance("force_eager"), pytest.raises(StrictError, match="a stance"):
        compiled(X)
    assert torch.equal(compiled(X), expected), "what came with the mode goes with it"
    again = torch.compile(compiles, backend=plain_backend(HealConfig()))
    again(X)
    with torch.compiler.set_stance("force_eager"), pytest.warns(UserWarning, match="a stance"):
        again(X)


def breaks_once(x):
    y = product(x)
    torch._dynamo.graph_break()
    return y + 1


def test_a_graph_break_does_not_hide_a_call_that_runs_no_graph():
    compiled = torch.compile(breaks_once, backend=plain_backend(HealConfig(strict=True)))
    compiled(X)
    with torch.compiler.set_stance("force_eager"), pytest.raises(StrictError, match="a stance"):
        compiled(X)


def test_a_call_with_nothing_to_compile_is_no_fault():
    compiled = torch.compile(lambda n: n + 1, backend=plain_backend(HealConfig(strict=True)))
    assert [compiled(1), compiled(2), compiled(2)] == [2, 3, 3]


# ----------------------------------------------------------------------------- the limit, by door


def by_one_line(function, **options):
    return torch.compile(function, backend="heal", dynamic=False, options=options)


def by_options(function, **options):
    return torch.compile(function, dynamic=False, options=healpass.inductor_options(**options))


@pytest.mark.parametrize("door", [by_one_line, by_options])
def test_the_limit_of_graphs_is_refused_or_told(door):
    with torch._dynamo.config.patch(recompile_limit=1):
        strict, told = door(product, strict=True), door(compiles)
        strict(X)
        for _ in range(2):
            with pytest.raises(StrictError, match="recompile_limit of 1 graphs"):
                strict(torch.eye(6, dtype=BF16))
        strict(X)  # what is compiled goes on
        told(X)
        with pytest.warns(UserWarning, match="recompile_limit of 1 graphs"):
            told(torch.eye(6, dtype=BF16))
    assert [found.kind for found in healpass.status(told).uncompiled] == ["limit"]


def test_explain_lists_what_is_left_out_and_refuses_nothing():
    found = healpass.explain(calls_what_is_disabled, strict=True)(X)
    assert "hidden" in found.uncompiled[0]
    assert "left uncompiled" in str(found)
    assert found.to_dict()["uncompiled"] == found.uncompiled


def test_explain_names_a_frame_that_no_graph_came_of():
    found = healpass.explain(prints_in_a_loop)(X)
    assert "prints_in_a_loop" in found.uncompiled[0]


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4, dtype=BF16)

    def forward(self, x):
        return self.proj(x)


def test_the_status_of_a_model_lists_its_compiled_parts():
    model = nn.Sequential(Layer(), Layer())
    assert "Nothing" in str(healpass.status(model))
    model[1].compile(backend="heal")
    before = healpass.status(model)
    assert [(e.name, e.graphs) for e in before.entries] == [("1", 0)]
    assert not before.whole
    model(X)
    after = healpass.status(model)
    assert [(e.name, e.graphs, e.rewritten, e.kept) for e in after.entries] == [("1", 1, 1, 0)]
    assert after.whole
    assert "<pre>" in after._repr_html_()
    assert after.to_dict()["entries"][0]["precision"] == "heal"


OF_TORCH = {
    "Linear": nn.Linear(8, 8),
    "Sequential": nn.Sequential(nn.Linear(8, 8), nn.ReLU()),
    "TransformerEncoderLayer": nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
}


@pytest.mark.parametrize("name", OF_TORCH)
def test_a_class_of_torchs_own_that_torch_never_compiles_is_told_of(name):
    """`Module.compile` reaches no frame that Dynamo traces; `torch.compile(module)` does."""
    model, x = OF_TORCH[name], torch.randn(2, 3, 8)
    model.compile(backend=plain_backend(HealConfig()))
    model(x)
    found = healpass.status(model)
    assert not found.whole
    assert [(e.graphs, len(e.uncompiled)) for e in found.entries] == [(0, 1)]
    assert "Use model = torch.compile(model, backend='heal')" in found.uncompiled[0].reason
    compiled = torch.compile(model, backend=plain_backend(HealConfig()))
    compiled(x)
    assert healpass.status(compiled).entries[0].graphs == 1


def test_our_own_limit_is_passed_where_torch_takes_one():
    assert set(watch.compile_limits()) <= {"recompile_limit"}
    if "recompile_limit" in torch.compile.__kwdefaults__:
        assert watch.compile_limits()["recompile_limit"] == watch.RECOMPILE_LIMIT
