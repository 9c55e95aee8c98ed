"""Which ways lead into a model of transformers, besides its own call. Layer: integrations.

`generate` runs the encoder by itself, audio models run prenets, decoders and codecs, users call
`get_image_features`. Each such way is an `Entry`:

- the call of every `PreTrainedModel` inside the model;
- the call of every other part with parameters that a model holds by name, at any depth. Of the
  parts that it holds in lists (layers, experts) only those that consist of one module (heads,
  embeddings): layers are called by the model that holds them, and compiling each of them by itself
  would multiply the time that a model with graph breaks takes to compile;
- the methods of a `PreTrainedModel` whose names say that they compute (`COMPUTING`), and all
  public methods of its other parts that take something.

What calls those in a loop, as `generate` does, stays Python. `tests/integration` walks the classes
of transformers and lists which public methods are neither.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

#: Names of the methods that compute with weights and are called by users, pipelines or `generate`.
COMPUTING = re.compile(
    r"(get|pack|extract|project|embed|compute|encode|decode|predict|forward|codec|chunked|fix"
    r"|denormalize)_(\w+_)?(features?|embeds|embeddings?|tokens|logits|indices|probs|decode|latents"
    r"|prefix|hidden_states|outputs?|representations|codes|inputs|image|image_query|contacts|boxes)"
    r"|encode|decode|\w+_predictor|\w+_embedder|image_guided_detection|temporal_patch_merger"
    r"|segmentation_head|reverse_embedding|run_memory_encoder|predict_fine_route"
    r"|prepare_embeddings_for_image_generation|get_vision_features_for_tracker"
)
#: Of these, those that hand out modules, positions or integers.
NOT_COMPUTING = re.compile(
    r"get_(input|output|position|decoder_input)_embeddings?|get_unconditional_inputs"
)


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose calls are entries, each once, by their names; the model itself is ''."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            yield from _parts(name, module, seen)


def _parts(name: str, module: nn.Module, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """A module and what it holds by name, down to lists of larger modules."""
    if id(module) in seen:
        return
    seen.add(id(module))
    if _computes(module):
        yield name, module
    listed = isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
    for key, child in module.named_children():
        if not listed or not any(True for _ in child.children()):
            yield from _parts(f"{name}.{key}" if name else key, child, seen)


def _computes(module: nn.Module) -> bool:
    """Whether a module can be called, and has weights of its own or below it."""
    callable_ = type(module).forward is not nn.Module.forward
    wraps = not isinstance(module, PreTrainedModel) and any(
        isinstance(part, PreTrainedModel) for part in module.modules()
    )
    scripted = isinstance(module, torch.jit.ScriptModule)
    weighted = next(module.parameters(), None) is not None
    return callable_ and weighted and not wraps and not scripted


def methods_of(kind: type) -> list[str]:
    """The names of the methods of a class that are entries, if it is one of transformers."""
    own = [base for base in kind.__mro__ if base not in PreTrainedModel.__mro__]
    own = [base for base in own if not base.__module__.startswith("torch.")]
    names = {name for base in own for name in vars(base)}
    return sorted(name for name in names if is_entry(kind, name))


def is_entry(kind: type, name: str) -> bool:
    """Whether a method of a class is an entry: by its name, and because it takes something."""
    method = inspect.getattr_static(kind, name)
    if name.startswith("_") or name == "forward" or not inspect.isfunction(method):
        return False
    if issubclass(kind, PreTrainedModel):
        named = COMPUTING.fullmatch(name) and not NOT_COMPUTING.fullmatch(name)
        if not named or name in dir(PreTrainedModel):
            return False
    elif not kind.__module__.startswith("transformers."):
        return False
    return len(inspect.signature(method).parameters) > 1
