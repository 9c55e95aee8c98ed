"""Whether the tokenizer that a GGUF file brings can be one, in words where it cannot.

Layer: integrations. Imports `errors`, and gguf when a file is read.

Libraries find these faults too, but as a bare index error or an exception without a class of its
own, long after the file was read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from healpass.errors import missing_extra

#: Tokenizers that join pairs of tokens by a list in the file.
_BY_MERGES = ("gpt2",)
_SPECIAL = ("bos", "eos", "unknown", "padding")


def check_vocabulary(path: Path) -> None:
    """Look at tokens, merges and special tokens; weights are not read.

    Raises:
        ValueError: The first fault, as a sentence without its subject: "it has no ...".
        MissingExtraError: The gguf package is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise missing_extra("healpass.integrations.vocabulary", "hf", error) from error

    fields = gguf.GGUFReader(path).fields
    kind = _contents(fields, "model")
    tokens = _contents(fields, "tokens")
    _check_ids(fields, tokens)
    if kind in _BY_MERGES:
        _check_merges(_contents(fields, "merges"), frozenset(tokens))


def _contents(fields: Any, name: str) -> Any:
    """An entry of the tokenizer."""
    key = f"tokenizer.ggml.{name}"
    if key not in fields:
        raise ValueError(f"it has no {key}, which its tokenizer is made of")
    return fields[key].contents()


def _check_ids(fields: Any, tokens: Sequence[str]) -> None:
    for name in _SPECIAL:
        key = f"tokenizer.ggml.{name}_token_id"
        if key in fields and not 0 <= (number := fields[key].contents()) < len(tokens):
            raise ValueError(f"its {key} is {number}, but it has {len(tokens)} tokens")


def _check_merges(merges: Sequence[str], tokens: frozenset[str]) -> None:
    """Each joins two tokens, with a space between them, to one that is a token too."""
    for index, merge in enumerate(merges):
        parts = merge.split(" ")
        if len(parts) != 2:
            raise ValueError(
                f"its merge {index}, {merge!r}, is not two tokens with a space between"
            )
        for token in (*parts, "".join(parts)):
            if token not in tokens:
                raise ValueError(
                    f"its merge {index}, {merge!r}, needs the token {token!r}, which is not among "
                    f"its {len(tokens)} tokens"
                )
