"""`healpass.status(model)`: what has been compiled so far, and what ran as written.

Imports `watch`, which keeps the records.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from torch import nn

from healpass.config import HealConfig
from healpass.report_view import text_table
from healpass.uncompiled import Region, Uncompiled
from healpass.watch import config_of, context_of, region_of_context


@dataclass(frozen=True)
class EntryStatus:
    """One way into the model that HEAL compiles.

    Attributes:
        name: The class of the model for its own call, else the part or method, as `encoder`.
        precision: The precision asked for.
        graphs: Graphs compiled since the last `torch._dynamo.reset()`; 0 before the first call.
        rewritten: Matmul and SDPA nodes that became HEAL's, in all graphs.
        kept: Those that were kept as traced.
        uncompiled: What torch left out: it ran as written.
    """

    name: str
    precision: str
    graphs: int
    rewritten: int
    kept: int
    uncompiled: tuple[Uncompiled, ...]


@dataclass(frozen=True, repr=False)
class Status:
    """What `healpass.status` found, shown as tables wherever it is shown."""

    entries: tuple[EntryStatus, ...]

    @property
    def uncompiled(self) -> tuple[Uncompiled, ...]:
        """All that torch left out, each once."""
        return tuple(dict.fromkeys(found for entry in self.entries for found in entry.uncompiled))

    @property
    def whole(self) -> bool:
        """Whether every function that was called ran compiled; a graph break alone does not count.

        Before the first call there is nothing to say, and this is False.
        """
        ran = any(entry.graphs for entry in self.entries)
        return ran and not any(found.ends_a_promise for found in self.uncompiled)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        """The tables as plain text."""
        out = io.StringIO()
        Console(file=out, width=160, color_system=None).print(*self._tables(), sep="\n")
        return out.getvalue().rstrip()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The same for a notebook."""
        console = Console(file=io.StringIO(), width=120, record=True)
        console.print(*self._tables(), sep="\n")
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")

    def _tables(self) -> Iterator[Any]:
        if not self.entries:
            yield "Nothing of this is compiled with HEAL."
            return
        used = [entry for entry in self.entries if entry.graphs]
        yield text_table(
            "Compiled with HEAL",
            ("entry", "precision", "graphs", "rewritten", "kept"),
            [(e.name, e.precision, *map(str, (e.graphs, e.rewritten, e.kept))) for e in used],
        )
        waiting = [entry.name for entry in self.entries if not entry.graphs]
        if waiting:
            yield f"No graph yet: {', '.join(waiting)}"
        if self.uncompiled:
            columns = ("kind", "where", "why")
            yield text_table(
                "Left uncompiled by torch",
                columns,
                [(found.kind, found.where, found.reason) for found in self.uncompiled],
            )


def status(model: Any) -> Status:
    """Say what of a model HEAL has compiled so far, and what torch ran as written instead.

    Args:
        model: What `torch.compile(..., backend="heal")` returned, a model after
            `model.compile(backend="heal")` or `heal_model(model)`, or a module that holds such
            modules.

    Returns:
        One entry per compiled call, with its graphs and what was left out of them. What calls
        `heal::` operators without a compiler is not listed.
    """
    found: list[EntryStatus] = []
    seen: set[int] = set()
    for name, candidate, module in _candidates(model):
        context = context_of(candidate)
        config = config_of(getattr(context, "callback", None))
        if config is not None and config.rewrites and id(context) not in seen:
            seen.add(id(context))
            entry = _entry(name, config.precision, region_of_context(context))
            if not entry.graphs and module is not None and _is_never_traced(module):
                entry = replace(entry, uncompiled=(*entry.uncompiled, _never(module)))
            found.append(entry)
        elif isinstance(getattr(candidate, "config", None), HealConfig):
            found.append(EntryStatus(name, candidate.config.precision, 0, 0, 0, ()))
    return Status(tuple(found))


def _is_never_traced(module: nn.Module) -> bool:
    """Whether `module.compile()` is in vain: Dynamo skips the source files of `torch.nn`.

    It steps into the `forward` of a user's class, and `torch.compile(module)` wraps one of torch's
    own; `Module.compile` does not (torch 2.11 to 2.13).
    """
    from torch._dynamo import trace_rules

    return bool(trace_rules.check(type(module).forward))


def _never(module: nn.Module) -> Uncompiled:
    kind = type(module).__name__
    return Uncompiled(
        "skipped",
        f"{kind}.forward",
        f"torch compiles nothing of {kind}.compile(), with any backend: the class is torch's own. "
        "Use model = torch.compile(model, backend='heal')",
    )


def _candidates(model: Any) -> Iterator[tuple[str, Any, nn.Module | None]]:
    """What may be compiled in a model: its name, itself, and the module that compiled itself."""
    root = getattr(model, "__name__", type(model).__name__)
    yield root, model, None
    modules = getattr(model, "named_modules", None)
    for path, module in modules() if modules else ():
        for attribute, held in vars(module).items():
            if callable(held):
                method = "" if attribute == "_compiled_call_impl" else attribute
                name = f"{path}.{method}".strip(".") or root
                owner = module if not method else None
                yield from ((name, compiled, owner) for compiled in _versions(held))


def _versions(held: Any) -> list[Any]:
    """What an entry of `heal_model` has compiled, in its forms; anything else is its own."""
    compiled = getattr(held, "compiled", None)
    return list(compiled.values()) if isinstance(compiled, dict) and compiled else [held]


def _entry(name: str, precision: str, region: Region | None) -> EntryStatus:
    reports = region.reports if region else []
    kept = sum(len(report.kept) for report in reports)
    total = sum(len(report.nodes) for report in reports)
    found = tuple(region.found) if region else ()
    return EntryStatus(name, precision, len(reports), total - kept, kept, found)
