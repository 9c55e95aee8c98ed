"""Tasks: the record, the loader's errors, and answers read from awkward replies."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from healpass.errors import HealError, TaskError
from healpass.study.plan.replies import read_letter
from healpass.study.plan.tasks import SUITE, Task, load, read_answer, score

MONEY = Task(
    id="money", kind="number", question="How much?", answer="1234.50", tolerance="0.01", unit="USD"
)
RATE = dataclasses.replace(MONEY, id="rate", answer="7.5", unit="percent")
RATIO = dataclasses.replace(MONEY, id="ratio", answer="0.5", unit="", tolerance="0")
CHOICE = Task(
    id="choice",
    kind="choice",
    question="Which?",
    answer="B",
    options=("0 USD", "5000 USD", "Never", "On Monday"),
)
LABEL = Task(
    id="label", kind="label", question="Is it?", answer="allowed", options=("allowed", "forbidden")
)


@pytest.mark.parametrize(
    "reply",
    [
        "Answer: 1234.50",
        "Answer: 1,234.50 USD",
        "Answer: $1,234.5",
        "Answer: USD1,234.50.",
        "answer : 1.234,50 EUR",
        "Answer: 1'234.50",
        "Answer: 1\N{NARROW NO-BREAK SPACE}234.50",
        "**Answer:** **$1,234.50**",
        "**Answer**: 1234.50",
        "Answer:\n\n1234.50",
        "Answer (in USD): 1234.50",
        "Answer:\n$$\n1234.50\n$$",
        "Answer:\n\\[ 1234.50 \\]",
        "The answer is **1234.50**.",
        "The final answer is: $1234.50$",
        "So we get \\boxed{1234.50}",
        "Answer: $\\boxed{\\$1{,}234.50}$",
        "\\boxed{\\text{USD } 1\\,234.50}",
        "\\boxed{\\frac{2469}{2}}",
        "Answer: 1.2345 \\times 10^{3}",
        "Answer: 1.2345e3",
        "Answer: 1.2345 thousand USD",
        "Answer: 1000 + 234.50 = 1234.50 USD",
        "Answer: 1234.504, rounded 1234.50",
        "First 500, then 734.50; in total 1,234.50",
        "Answer: 7\nNo, that was wrong.\nAnswer: 1234.50",
        "Answer: 1234.50\nAnswer:",
        "<think>Answer: 99</think>Answer: 1234.50",
        "Answer: 99</think>\nAnswer: 1234.50",
        "I can't see a chart, but Answer: 1234.50",
    ],
)
def test_an_amount_is_read_in_every_spelling(reply):
    assert score(MONEY, reply).correct, read_answer(MONEY, reply)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        " \n\t",
        "Answer:",
        "I'm sorry, but I can't help with 1234.50 USD.",
        "As of 2024 I cannot provide financial advice.",
        "Answer: cannot be determined",
        "<think>So it is 1234.50. Answer: 1234.50",
        "Answer: 1000 to 1234.50",
        "Answer: 1234.50-1300",
        "It is 1000 or 1234.50",
        "Answer: 1.2.3",
        "Answer: 5/0",
        "no number at all",
    ],
)
def test_no_answer_is_read_where_there_is_none(reply):
    assert score(MONEY, reply).answer is None
    assert not score(MONEY, reply).correct


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("Answer: -1,234.50", "-1234.5"),
        ("Answer: -$1234.50", "-1234.5"),
        ("Answer: $-1234.50", "-1234.5"),
        ("Answer: \N{MINUS SIGN}5", "-5"),
        ("Answer: 1,234,567", "1234567"),
        ("Answer: 1.234.567", "1234567"),
        ("Answer: 1.234.567,89", "1234567.89"),
        ("Answer: 1,234", "1234"),
        ("Answer: 0,125", "0.125"),
        ("Answer: 12,5", "12.5"),
        ("Answer: .5", "0.5"),
        ("Answer: 22.95 million EUR", "22950000"),
        ("Answer: 12345.678", "12345.678"),
        ("H2O and Q4 and 17", "17"),
    ],
)
def test_a_number_has_one_spelling(reply, value):
    assert score(MONEY, reply).answer == value
    assert not score(MONEY, reply).correct


@pytest.mark.parametrize(
    "reply",
    ["Answer: 7.5", "Answer: 7.5%", "Answer: 7.50 percent", "\\boxed{7.5\\%}", "7.5 per cent"],
)
def test_percent_is_the_unit_where_the_task_says_so(reply):
    assert score(RATE, reply).correct
    assert not score(RATE, "Answer: 0.075").correct


@pytest.mark.parametrize("reply", ["Answer: 50%", "Answer: 1/2", "Answer: 0.50", "\\boxed{.5}"])
def test_a_ratio_may_be_given_in_percent_or_as_a_fraction(reply):
    assert score(RATIO, reply).correct


@given(cents=st.integers(-(10**12), 10**12))
def test_a_printed_amount_is_read_back(cents):
    value = Decimal(cents) / 100
    task = dataclasses.replace(MONEY, answer=f"{value:f}", tolerance="0")
    for spelling in (f"{value:.2f}", f"{value:,.2f}", f"$ {value:,.2f}", f"{value:,.2f} USD."):
        assert score(task, f"It is 7.\nAnswer: {spelling}").correct, spelling


@given(off=st.decimals(-1, 1, places=4))
def test_the_tolerance_is_included_and_no_more(off):
    reply = f"Answer: {Decimal(MONEY.answer) + off}"
    assert score(MONEY, reply).correct == (abs(off) <= Decimal(MONEY.tolerance))


PIECES = (
    "Answer:", "answer is", "\\boxed{", "{", "}", "\\frac", "-", ".", ",", "/", "%", "A", "B", "0",
    "1e99", "10^", "<think>", "</think>", "\n", " ", "allowed", "not", "million", "\u00b2",
    "\u0663",
)  # fmt: skip
LOOPS = (*PIECES, "Answer: ", "\\boxed{1", "\\frac{1}", "A or ", "1,", "1 - ")


@given(reply=st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join)))
def test_no_reply_makes_the_scorer_fail(reply):
    for task in (MONEY, RATE, RATIO, CHOICE, LABEL):
        found = score(task, reply)
        assert found.answer is not None or not found.correct


@pytest.mark.parametrize(
    "piece", [*PIECES, "Answer: ", "\\boxed{1", "\\frac{1}", "A or ", "1,", "1 - "]
)
def test_a_model_that_repeats_itself_is_scored_in_no_time(piece):
    """A small model may loop until its last token; time must not grow with the square."""
    reply = piece * 20_000
    started = time.process_time()
    for task in (MONEY, CHOICE, LABEL):
        score(task, reply)
    assert time.process_time() - started < 5


def test_an_answer_is_read_once_and_spelled_the_same_ever_after():
    for reply in ("Answer: 1,234.50", "\\boxed{\\frac{1}{3}}", "Answer: 2.5e-7"):
        once = read_answer(MONEY, reply)
        assert once is not None
        assert read_answer(MONEY, f"Answer: {once}") == once


@pytest.mark.parametrize(
    "reply",
    [
        "B",
        "b",
        "(B)",
        "Answer: B",
        "Answer: b.",
        "Answer: **B**",
        "Answer: (B) 5000 USD",
        "Answer: B) 5000 USD",
        "Answer: Option B, not A",
        "A loan is not a gift, so the answer is B.",
        "\\boxed{\\text{B}}",
        "$\\boxed{\\mathrm{B}}$",
        "Answer: 5000 USD",
        "Only B fits.",
        "A prepaid part is left: B.",
    ],
)
def test_a_choice_is_read(reply):
    assert score(CHOICE, reply).correct, read_answer(CHOICE, reply)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "Answer: A or B",
        "Answer: A/B",
        "Either A or B",
        "Answer: E",
        "BAD",
        "I cannot answer.",
        "Answer: none",
    ],
)
def test_no_choice_is_read_where_none_is_made(reply):
    assert score(CHOICE, reply).answer is None


def test_a_is_an_answer_and_an_article():
    assert read_letter("A is right", CHOICE.options) == "A"
    assert read_letter("A friend asks", CHOICE.options) is None


@pytest.mark.parametrize(
    "reply",
    [
        "allowed",
        "It is allowed.",
        "Answer: Allowed.",
        "**Answer:** `ALLOWED`",
        "\\boxed{\\text{allowed}}",
        "First forbidden.\nAnswer: allowed",
        "Answer: allowed, as it is not forbidden",
    ],
)
def test_a_label_is_read_and_spelled_as_in_the_task(reply):
    assert score(LABEL, reply).correct, read_answer(LABEL, reply)


@pytest.mark.parametrize(
    "reply", ["", "Answer: not allowed", "It isn't allowed", "allowed or forbidden", "disallowed"]
)
def test_a_negated_label_is_no_label(reply):
    assert score(LABEL, reply).answer is None


@pytest.mark.parametrize("task", load(), ids=lambda task: task.id)
def test_the_suite_accepts_its_own_answers_and_no_wrong_option(task):
    assert score(task, f"Let me see: 3, 4.\nAnswer: {task.answer}").correct
    for wrong in task.options:
        letter = "ABCD"[task.options.index(wrong)]
        other = letter if task.kind == "choice" else wrong
        assert score(task, f"Answer: {other}").correct == (other == task.answer)
        if task.kind == "choice":
            assert score(task, f"Answer: {letter}) {wrong}").answer == letter
            assert score(task, f"Answer: {wrong}").answer == letter


def test_the_prompt_says_options_form_unit_and_tolerance():
    assert MONEY.prompt.startswith(MONEY.question)
    assert "in USD" in MONEY.prompt
    assert "Within 0.01 " in MONEY.prompt
    assert "exact" in RATIO.prompt
    assert "\nB) 5000 USD\n" in CHOICE.prompt
    assert "allowed, forbidden" in LABEL.prompt


GOOD = {"id": "a", "kind": "number", "question": "2 + 2?", "answer": 4, "tolerance": 0}
GOOD_CHOICE = {
    "id": "b", "kind": "choice", "question": "Which?", "answer": "A", "options": ["x", "y"]
}  # fmt: skip


def written(tmp_path, *records):
    path = tmp_path / "mine.jsonl"
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines))
    return path


def test_a_file_is_read_and_its_decimals_are_not_rounded(tmp_path):
    long = "0.1000000000000000000000001"
    line = json.dumps(GOOD | {"id": "c"}).replace('"answer": 4', f'"answer": {long}')
    number, choice, exact = load(written(tmp_path, GOOD, "", GOOD_CHOICE, "  ", line, ""))
    assert (number.answer, number.domain, choice.options) == ("4", "other", ("x", "y"))
    assert exact.answer == long


def test_line_ends_marks_and_separators_of_other_systems_are_read(tmp_path):
    path = tmp_path / "windows.jsonl"
    line = json.dumps(GOOD | {"question": "a\u2028b"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n")
    assert load(str(path))[0].question == "a\u2028b"


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"kind": "numbers"}, "kind", "Did you mean 'number'"),
        ({"answr": "4"}, "answr", "Did you mean 'answer'"),
        ({"question": None}, "question", "text is needed"),
        ({"question": " "}, "question", "is empty"),
        ({"id": ""}, "id", "is empty"),
        ({"answer": "about 4"}, "answer", "plain decimal"),
        ({"answer": "1,000"}, "answer", "plain decimal"),
        ({"answer": True}, "answer", "text is needed"),
        ({"answer": float("nan")}, "answer", "'NaN'"),
        ({"answer": 1e300}, "answer", "plain decimal"),
        ({"tolerance": ""}, "tolerance", "plain decimal"),
        ({"tolerance": "-0.1"}, "tolerance", "negative"),
        ({"options": ["x", "y"]}, "options", "given for a number"),
        ({"options": "x"}, "options", "list of texts"),
        ({"quantities": {"a": "x"}}, "quantities", "plain decimals"),
        ({"quantities": [1]}, "quantities", "plain decimals"),
        (GOOD_CHOICE | {"answer": "C", "tolerance": ""}, "answer", "not one of A, B"),
        (GOOD_CHOICE | {"tolerance": "0"}, "tolerance", "without a number"),
        (GOOD_CHOICE | {"options": ["x", "X"], "tolerance": ""}, "options", "different"),
        (GOOD_CHOICE | {"options": ["x"], "tolerance": ""}, "options", "2 to 26"),
        (GOOD_CHOICE | {"kind": "label", "tolerance": ""}, "answer", "not one of x, y"),
    ],
)
def test_an_error_names_file_line_and_field(tmp_path, change, field, words):
    path = written(tmp_path, GOOD | {"id": "first"}, "", GOOD | change)
    with pytest.raises(TaskError) as error:
        load(path)
    first_line = str(error.value).splitlines()[0]
    assert first_line.startswith(f"{path}, line 3: field {field!r} ")
    assert words in first_line


@pytest.mark.parametrize("field", ["id", "kind", "question", "answer"])
def test_a_missing_field_is_named(tmp_path, field):
    record = {name: value for name, value in GOOD.items() if name != field}
    with pytest.raises(TaskError, match=f"line 1: field '{field}' is missing"):
        load(written(tmp_path, record))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "found a list"),
        ("[" * 100_000, "not"),
        ('{"id": "a", "id": "b"}', "field 'id' stands there twice"),
    ],
)
def test_a_line_that_is_no_object_is_named(tmp_path, line, words):
    with pytest.raises(TaskError, match=f"mine.jsonl, line 2: .*{words}"):
        load(written(tmp_path, GOOD, line))


def test_a_repeated_id_names_both_lines(tmp_path):
    with pytest.raises(TaskError, match="line 3: field 'id' is 'a', as in line 1"):
        load(written(tmp_path, GOOD, GOOD_CHOICE, GOOD))


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(TaskError, match="No such file"):
        load(tmp_path / "missing.jsonl")
    with pytest.raises(TaskError, match=SUITE):
        load(tmp_path)
    with pytest.raises(HealError, match="has no task"):
        load(written(tmp_path, "", " "))
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe9"}')
    with pytest.raises(TaskError, match=r"line 1: not UTF-8"):
        load(tmp_path / "latin.jsonl")


def test_a_task_is_frozen_and_hashable():
    assert len({*load(), *load()}) == len(load())
    with pytest.raises(dataclasses.FrozenInstanceError):
        MONEY.answer = "1"


def test_the_tasks_are_read_without_loading_transformers():
    code = (
        "import sys\nfrom healpass.study.plan.tasks import load\n"
        "load()\nprint('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
