"""Templates as kernels that are launched at once, outside of any graph. Imports `kernels`.

Inductor renders a template where its operator is in a compiled graph. A serving engine calls
attention between its graphs. For that the same text is rendered here, with the sizes and strides
of the tensors at hand written into it, and Triton compiles it at its first launch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import torch
from torch import Tensor

from healpass.lowering.cuda import kernels

#: Names of numbers that a kernel takes at its launch: requests, the steps of a search among them,
#: pages listed for each, tokens, chunks of keys, and parts of the keys.
COUNTS = ("R", "STEPS", "WIDTH", "T", "CHUNKS", "SPLITS")
#: A tensor's sizes and strides, as a kernel's text has them.
Layout = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Text:
    """All that decides a kernel's text.

    Attributes:
        template: Its name.
        layouts: Of the tensors whose sizes or strides the template asks for, by name.
        knobs: Constants of the template, by name; dtypes end with `DTYPE`.
    """

    template: str
    layouts: tuple[tuple[str, Layout], ...]
    knobs: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """Of the kernel."""
        return f"heal_{self.template}"

    def render(self) -> str:
        """The module: imports, the kernel, and the device functions that it calls."""
        environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
        template = environment.from_string(kernels.source(self.template))
        body = template.render(
            def_kernel=self._head, store_output=self._store, size=self._size, stride=self._stride,
            **dict(self.knobs),
        )  # fmt: skip
        return f"import triton\nimport triton.language as tl\n\n\n{body.strip()}\n"

    def _head(self, *arguments: str) -> str:
        # What `store_output` writes is no argument of Inductor's `def_kernel` either.
        arguments += tuple(name for name, _ in self.layouts if name == "OUT")
        lines = [f"@triton.jit\ndef {self.name}({', '.join(arguments)}):"]
        for name, value in self.knobs:
            if isinstance(value, (bool, int, float)):
                lines.append(f"    {name} : tl.constexpr = {value!r}")
            elif name.endswith("DTYPE"):
                lines.append(f"    {name} : tl.constexpr = {value}")
        return "\n".join(lines)

    def _size(self, name: str | None, dim: int) -> int:
        return dict(self.layouts)[name or "OUT"][0][dim]

    def _stride(self, name: str, dim: int) -> int:
        return dict(self.layouts)[name][1][dim]

    def _store(self, indices: tuple[str, ...], value: str, mask: str, **_: Any) -> str:
        strides = dict(self.layouts)["OUT"][1]
        place = " + ".join(f"{i} * {stride}" for i, stride in zip(indices, strides, strict=True))
        return f"tl.store(OUT + {place}, {value}, mask={mask})"


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        text: The kernel's.
        arguments: Tensors, and numbers that may differ from launch to launch, by the template's
            names; what the kernel does not take is left out.
        grid: Programs along both axes.
        num_warps: Tuning.
        num_stages: Tuning.
    """

    text: Text
    arguments: Mapping[str, Tensor | int]
    grid: tuple[int, int]
    num_warps: int = 4
    num_stages: int = 1

    @classmethod
    def of(
        cls,
        template: str,
        tables: tuple[Mapping[str, Layout], Mapping[str, Any]],
        arguments: Mapping[str, Tensor | int],
        grid: tuple[int, int],
        **tuning: int,
    ) -> Launch:
        """With the text of these layouts and knobs.

        Args:
            template: As the text's.
            tables: The text's layouts and knobs.
            arguments: As the attribute.
            grid: As the attribute.
            **tuning: `num_warps`, `num_stages`.
        """
        layouts, knobs = (tuple(table.items()) for table in tables)
        return cls(Text(template, layouts, knobs), arguments, grid, **tuning)

    def taken(self, names: Sequence[str]) -> dict[str, Tensor | int]:
        """The arguments of these names."""
        return {name: self.arguments[name] for name in names}


def run(launch: Launch) -> None:
    """Launch on the GPU where the tensors are; nothing is contracted."""
    function = kernel(launch.text)
    arguments = launch.taken(function.arg_names)
    tensor = next(x for x in arguments.values() if isinstance(x, Tensor))
    with torch.cuda.device(tensor.device):
        function[launch.grid](
            **arguments, num_warps=launch.num_warps, num_stages=launch.num_stages,
            enable_fp_fusion=False,
        )  # fmt: skip


@functools.cache
def kernel(text: Text) -> Any:
    """The kernel as Triton's. A count that is 1, or a multiple of 16, makes none of its own."""
    import triton
    from torch._inductor.codecache import PyCodeCache

    function = getattr(PyCodeCache.load(text.render()), text.name)
    return triton.jit(
        function.fn, do_not_specialize=[name for name in function.arg_names if name in COUNTS]
    )


def index_dtype(*places: int) -> str:
    """What holds places in memory that are below these: Triton's INT32 where it can."""
    return "tl.int64" if max(places) >= 1 << 31 else "tl.int32"


def span(x: Tensor) -> int:
    """Elements from the first of a tensor to behind the last."""
    return 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
