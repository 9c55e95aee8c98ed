"""How a compile's options travel: into the caches' keys, and to what runs inside Inductor.

Imports `config`.

A graph that looks the same may have to compile to other code: under another option, or after a
change of healpass itself. Both caches ask every custom pass for its `uuid()`, so a pass that does
nothing and has the right `uuid` is all it takes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from importlib import resources
from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from healpass.config import HealConfig


@cache
def source_hash() -> str:
    """SHA-256 over every source file and template of healpass."""
    digest = hashlib.sha256()
    for package in ("healpass", "healpass.lowering"):
        for path in _files(resources.files(package)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _files(folder: Any) -> list[Any]:
    found: list[Any] = []
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.is_dir():
            found += _files(path)
        elif path.name.endswith((".py", ".jinja")):
            found.append(path)
    return found


class CacheKey(CustomGraphPass):
    """A pass that carries (source, options) into the caches' keys, and changes nothing itself.

    Attributes:
        config: The options of the compile.
        chained: The user's own pass in that slot; it runs, and its uuid counts too.
        last: A pass of ours that runs after it; what it does must follow from the options.
        whole: Whether AOTAutograd shall not decompose exact operators; the graph shows if it did.
    """

    def __init__(
        self,
        config: HealConfig,
        chained: Any = None,
        last: Callable[[Graph], None] | None = None,
        whole: bool = False,
    ) -> None:
        self.config = config
        self.chained = chained
        self.last = last
        self.whole = whole

    def __call__(self, graph: Graph) -> None:
        """Run the user's pass, if there is one, then ours."""
        for step in (self.chained, self.last):
            if step is not None:
                step(graph)

    def uuid(self) -> Any:
        """Our part of the key, then the user's; None (no caching) if theirs has none."""
        ours = ("healpass", source_hash(), self.config.key())
        if self.chained is None:
            return ours
        theirs = self.chained.uuid() if isinstance(self.chained, CustomGraphPass) else None
        return None if theirs is None else (ours, theirs)


def current_config() -> HealConfig:
    """Options of the compile that is under way, forward or backward; the default if not ours."""
    key = _current_key()
    return HealConfig() if key is None else key.config


def operators_stay_whole() -> bool:
    """Whether the compile that is under way decomposes exact operators itself, later."""
    key = _current_key()
    return key is not None and key.whole


def _current_key() -> CacheKey | None:
    """Inductor hands its settings, our key among them, to whatever runs inside of a compile."""
    from torch._inductor import config

    key = config.post_grad_custom_pre_pass
    return key if isinstance(key, CacheKey) else None
