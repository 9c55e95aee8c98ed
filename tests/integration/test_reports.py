"""Seven public reports: each fails in BF16, is within a bound in heal, and is gone in exact.

The models run rewritten, by plain torch: Inductor has tests of its own, and takes minutes here.
"""

import copy

import pytest
import torch

from healpass import HealConfig
from healpass.integrations import smollm2
from healpass.integrations.transformers import heal_model
from tests.support.against_torch import U
from tests.support.examples import load_example
from tests.support.rewriting import Rewritten

pytestmark = pytest.mark.model
NEW_TOKENS = 8


example = load_example("reported_issues")


@pytest.fixture(scope="module")
def loaded():
    """Two layers of SmolLM2 with a vocabulary of 2,000, and the tokenizer."""
    return smollm2.load(layers=2, vocabulary=2000)


def subject_of(loaded, way):
    """A copy of the model set up in one way; the graphs are rewritten, and run by torch."""
    model, tokenizer = copy.deepcopy(loaded[0]), loaded[1]
    if way.options is None:
        return example.Subject(model, tokenizer, torch.matmul, NEW_TOKENS)
    config = HealConfig(**way.options, outputs="fp32")
    rewritten = Rewritten(torch.matmul, config)
    heal_model(model, **way.options).compile(backend=rewritten._backend, dynamic=True)
    return example.Subject(model, tokenizer, rewritten, NEW_TOKENS)


@pytest.fixture(scope="module")
def observed(loaded):
    """Way -> what each report observes."""
    results = {}
    # Not by monkeypatch: it ends with a delattr, which hides an option of torch's for good.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for way in example.WAYS:
            torch._dynamo.reset()
            results[way.name] = example.observations(subject_of(loaded, way))
    return results


def logit_bound(model, tokenizer):
    """How far two runs of heal may differ: each is as near FP64 as twice FP32's own distance.

    `|heal - exact| <= 2 |fp32 - exact| + 4u |exact|` (see `against_torch`), once for either run.
    """
    ids = tokenizer(example.PROMPTS[3], return_tensors="pt").input_ids
    wide, exact = (
        copy.deepcopy(model).to(dtype)(ids).logits for dtype in (torch.float32, torch.float64)
    )
    one = 2 * float((wide - exact).abs().max()) + 4 * U * float(exact.abs().max())
    return 2 * one


def matmul_bound():
    """Two FP32-equivalent products of K terms: `2 K u` of the sum of magnitudes, for either."""
    row, matrix = example.matmul_operands()
    magnitude = float((row.double().abs() @ matrix.double().abs()).max())
    return 2 * 2 * row.shape[1] * U * magnitude


@pytest.fixture(scope="module")
def bounds(loaded):
    """Unit of a report -> what heal may observe. A word may not change at all."""
    logits = logit_bound(*loaded)
    longest = max(len(loaded[1](prompt).input_ids) for prompt in example.PROMPTS)
    # A log-softmax moves by at most twice its logits, for each token scored.
    return {
        "logits": logits,
        "log-likelihood": 2 * logits * (longest - 1),
        "product": matmul_bound(),
        "texts": 0.0,
    }


@pytest.mark.parametrize("index", range(len(example.REPORTS)))
def test_a_report(index, observed, bounds):
    report = example.REPORTS[index]
    plain, healed, exact = (observed[way.name][index] for way in example.WAYS)
    bound = bounds[report.unit]
    ratio = healed / bound if bound else healed
    print(f"{report.issue}: BF16 {plain:.3g}, heal {healed:.3g}, observed/bound {ratio:.3f}")
    assert plain > bound, "the inverse: BF16 shows what was reported"
    assert healed <= bound
    assert exact == 0


def test_the_table_names_every_report(observed):
    table = example.table_of(observed)
    assert table.row_count == len(example.REPORTS)
    assert [column.header for column in table.columns][3:] == ["BF16", "heal", "exact"]
