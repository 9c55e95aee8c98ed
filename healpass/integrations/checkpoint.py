"""A causal language model by name: found, loaded, or told why not.

Layer: integrations. Imports `errors`, `integrations.smollm2`, `integrations.vocabulary`, and
transformers when something is loaded.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from healpass.errors import FetchError, StudyError
from healpass.integrations import smollm2
from healpass.integrations.vocabulary import check_vocabulary

_WAYS = (
    "Give a folder with config.json, weights and tokenizer, an id from the Hugging Face hub, a "
    f"GGUF file, or {smollm2.SMOLLM2.name}."
)


@dataclass(frozen=True)
class Checkpoint:
    """A causal language model by name.

    Attributes:
        name: A folder, a hub id, a GGUF file, or `smollm2-135m`.
    """

    name: str

    def model(self, dtype: str = "bfloat16") -> Any:
        """Load the model in evaluation mode.

        Args:
            dtype: Dtype of the parameters. Their values are those of the BF16 checkpoint whatever
                the dtype, so that only arithmetic differs. Buffers keep their own dtype.

        Raises:
            FetchError: Nothing that can be loaded is there, or parameters are missing.
            StudyError: It is no causal language model.
        """
        loaded = self._load("AutoModelForCausalLM", dtype=torch.bfloat16, output_loading_info=True)
        model, info = loaded
        _check_causal(self.name, model.config)
        _check_complete(self.name, info["missing_keys"])
        wanted = getattr(torch, dtype)
        for parameter in model.parameters():  # not .to(): FP16 would round the rotary buffers
            parameter.data = parameter.data.to(wanted)
        model.config.dtype = wanted
        return model.eval()

    def tokenizer(self) -> Any:
        """Load the tokenizer, padding on the left.

        Raises:
            FetchError: There is none, or it contradicts itself.
        """
        tokenizer = self._load("AutoTokenizer", padding_side="left")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise StudyError(
                f"{self.name!r} has a tokenizer without padding, end and unknown token, so "
                "prompts of different lengths cannot share a batch. Add a pad_token to it."
            )
        return tokenizer

    def location(self) -> str:
        """What another library loads by itself: a folder or a hub id.

        Raises:
            FetchError: SmolLM2 cannot be fetched.
            StudyError: It is a GGUF file, which others take as a quantization of its own.
        """
        if self._kind == "GGUF file":
            raise StudyError(
                f"{self.name!r} is quantized by itself, and quantization='heal' is another.\n"
                "Give vLLM the 16-bit checkpoint, or run the file in transformers."
            )
        return str(self._source()[0])

    def _load(self, auto: str, **options: Any) -> Any:
        import transformers

        what = "tokenizer" if "Tokenizer" in auto else "causal language model"
        source, how = self._source()
        if how and what != "tokenizer":
            how["quantization_config"] = transformers.GgufConfig(dequantize=True)
        try:
            if how and what == "tokenizer":
                check_vocabulary(Path(self.name))
            return getattr(transformers, auto).from_pretrained(source, **how, **options)
        except (OSError, LookupError, ValueError, TypeError, NotImplementedError) as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise FetchError(
                f"cannot load {self.name!r} as a {what}, taken as {self._kind}: {reason}\n{_WAYS}"
            ) from error

    @property
    def _kind(self) -> str:
        path = Path(self.name)
        return "folder" if path.is_dir() else "GGUF file" if path.suffix == ".gguf" else "hub id"

    def _source(self) -> tuple[Any, dict[str, Any]]:
        """What `from_pretrained` is called with."""
        path = Path(self.name)
        if self.name == smollm2.SMOLLM2.name:
            return smollm2.fetch(), {}
        if path.suffix == ".gguf":
            if not path.is_file():
                raise FetchError(f"there is no file {self.name!r}.\n{_WAYS}")
            return path.parent, {"gguf_file": path.name}
        return self.name, {}


def _check_complete(name: str, missing: Collection[str]) -> None:
    """Refuse a checkpoint without all parameters: transformers makes up what it does not find."""
    if missing:
        raise FetchError(
            f"cannot load {name!r}: {len(missing)} of its parameters are not in it, as "
            f"{min(missing)}. They would be random numbers.\n"
            "Give a checkpoint whose tensors have the names of its architecture; a GGUF file may "
            "be of an architecture that transformers reads in part only."
        )


def _check_causal(name: str, config: Any) -> None:
    """Refuse encoders, which transformers would load as a decoder with a warning."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    known = set(CAUSAL.values())
    found = list(getattr(config, "architectures", None) or ())
    if found and not known.intersection(found):
        raise StudyError(
            f"{name!r} is a {found[0]}, which does not generate text token by token: a causal "
            "language model is needed (its config.json names an architecture ending in "
            f"ForCausalLM or LMHeadModel). {_WAYS}"
        )
