"""Loads of an engine: requests that arrive, are aborted and ask for this and that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.inputs import TokensPrompt

from tests.support.engines import VOCABULARY, Engine

#: Tokens of the longest prompt, and of the longest answer.
LONGEST, MOST = 90, 6
#: Prompts are the beginnings of so many texts, so that some of them share pages.
TEXTS = torch.randint(0, VOCABULARY, (8, LONGEST), generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        text: Which of `TEXTS` it begins.
        length: How many of its tokens.
        new: How many tokens it asks for.
        seed: Of its draws; None for a greedy one.
        scored: Whether it asks for its prompt's log-probabilities, too.
        arrives: At which step of the engine.
        stays: How many steps until it is aborted; None to let it finish.
    """

    text: int
    length: int
    new: int
    seed: int | None
    scored: bool
    arrives: int
    stays: int | None

    @property
    def prompt(self) -> TokensPrompt:
        """Its tokens."""
        return TokensPrompt(prompt_token_ids=TEXTS[self.text, : self.length].tolist())

    @property
    def asked(self) -> SamplingParams:
        """How it is sampled."""
        drawn = {} if self.seed is None else {"temperature": 0.9, "top_p": 0.9, "seed": self.seed}
        return SamplingParams(
            **{"temperature": 0} | drawn,
            max_tokens=self.new,
            logprobs=0,
            prompt_logprobs=0 if self.scored else None,
            ignore_eos=True,
            detokenize=False,
        )


def loads(count: int, seeded: bool) -> st.SearchStrategy[list[Request]]:
    """Loads of `count` requests, of which about one in six is aborted; some seeded, or none."""
    request = st.builds(
        Request,
        text=st.integers(0, len(TEXTS) - 1),
        length=st.integers(1, LONGEST),
        new=st.integers(1, MOST),
        seed=st.none() | st.integers(0, 2**63 - 1) if seeded else st.none(),
        scored=st.booleans(),
        arrives=st.integers(0, 40),
        stays=st.sampled_from([None, None, None, None, None, 3]),
    )
    return st.lists(request, min_size=count, max_size=count)


@dataclass
class Heard:
    """What an engine has said to a request.

    Attributes:
        tokens: Of the answer.
        scores: Their log-probabilities.
        prompt: The prompt's, where it was asked for and is finished.
        finished: Whether it was answered to the end.
    """

    tokens: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    prompt: tuple[float, ...] = ()
    finished: bool = False

    @classmethod
    def of(cls, output: Any) -> Heard:
        """What a `RequestOutput` says."""
        (completion,) = output.outputs
        given = zip(output.prompt_logprobs or [], output.prompt_token_ids, strict=False)
        said = zip(completion.logprobs, completion.token_ids, strict=True)
        return cls(
            tuple(completion.token_ids),
            tuple(ranked[token].logprob for ranked, token in said),
            tuple(ranked[token].logprob for ranked, token in given if ranked is not None),
            output.finished,
        )

    def begins(self, whole: Heard) -> bool:
        """Whether it is what `whole` is, as far as it goes."""
        count = len(self.tokens)
        same = (self.tokens, self.scores) == (whole.tokens[:count], whole.scores[:count])
        return same and self.prompt in ((), whole.prompt)


def alone(engine: Engine, load: Sequence[Request]) -> list[Heard]:
    """What each request is answered alone, to the end, from an empty cache."""
    known: dict[Request, Heard] = {}
    for request in (replace(request, arrives=0, stays=None) for request in load):
        if request not in known:
            assert engine.llm.reset_prefix_cache()
            (output,) = engine.llm.generate([request.prompt], [request.asked], use_tqdm=False)
            known[request] = Heard.of(output)
    return [known[replace(request, arrives=0, stays=None)] for request in load]


def together(engine: Engine, load: Sequence[Request]) -> list[Heard]:
    """What the requests hear that come and go as the load says, from an empty cache."""
    assert engine.llm.reset_prefix_cache()
    core, heard, step = engine.llm.llm_engine, [Heard() for _ in load], 0
    last = max(request.arrives for request in load)
    while step <= last or core.has_unfinished_requests():
        for number, request in enumerate(load):
            if request.arrives == step:
                core.add_request(str(number), request.prompt, request.asked)
            if request.stays is not None and request.arrives + request.stays == step:
                core.abort_request([str(number)])
        for output in core.step():
            heard[int(output.request_id.split("-")[0])] = Heard.of(output)
        step += 1
    return heard
