"""HEAL for transformers' Trainer and what derives from it (TRL). Layer: integrations.

`TrainingArguments(torch_compile_backend="heal")` cannot work: accelerate keeps a closed list of
backends, and raises. A callback needs no such list, and runs before the first step:

    Trainer(model=model, args=args, callbacks=[HealCallback()])

TRL's trainers score with an output head of their own, which no compiler reaches: the callback
warns of it, and `examples/grpo.py` shows the way out.

Imports `config` and `errors`.
"""

from __future__ import annotations

import inspect
import operator
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from healpass.config import HealConfig
from healpass.errors import ConfigError, StrictError, missing_extra
from healpass.integrations.transformers import heal_model, options_of

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise missing_extra("healpass.integrations.trainer", "hf", error) from error

#: Where `accelerate launch` leaves the name of its compiler.
DYNAMO = "ACCELERATE_DYNAMO_BACKEND"
#: Switches of torch that lower FP32 matmuls of the whole process.
SWITCHES = ("backends.fp32_precision", "backends.cuda.matmul.fp32_precision")
#: What a model's `forward` takes since TRL's `add_fused_lm_head`.
FUSED_HEAD = "fused_lm_head"


class HealCallback(TrainerCallback):
    """Compile the Trainer's model with HEAL: forward, backward, evaluation and generation.

    The model stays the object it was, so its state dict, checkpoints and saved files do not
    change, and they load without healpass. Gradient checkpointing, gradient accumulation,
    autocast (`bf16=True`) and PEFT adapters work as they do without it.

    Args:
        config: A `healpass.HealConfig` or a mapping of its fields, as for `heal_model`.
        **options: The fields by name.

    Raises:
        ConfigError: An option is wrong; or, when a Trainer is made, its arguments ask for another
            compiler or for TF32.
        StrictError: With `strict=True`, when training starts or an evaluation ends: the model has
            TRL's fused head. Without it, that is a warning.
    """

    def __init__(
        self, config: HealConfig | Mapping[str, Any] | None = None, /, **options: Any
    ) -> None:
        self.options = options_of(config, options)
        self._healed: Any = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Compile when the Trainer has been made, so that `evaluate` alone is covered, too."""
        self._heal(args, kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Compile where the callback was added later, or the model was replaced since."""
        self._heal(args, kwargs["model"])
        self._check_head(kwargs["model"])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Look for TRL's head where nothing was trained: it is put on after `on_init_end`."""
        self._check_head(kwargs["model"])

    def _heal(self, args: Any, model: Any) -> None:
        _refuse_other_compilers(args)
        _refuse_tf32()
        if self._healed is not model:
            self._healed = heal_model(model, self.options)

    def _check_head(self, model: Any) -> None:
        if not self.options.rewrites or not _has_fused_head(model):
            return
        message = (
            f"precision={self.options.precision!r} was asked for, but TRL has put a fused head "
            "into this model's forward, whose product with the output weights is torch's, not "
            "HEAL's.\n"
            "Log-probabilities and losses have neither the bound of heal nor the bits of exact, "
            "and autocast (bf16=True) rounds their logits to BF16. Way out: a subclass of the "
            "trainer that scores with the model's own logits (GRPO: examples/grpo.py; SFT: "
            "compute_loss = transformers.Trainer.compute_loss), then `del trainer.model.forward`, "
            "which takes the head off."
        )
        if self.options.strict:
            raise StrictError(message)
        warnings.warn(message, stacklevel=3)


def _refuse_other_compilers(args: Any) -> None:
    if args.torch_compile:
        raise ConfigError(
            "HealCallback and TrainingArguments(torch_compile=True, torch_compile_backend="
            f"{args.torch_compile_backend!r}) exclude each other: the model would be compiled "
            "twice, by a backend that rounds, and Trainer switches TF32 on with it.\n"
            "Leave torch_compile, torch_compile_backend and torch_compile_mode out: HealCallback "
            "compiles."
        )
    backend = os.environ.get(DYNAMO, "no")
    if backend.lower() != "no":
        raise ConfigError(
            f"the environment says {DYNAMO}={backend}, with which accelerate compiles the model a "
            "second time, by a backend that rounds.\n"
            "Leave --dynamo_backend out of accelerate launch and out of its configuration."
        )


def _refuse_tf32() -> None:
    """HEAL's kernels never use TF32; a matmul that had to be kept, or eager code, would."""
    for switch in SWITCHES:
        value = operator.attrgetter(switch)(torch)
        if value in ("tf32", "bf16"):
            raise ConfigError(
                f"torch.{switch} is {value!r}: FP32 matmuls outside HEAL's operators would lose "
                "half their digits. TrainingArguments(tf32=True), and torch_compile=True with "
                "tf32 not given, switch it on for the whole process.\n"
                f"Leave both out, and set torch.{switch} = 'ieee' if this process has made such "
                "arguments."
            )


def _has_fused_head(model: Any) -> bool:
    """Whether TRL's `add_fused_lm_head` has replaced the `forward` of this model.

    Its replacement shows the signature of the model's class, and accelerate's autocast wraps it
    once more; so every function in the chain is asked for what it takes itself.
    """
    base = getattr(model, "get_base_model", lambda: model)()
    return _takes_fused_head(inspect.unwrap(base.forward, stop=_takes_fused_head))


def _takes_fused_head(forward: Callable[..., Any]) -> bool:
    return FUSED_HEAD in inspect.signature(forward, follow_wrapped=False).parameters
