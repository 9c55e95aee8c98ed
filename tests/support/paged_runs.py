"""Kernels over pages without a GPU: run in the interpreter, or compiled ahead of time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from healpass.lowering.cuda import eager
from healpass.lowering.cuda.eager import COUNTS, Launch
from healpass.lowering.cuda.paged import PagedProblem, attend
from healpass.lowering.cuda.pages import Pages
from healpass.ops.attention.paged import Cell, PagedAttention
from tests.support import interpreter
from tests.support.fake_cuda import Device, Kernel, fake_cuda

Change = Callable[[str], str]


@contextlib.contextmanager
def interpreted(change: Change | None = None) -> Iterator[list[str]]:
    """Launches run in the interpreter, for the time of a block; the names of what was launched.

    Args:
        change: Edits the text of a kernel first.
    """
    names: list[str] = []

    def run(launch: Launch) -> None:
        name, text = launch.text.name, launch.text.render()
        function = interpreter.load(Kernel(name, text if change is None else change(text)))
        with interpreter.corrected():
            function[launch.grid](**launch.taken(function.arg_names))
        names.append(launch.text.template)

    with mock.patch.object(eager, "run", run):
        yield names


def attended(*call: Any, capability: int = 90, change: Change | None = None) -> Tensor:
    """What the kernels make of the arguments of `heal::paged_attention`, which are on CPU.

    Args:
        *call: The arguments.
        capability: Of the GPU whose kernels they are.
        change: Edits the text of a kernel first.
    """
    with interpreted(change):
        return attend(PagedProblem(PagedAttention.read(*call), capability))


@dataclass(frozen=True)
class Batch:
    """Ragged requests whose keys are in pages in a random order; what nobody wrote is poison.

    Attributes:
        queries: Of each request; some have none.
        keys: Of each request.
        room: Tokens of a page.
        kv: Of the pages.
        heads: Key heads, and query heads that share one.
        sizes: Of keys and of values.
        seed: Of everything random.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    room: int = 16
    kv: str = "int16"
    heads: tuple[int, int] = (1, 2)
    sizes: tuple[int, int] = (16, 24)
    seed: int = 0

    #: Queries behind the last request's, as in an engine's padded batch.
    PADDING = 3

    def states(self) -> tuple[Tensor, Tensor, Tensor]:
        """Q `[T, H, E]` with NaN for padding, K `[S, Hkv, E]`, V `[S, Hkv, Ev]`."""
        generator = torch.Generator().manual_seed(self.seed)
        (key_heads, group), (size, value_size) = self.heads, self.sizes
        tokens, keys = sum(self.queries) + self.PADDING, sum(self.keys)
        query = torch.randn(tokens, key_heads * group, size, generator=generator) * 2
        key = torch.randn(keys, key_heads, size, generator=generator)
        value = torch.randn(keys, key_heads, value_size, generator=generator)
        value *= 2.0 ** torch.randint(-9, 9, (keys, 1, 1), generator=generator)
        query[sum(self.queries) :] = torch.nan
        return query, key, value

    def places(self) -> tuple[Tensor, Tensor]:
        """Pages of each request, INT32 `[R, M]`, and the slot of each key; page 0 is nobody's."""
        rooms = [-(-keys // self.room) for keys in self.keys]
        generator = torch.Generator().manual_seed(self.seed + 1)
        listed = (torch.randperm(sum(rooms), generator=generator) + 1).split(rooms)
        slots = [
            (pages[:, None] * self.room + torch.arange(self.room)).flatten()[:keys]
            for pages, keys in zip(listed, self.keys, strict=True)
        ]
        blocks = torch.zeros(len(rooms), max(rooms) + 1, dtype=torch.int32)
        for row, pages in zip(blocks, listed, strict=True):
            row[: len(pages)] = pages
        return blocks, torch.cat(slots)

    def empty_pages(self) -> Tensor:
        """Poison: scales of such bytes are NaN."""
        cell = Cell(self.kv, *self.sizes)
        pages = 1 + sum(-(-keys // self.room) for keys in self.keys)
        size = (pages, self.heads[0], self.room, cell.nbytes)
        return torch.full(size, -1, dtype=torch.int8)

    def call(self, numerics: str, **scoring: Any) -> tuple[Any, ...]:
        """The arguments of `heal::paged_attention`."""
        query, key, value = self.states()
        (blocks, slots), pages = self.places(), self.empty_pages()
        torch.ops.heal.paged_write(pages, key, value, slots, self.kv)
        starts = torch.tensor((0, *self.queries)).cumsum(0).to(torch.int32)
        how = {"is_causal": True, "sinks": None, "window": None, "softcap": None, "scale": 0.25}
        how |= scoring
        return (
            query, pages, starts, torch.tensor(self.keys, dtype=torch.int32), blocks,
            how["sinks"], how["is_causal"], how["scale"], how["window"], how["softcap"],
            self.sizes[1], self.kv, numerics,
        )  # fmt: skip

    def requests(self) -> Iterator[tuple[slice, tuple[Tensor, Tensor, Tensor]]]:
        """Each request's rows of the output, and its Q, K and V as `[1, H, S, E]`."""
        query, key, value = self.states()
        first_row, first_key = 0, 0
        for rows, keys in zip(self.queries, self.keys, strict=True):
            parts = (
                query[first_row : first_row + rows], key[first_key : first_key + keys],
                value[first_key : first_key + keys],
            )  # fmt: skip
            q, k, v = (x.transpose(0, 1)[None] for x in parts)
            yield slice(first_row, first_row + rows), (q, k, v)
            first_row, first_key = first_row + rows, first_key + keys


@dataclass(frozen=True)
class PagedCase:
    """A step of a serving engine whose kernels the tests look at.

    Attributes:
        title: Its name.
        queries: Of each request.
        keys: Pages listed per request, in keys.
        requests: R.
        size: Of a head.
        kv: Of the pages.
        numerics: As the operator takes it.
        sinks: Whether there are some.
        window: As the operator takes it.
        softcap: As the operator takes it.
    """

    title: str
    queries: int = 1
    keys: int = 8192
    requests: int = 4
    size: int = 128
    kv: str = "int16"
    numerics: str = "heal"
    sinks: bool = False
    window: int | None = None
    softcap: float | None = None

    #: Llama-3-8B's heads, and tokens of a page.
    HEADS, KEY_HEADS, ROOM = 32, 8, 16

    def call(self) -> tuple[Any, ...]:
        """Arguments of the operator, on no device."""
        with torch.device("meta"):
            cell = Cell(self.kv, self.size, self.size)
            query = torch.empty(self.requests * self.queries, self.HEADS, self.size)
            pages = torch.empty(4096, self.KEY_HEADS, self.ROOM, cell.nbytes, dtype=torch.int8)
            starts, lengths, blocks = (
                torch.empty(size, dtype=torch.int32)
                for size in (
                    (self.requests + 1,), (self.requests,),
                    (self.requests, self.keys // self.ROOM),
                )
            )  # fmt: skip
            sinks = torch.empty(self.HEADS) if self.sinks else None
        return (
            query, pages, starts, lengths, blocks, sinks, True, self.size**-0.5, self.window,
            self.softcap, self.size, self.kv, self.numerics,
        )  # fmt: skip

    def launches(self, capability: int = 90) -> list[Launch]:
        """What a step launches: the new keys and values go into pages, then attention."""
        found: list[Launch] = []
        call = self.call()
        query, memory = call[:2]
        key = query[:, : self.KEY_HEADS]
        slots = torch.empty(len(query), dtype=torch.int64, device="meta")
        with mock.patch.object(eager, "run", found.append):
            Pages(memory, Cell(self.kv, self.size, self.size)).write(key, key, slots)
            attend(PagedProblem(PagedAttention.read(*call), capability))
        return found


#: Triton's names of the elements of tensors.
ELEMENTS = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int8: "i8",
}  # fmt: skip


def binary(launch: Launch, capability: int, change: Change | None = None) -> Any:
    """Compile a launch's kernel as Triton would at the launch.

    Args:
        launch: The launch.
        capability: Of the GPU.
        change: Edits the text of the kernel first.
    """
    import triton
    from torch._inductor.codecache import PyCodeCache
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    text = launch.text.render()
    with fake_cuda(Device(capability)):
        module = PyCodeCache.load(text if change is None else change(text))
        function = getattr(module, launch.text.name)
        signature = {
            name: "i32" if name in COUNTS else f"*{ELEMENTS[x.dtype]}"
            for name, x in launch.taken(function.arg_names).items()
        }
        # Views of a page begin at its second half or behind it: there is no more to know of them.
        aligned = [
            (i,) for i, name in enumerate(function.arg_names)
            if name not in (*COUNTS, "K_SCALE", "V", "V_SCALE")
        ]  # fmt: skip
        source = ASTSource(
            function, signature, {}, attrs={at: [["tt.divisibility", 16]] for at in aligned}
        )
        options = {
            "num_warps": launch.num_warps, "num_stages": launch.num_stages,
            "enable_fp_fusion": False,
        }  # fmt: skip
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


INT24 = "int24"
CASES = (
    PagedCase("paged decode 128"),
    PagedCase("paged decode 64, all", size=64, sinks=True, window=1024, softcap=50.0),
    PagedCase("paged decode 256", size=256),
    PagedCase("paged decode 128, int24", kv=INT24),
    PagedCase("paged decode, layercast", kv=INT24, numerics="layercast"),
    PagedCase("paged prefill 128", 512),
    PagedCase("paged prefill 64", 512, size=64),
    PagedCase("paged prefill 256", 512, size=256),
    PagedCase("paged prefill 128, int24", 512, kv=INT24),
    PagedCase("paged prefill, layercast", 512, kv=INT24, numerics="layercast"),
    PagedCase("exact paged decode 128", numerics="exact5"),
    PagedCase("exact paged decode 64, int24", size=64, kv=INT24, numerics="exact5"),
    PagedCase("exact paged prefill 128", 512, numerics="exact5"),
    PagedCase("exact paged prefill 64", 512, size=64, numerics="exact5", window=1024),
    PagedCase("exact paged prefill 128, int24", 512, kv=INT24, numerics="exact5"),
    PagedCase("exact paged prefill 256", 512, size=256, numerics="exact5"),
)
