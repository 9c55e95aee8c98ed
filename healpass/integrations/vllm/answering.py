"""One engine of vLLM that answers prompts, and what happened in it. Imports vLLM.

    python -m healpass.integrations.vllm.answering ASKED.json FOUND.json

`checking` starts it in a process of its own, with the engine in that process: what happened is
read off the scheduler after each step.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

from healpass.errors import UnavailableError
from healpass.integrations.vllm import engine_args
from healpass.integrations.vllm.checking import (
    Answer,
    Arrivals,
    Asked,
    Events,
    answer_in_this_process,
)


def engine(asked: Asked) -> LLM:
    """The engine, which takes token ids and gives them back.

    Args:
        asked: What it has to be.
    """
    common = {"skip_tokenizer_init": True, "seed": 0} | asked.engine
    if asked.options is None:
        return LLM(model=asked.model, enforce_eager=not asked.compiled, **common)
    given = engine_args(asked.model, compiled=asked.compiled, engine=common, **asked.options)
    return LLM(**given)


class Watched:
    """An engine, step by step.

    Attributes:
        llm: The engine.
        at_once: The most requests in one step.
        cut: Requests seen with a part of their prompt computed.
        cached: Tokens that each request found in the cache.
        preempted: How often each request lost its pages.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm, self.engine = llm, llm.llm_engine
        self.scheduler: Any = self.engine.engine_core.engine_core.scheduler
        self.forget()

    def forget(self) -> None:
        """Count anew."""
        self.at_once = 0
        self.cut: set[str] = set()
        self.cached: dict[str, int] = {}
        self.preempted: dict[str, int] = {}

    def answers(self, asked: Asked) -> list[Answer]:
        """Answer all prompts, one request each.

        Args:
            asked: The prompts, and when they arrive.
        """
        wanted = SamplingParams(
            temperature=0, max_tokens=asked.new_tokens, logprobs=0, ignore_eos=True,
            detokenize=False,
        )  # fmt: skip
        done: dict[int, Answer] = {}
        waiting, step = list(enumerate(asked.prompts)), 0
        while len(done) < len(asked.prompts):
            running = len(asked.prompts) - len(waiting) - len(done)
            for number, prompt in waiting[: self._due(asked.arrivals, step, running)]:
                tokens = TokensPrompt(prompt_token_ids=list(prompt))
                self.engine.add_request(str(number), tokens, wanted)
                waiting.remove((number, prompt))
            for output in self.engine.step():
                self.cached[output.request_id] = output.num_cached_tokens or 0
                if output.finished:
                    done[int(output.request_id.split("-")[0])] = _answer(output)
            self._look()
            step += 1
        return [done[number] for number in range(len(asked.prompts))]

    def _due(self, arrivals: Arrivals, step: int, running: int) -> int | None:
        """How many requests come now; None for all."""
        if arrivals == "together":
            return None
        if arrivals == "staggered":
            return 1 - step % 2
        if running:
            return 0
        if not self.llm.reset_prefix_cache():
            raise UnavailableError(
                "vLLM does not empty its cache between requests, which a lonely answer needs.\n"
                "Leave kv_transfer_config out."
            )
        return 1

    def _look(self) -> None:
        self.at_once = max(self.at_once, len(self.scheduler.running))
        for name, request in self.scheduler.requests.items():
            self.preempted[name] = request.num_preemptions
            if 0 < request.num_computed_tokens < request.num_prompt_tokens:
                self.cut.add(name)

    @property
    def events(self) -> Events:
        """What happened."""
        size = self.engine.vllm_config.cache_config.block_size
        cached, preemptions = sum(self.cached.values()), sum(self.preempted.values())
        return Events(self.at_once, len(self.cut), cached, preemptions, size)


def _answer(output: Any) -> Answer:
    (completion,) = output.outputs
    tokens = tuple(completion.token_ids)
    ranked = zip(completion.logprobs, tokens, strict=True)
    return Answer(tokens, tuple(found[token].logprob for found, token in ranked))


def answer(given: dict[str, Any]) -> dict[str, Any]:
    """Answers and events, as JSON knows them.

    Args:
        given: Fields of `Asked`.
    """
    asked = Asked(**given)
    watched = Watched(engine(asked))
    for _ in range(asked.rounds):
        watched.forget()
        found = watched.answers(asked)
    return {"answers": [asdict(one) for one in found], "events": asdict(watched.events)}


if __name__ == "__main__":
    answer_in_this_process(answer, sys.argv[1:])
