"""An answer of vLLM has the bits of the same model under `heal_model` in transformers."""

from __future__ import annotations

import pytest
import torch

from healpass.integrations.transformers import heal_model
from tests.support.engines import MODELS, NEW, Engine, make_model, prompts, save_model

GIVEN = prompts()[5:9]


@pytest.mark.parametrize("family", list(MODELS))
def test_teacher_forced_log_probabilities_are_the_rollouts(tmp_path, family):
    """The importance ratio of a rollout is exactly 1: the log-probabilities are equal."""
    with Engine(save_model(family, tmp_path)) as engine:
        answers = engine.together(GIVEN)
    model = heal_model(make_model(family), precision="exact")
    for prompt, (tokens, log_probabilities) in zip(GIVEN, answers, strict=True):
        ids = torch.tensor([prompt + list(tokens)])
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        rows = torch.ops.heal.log_softmax(logits, -1)
        expected = rows.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
        assert len(expected) == NEW
        assert list(log_probabilities) == expected
