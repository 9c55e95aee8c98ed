"""`healpass check --engine vllm`: every axis happens; `exact` has one answer, vLLM has not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from healpass.errors import UnavailableError
from healpass.integrations.vllm.checking import Asked, answers, check
from tests.support.engines import prompts, save_model

#: The prompt of 64 tokens fills its pages, so that its answer needs another.
GIVEN = [prompts()[number] for number in (0, 2, 3, 5, 6, 11)]


def asked(model, precision="exact"):
    options = None if precision is None else {"precision": precision}
    return Asked(model=model, options=options, prompts=GIVEN, new_tokens=10, compiled=False)


def test_exact_has_one_answer_on_every_axis(llama):
    rows = list(check(asked(llama)))
    for row in rows:
        print(f"{row.axis.name}: {row.events}, {row.equal} of {row.total}")
    assert [row.axis.name for row in rows if not row.holds] == []


def test_vllm_as_it_is_has_not(llama):
    """The inverse, on the first axis."""
    plain = replace(asked(llama, None), engine={"max_model_len": 256})
    alone, _ = answers(replace(plain, arrivals="alone"), "alone")
    together, events = answers(plain, "all at once")
    assert events.at_once == len(GIVEN)
    assert together != alone


def test_an_engine_that_is_refused_says_why(tmp_path):
    with pytest.raises(UnavailableError, match=r"vLLM with alone: .*CohereForCausalLM"):
        next(check(asked(save_model("cohere", tmp_path))))
