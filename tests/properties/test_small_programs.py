"""A page of small programs, as people write them: each within its derived bound of FP64.

`programs` holds them, `judging` derives the bounds, `compiling` the settings: dtype x static or
dynamic x no_grad or grad x precision x outputs, 72 of them. Each run of `make test` takes every
program once, in one of them, the settings going round, so that every combination of all factors
occurs; one program of eight goes through Inductor, the others through the rewritten graph and its
traced backward. `make test-deep` runs the full product, and every program through Inductor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import pytest
import torch

from healpass.config import HealConfig
from healpass.errors import GraphCheckError
from tests.programs import Program, page
from tests.support.compiling import (
    DTYPES,
    PRECISIONS,
    Setting,
    compiled,
    fitted,
    observed,
    refusal,
    runs_without_heal,
    settings,
)
from tests.support.evaluating import evaluate, in_dtype
from tests.support.judging import Judge, ideally
from tests.support.versions import AT_2_11

PAGE = page()
NAMES = [program.name for program in PAGE]
SETTINGS = settings()
#: One in so many goes through Inductor; prime to 72, so that these too meet every factor.
INDUCTOR_EVERY = 11


@dataclass(frozen=True)
class Known:
    """A fault that is known: the programs it hits must fail where `where` says so.

    Attributes:
        reason: What is wrong.
        where: In which settings.
    """

    reason: str
    where: Callable[[Setting], bool] = lambda setting: True


def _half(setting: Setting) -> bool:
    return setting.dtype != torch.float32


AUTOCAST = Known(
    "the gradient of an FP32 parameter passes through autocast's cast, which rounds it",
    lambda s: s.grads and not _half(s),
)

HOOK = Known(
    "torch 2.11 traces a hook as an autograd.Function, which keeps the dtype of its operands",
    lambda s: AT_2_11 and s.grads and _half(s),
)

#: Empty when all is well. A program that is listed here and passes fails the test.
KNOWN: dict[str, Known] = {
    "gradient_hook": HOOK,
    "autocast_inside": AUTOCAST,
    "autocast_with_an_island": AUTOCAST,
    "autocast_as_decorator": AUTOCAST,
}


def setting_of(position: int) -> Setting:
    """The one setting of a program in `make test`."""
    return fitted(SETTINGS[position % len(SETTINGS)], PAGE[position])


def judge(program: Program, setting: Setting, inductor: bool) -> None:
    """Assert that one run is within its bound, or refused with a reason and a way out."""
    known = KNOWN.get(program.name)
    if known is None or not known.where(setting):
        _judge(program, setting, inductor)
        return
    with pytest.raises(Exception):  # noqa: B017, PT011  each fault has its own
        _judge(program, setting, inductor)


def _judge(program: Program, setting: Setting, inductor: bool) -> None:
    try:
        ratio = observed(program, setting, compiled(program, setting, inductor))
    except AssertionError:
        raise
    except Exception as error:
        refused = refusal(error)
        if isinstance(refused, GraphCheckError):
            raise  # always a fault of healpass
        if refused is None and runs_without_heal(program, setting, inductor):
            raise
        assert refused is None or says_what_to_do(str(refused)), f"no way out: {refused}"
        print(f"{setting}: {refused or 'torch cannot compile it, either'}")
        return
    print(f"{setting}: observed/bound {ratio:.3f}")
    assert ratio <= 1, f"{program.name} in {setting} is {ratio:.3g} times its bound"


def says_what_to_do(message: str) -> bool:
    """Whether an error gives a reason and a way out: its first line is not all."""
    exits = ("Way out", "Use ", "use ", "Leave ", "leave ", "Give ", "instead")
    return len(message.split()) > 10 and any(word in message for word in exits)


@pytest.mark.parametrize("position", range(len(PAGE)), ids=NAMES)
def test_each_program_is_within_its_bound_or_refused(position):
    judge(PAGE[position], setting_of(position), position % INDUCTOR_EVERY == 0)


@pytest.mark.deep
@pytest.mark.timeout(14400)
@pytest.mark.parametrize("program", PAGE, ids=NAMES)
def test_each_program_in_every_setting(program):
    for setting in dict.fromkeys(fitted(setting, program) for setting in SETTINGS):
        torch._dynamo.reset()
        judge(program, setting, inductor=False)


@pytest.mark.deep
@pytest.mark.timeout(14400)
@pytest.mark.parametrize("position", range(len(PAGE)), ids=NAMES)
def test_each_program_through_inductor_in_each_precision(position):
    """With every pair of the other factors over the page."""
    for i, precision in enumerate(PRECISIONS):
        drawn = SETTINGS[(position + 24 * i) % len(SETTINGS)]
        setting = Setting(drawn.dtype, drawn.dynamic, drawn.grads, precision, drawn.outputs)
        torch._dynamo.reset()
        judge(PAGE[position], fitted(setting, PAGE[position]), inductor=True)


# ------------------------------------------------------------------------- the page and the bounds


def test_the_page_meets_every_combination_of_factors():
    assert len(set(NAMES)) == len(NAMES) >= 200
    met = {setting_of(position) for position in range(len(PAGE))}
    assert met == set(SETTINGS)
    through_inductor = [setting_of(i) for i in range(0, len(PAGE), INDUCTOR_EVERY)]
    for first, second in itertools.combinations(range(5), 2):
        wanted = {(factors(s)[first], factors(s)[second]) for s in SETTINGS}
        assert {(factors(s)[first], factors(s)[second]) for s in through_inductor} == wanted


def factors(setting: Setting) -> tuple:
    return tuple(vars(setting).values())


ARITHMETIC = [p for p in PAGE if not (p.exact or p.coarse or p.replay)]


@pytest.mark.parametrize("program", ARITHMETIC, ids=lambda p: p.name)
def test_plain_bf16_is_outside_the_bound_and_fp32_within(program):
    """The inverse: the budget tells 16-bit arithmetic from FP32, on both sides."""
    setting = fitted(Setting(torch.bfloat16, False, True, "heal", "fp32"), program)
    operands = program.operands(torch.bfloat16)
    bound = Judge.of(program, operands, setting.grads, setting.errors(program))
    with ideally(torch.float32):
        run = program.reference or program.run
        single = evaluate(run, in_dtype(operands, torch.float32), program, setting.grads)
    try:
        plain = bound.ratio(evaluate(program.run, operands, program, setting.grads))
    except NotImplementedError:  # eager torch has no kernel for BF16
        plain = float("inf")
    print(f"observed/bound: FP32 {bound.ratio(single):.3f}, BF16 {plain:.1f}")
    assert bound.ratio(single) <= 1 < plain


FAULTS = {
    "a graph that is left as traced": HealConfig(precision="traced"),
    "activations that are not promoted": HealConfig(debug={"disable": ("promote",)}),
}
CHAINS = ("gated_mlp", "self_attention_block", "rms_norm_by_hand", "preference_loss")


@pytest.mark.parametrize("config", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("name", CHAINS)
def test_a_fault_put_back_is_noticed(name, config, monkeypatch):
    program = PAGE[NAMES.index(name)]
    setting = Setting(torch.bfloat16, True, True, "heal", "traced")
    monkeypatch.setattr(Setting, "config", property(lambda self: config))
    with pytest.raises(AssertionError, match="times its bound"):
        judge(program, setting, inductor=False)


BF16_GRAD = Setting(torch.bfloat16, False, True, "heal", "traced")
DYNAMIC = Setting(torch.bfloat16, True, True, "heal", "traced")
MENDED = {  # what was found by this page: program, setting, what to put back, how it shows
    "gradients of one operand added in 16 bits": (
        *("pad_modes", BF16_GRAD, "healpass.graph.node_classes.trained", False),
        "times its bound",
    ),
    "a copy handed out in place of a view": (
        *("returns_views", BF16_GRAD, "healpass.graph.passes.promote.is_handed_out", False),
        "alias",
    ),
    "statistics of a batch norm lost": (
        *("batch_norm_train", BF16_GRAD, "healpass.graph.node_classes.running_statistics", []),
        "times its bound",
    ),
    "one size written in two ways": (
        *("relative_bias", DYNAMIC, "healpass.graph.verify.statically_known_true", False),
        "it claims",
    ),
}


@pytest.mark.parametrize(
    ("name", "setting", "target", "answer", "message"), MENDED.values(), ids=MENDED
)
def test_a_mended_fault_put_back_is_noticed(name, setting, target, answer, message):
    program = PAGE[NAMES.index(name)]
    with mock.patch(target, return_value=answer), pytest.raises(Exception, match=message):
        judge(program, setting, inductor=False)
    torch._dynamo.reset()
    judge(program, setting, inductor=False)


def test_a_listed_fault_that_is_mended_is_noticed(monkeypatch):
    monkeypatch.setitem(KNOWN, "residual", Known("nothing is wrong"))
    program = PAGE[NAMES.index("residual")]
    with pytest.raises(pytest.fail.Exception):
        judge(program, Setting(DTYPES[0], False, False, "heal"), inductor=False)
