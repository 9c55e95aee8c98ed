"""lm-evaluation-harness with HEAL: the models `heal-hf` and `heal-vllm`. Layer: integrations.

    python -m healpass.integrations.lm_eval run --model heal-hf \
        --model_args pretrained=HuggingFaceTB/SmolLM2-135M-Instruct,precision=exact \
        --tasks lambada_openai --batch_size 16

The module adds two names to the harness and hands over to its command line. In Python, importing
it adds them too. `heal-hf` is the harness's `hf` with a model that HEAL compiled: it takes the
arguments of `hf`, and the fields of `HealConfig` beside them. `heal-vllm` is the harness's `vllm`
in the same way (`vllm.harness`, imported when it is asked for).

For `heal-hf` the harness takes the log-softmax of the logits in torch, row by row, after the
model: in `exact` a score has the same bits for every batch size; from machine to machine that
softmax is torch's.

Imports `config` and `errors`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from healpass.config import Debug, HealConfig
from healpass.errors import missing_extra
from healpass.integrations.transformers import heal_model

try:
    from lm_eval.api.registry import model_registry, register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise missing_extra("healpass.integrations.lm_eval", "eval", error) from error

OPTIONS = frozenset(
    field.name for record in (HealConfig, Debug) for field in dataclasses.fields(record)
)


model_registry.register("heal-vllm", target="healpass.integrations.vllm.harness:HealVLLM")


@register_model("heal-hf")
class HealHFLM(HFLM):
    """The harness's Hugging Face model, compiled by HEAL.

    Args:
        pretrained: A model's name or folder, or a `PreTrainedModel`, which is compiled in place.
        **arguments: Fields of `HealConfig` and of `Debug`, as `precision="exact"`, and what `HFLM`
            takes.

    Raises:
        ConfigError: A field of `HealConfig` has a wrong value.
    """

    def __init__(self, pretrained: Any, **arguments: Any) -> None:
        options = {name: arguments.pop(name) for name in OPTIONS & arguments.keys()}
        HealConfig.read(options)  # before a model is loaded
        super().__init__(pretrained=pretrained, **arguments)
        heal_model(self.model, **options)


def main() -> None:
    """Run the harness's own command line, which now knows both names."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
