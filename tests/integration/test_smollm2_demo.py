"""The demo's own arithmetic and its table, on answers made by hand; and the one-line example."""

import io

import pytest
from rich.console import Console

from tests.support.examples import load_example


@pytest.fixture(scope="module")
def demo():
    return load_example("generate_reproducibly")


@pytest.mark.parametrize(
    ("answers", "position"),
    [
        ([[1, 2, 3], [1, 2, 3]], None),
        ([[1, 2, 3], [1, 2, 4]], 3),
        ([[5], [6], [5]], 1),
        ([[1, 2], [1, 2, 3]], 3),
        ([[], []], None),
    ],
)
def test_the_first_divergence_is_found(demo, answers, position):
    assert demo.first_divergence(answers) == position


def test_an_answer_ends_at_its_end_token(demo):
    assert demo.until_end([4, 2, 2, 2], 2) == [4, 2]
    assert demo.until_end([4, 5], 2) == [4, 5]


def test_the_table_counts_prompts_with_one_answer(demo):
    same = {size: [[1, 2], [3, 4]] for size in demo.BATCH_SIZES}
    other = same | {8: [[1, 2], [3, 9]]}
    out = io.StringIO()
    Console(file=out, width=120).print(demo.results(dict(enumerate([other, same, other]))))
    rows = [line for line in out.getvalue().splitlines() if " of 2" in line]
    assert ["1 of 2" in row for row in rows] == [True, False, True]
    assert "token 2 (median 2)" in rows[0]


def test_too_many_prompts_are_refused(demo, capsys):
    with pytest.raises(SystemExit):
        demo.main(["--prompts", "99"])
    assert "2 to 16" in capsys.readouterr().err


def test_the_one_line_example_shows_fp32_accuracy(capsys):
    load_example("one_line").main()
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    plain, healed = float(rows["BF16"][0]), float(rows["heal"][0])
    # A rounding to BF16 is 2**16 roundings to FP32; the BF16 network makes at least one.
    assert healed * 2**8 < plain
