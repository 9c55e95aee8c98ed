"""The flip rate foretold from margins, against flips counted on SmolLM2: the study's law holds."""

import pytest

from healpass.integrations.checkpoint import Checkpoint
from healpass.study.judge.flip_rate import measured_flip_rate, predict_flip_rate
from healpass.study.plan import tasks
from healpass.study.plan.configuration import Configuration, Unit
from healpass.study.run.networks import build, strict_dynamo
from healpass.study.run.score import Text, margins, score

CHECKPOINT = Checkpoint("smollm2-135m")


def texts():
    """Each task of the suite with its answer's reason: text that somebody wrote."""
    tokenizer = CHECKPOINT.tokenizer()
    written = [f"{task.prompt}\n{task.justification}" for task in tasks.load()]
    ids = [tokenizer(text)["input_ids"] for text in written]
    return [Text((first,), tuple(rest)) for first, *rest in ids]


def scored(configuration, found, references=None):
    model = build(CHECKPOINT, Unit("forced", configuration)).model
    scores = []
    for start in range(0, len(found), configuration.batch_size):
        part = slice(start, start + configuration.batch_size)
        scores += score(
            model, found[part], padding_id=0, references=references and references[part]
        )
    return scores


@pytest.mark.deep
@pytest.mark.model
@pytest.mark.timeout(3600)
def test_counted_flips_of_bf16_lie_where_margins_foretell_them():
    found = texts()
    assert sum(len(text.answer) for text in found) >= 5_000
    with strict_dynamo():
        reference = scored(Configuration(precision="bf16"), found)
        reordered = Configuration(precision="bf16", order=1, batch_size=8)
        other = scored(reordered, found, reference)
    by_prompt = [margins(a, b) for a, b in zip(reference, other, strict=True)]
    prediction, counted = predict_flip_rate(by_prompt), measured_flip_rate(by_prompt)
    low, high = prediction.measured_interval(prediction.tokens)
    print(f"{prediction.tokens} tokens: {counted:.4f} flips each, foretold {prediction.rate:.4f}")
    print(f"interval of the rate {prediction.interval}, of the count {(low, high)}")
    assert low <= counted <= high
    assert prediction.interval[1] <= 2 * prediction.interval[0]
