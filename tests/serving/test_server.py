"""`vllm serve`: clients that leave in mid-answer, and a server killed and started again.

The others' tokens and log-probabilities, as the API gives them, are those of a lonely request to
an engine in this process, to the last bit.
"""

from __future__ import annotations

import pytest

from healpass.integrations.vllm import command_line
from tests.support.engines import Engine, prompts
from tests.support.servers import save_with_tokenizer, serving

GIVEN = prompts()[3:11]
SIZES = ["--max-model-len", "256", "--max-num-seqs", "16"]
DRAWN = {"temperature": 0.9, "top_p": 0.9}
#: Every other request is seeded.
HOW = [DRAWN | {"seed": 100 + n} if n % 2 else {} for n in range(len(GIVEN))]
#: So many tokens take longer than the others' answers.
LONG = 150


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_with_tokenizer("llama", tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def lonely(model):
    with Engine(model) as greedy:
        answers = greedy.alone(GIVEN)
    with Engine(model, sampling=DRAWN) as seeded:
        drawn = seeded.alone(GIVEN)
    return [drawn[n] if how else answers[n] for n, how in enumerate(HOW)]


def among_leavers(server):
    """What those hear that stay; meanwhile three clients leave, and one asks and goes at once."""
    leavers = [server.streaming(prompt, LONG) for prompt in GIVEN[:3]]
    silent = server.sent(GIVEN[4], {"max_tokens": LONG})
    heard = server.together(GIVEN, HOW)
    for leaver in leavers:
        leaver.close()
    silent.close()
    return heard


def test_those_who_stay_hear_their_lonely_answers(model, lonely, tmp_path):
    words = [*command_line(model, precision="exact", compiled=False), *SIZES]
    with serving(words, tmp_path / "first.log") as server:
        assert server.alone(GIVEN, HOW) == lonely
        assert among_leavers(server) == lonely
        assert server.together(GIVEN, HOW) == lonely  # while the leavers' requests are aborted
        server.rest()
        finished = server.counted("vllm:request_success_total")
        unfinished = server.streaming(GIVEN[0], LONG)  # and the server is killed
    unfinished.close()
    print(f"{finished} requests finished")
    assert finished == 3 * len(GIVEN)  # none of those whose clients left
    with serving(words, tmp_path / "second.log") as server:
        assert server.together(GIVEN, HOW) == lonely
        assert server.answers(GIVEN[::2]) == lonely[::2]


def test_plain_vllm_answers_otherwise(model, tmp_path):
    """The inverse: its BF16 has other bits alone and in a batch."""
    words = ["vllm", "serve", model, "--dtype", "bfloat16", "--enforce-eager", *SIZES]
    with serving(words, tmp_path / "plain.log") as server:
        alone = server.alone(prompts(), [{}] * len(prompts()))
        assert server.answers(prompts()) != alone
