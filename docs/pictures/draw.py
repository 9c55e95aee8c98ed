"""The pictures of the documentation, as SVG: `python docs/pictures/draw.py` writes them anew.

Each stands on a light panel of its own, so that it is readable on a light page and on a dark one.
Imports nothing but the standard library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

INK, LINE, PAPER = "#17252a", "#5b6b70", "#fafaf5"
#: What a colour says, the same in every picture.
PLAIN, FLOAT, INTEGER, CHECK, LOSS = "#eceee9", "#cfe8e4", "#fbe3b5", "#d9e4f7", "#f6cfc9"
FONT = "font-family='Helvetica, Arial, sans-serif'"


class Picture:
    """A panel with boxes, arrows and words."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height = width, height
        self.parts = [
            f"<title>{escape(title)}</title>",
            f"<rect width='{width}' height='{height}' rx='10' fill='{PAPER}' stroke='#c9cdc6'/>",
        ]

    def words(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 14,
        anchor: str = "middle",
        bold: bool = False,
    ) -> None:
        """One line of text whose baseline is at `y`."""
        weight = " font-weight='bold'" if bold else ""
        self.parts.append(
            f"<text x='{x:g}' y='{y:g}' font-size='{size}' text-anchor='{anchor}' fill='{INK}' "
            f"{FONT}{weight}>{escape(text)}</text>"
        )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        lines: Sequence[str],
        fill: str = PLAIN,
    ) -> None:
        """A box; its first line is bold."""
        self.parts.append(
            f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}' rx='6' "
            f"fill='{fill}' stroke='{LINE}'/>"
        )
        top = y + height / 2 - 9 * (len(lines) - 1) + 5
        for number, line in enumerate(lines):
            size = 13 if number == 0 else 12
            self.words(x + width / 2, top + 18 * number, line, size=size, bold=number == 0)

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """A line with a head at its end."""
        length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
        dx, dy = (x2 - x1) / length, (y2 - y1) / length
        ax, ay = x2 - 9 * dx, y2 - 9 * dy
        head = f"{x2:g},{y2:g} {ax - 5 * dy:g},{ay + 5 * dx:g} {ax + 5 * dy:g},{ay - 5 * dx:g}"
        self.parts.append(
            f"<line x1='{x1:g}' y1='{y1:g}' x2='{ax:g}' y2='{ay:g}' stroke='{LINE}' "
            f"stroke-width='1.6'/><polygon points='{head}' fill='{LINE}'/>"
        )

    def row(
        self, y: float, boxes: Sequence[tuple[Sequence[str], str]], height: float = 64
    ) -> None:
        """Boxes of one width from left to right, with arrows between them."""
        gap = 28
        width = (self.width - 40 - gap * (len(boxes) - 1)) / len(boxes)
        for number, (lines, fill) in enumerate(boxes):
            x = 20 + number * (width + gap)
            self.box(x, y, width, height, lines, fill)
            if number:
                self.arrow(x - gap + 4, y + height / 2, x - 4, y + height / 2)

    def svg(self) -> str:
        """The file's text."""
        size = (
            f"width='{self.width}' height='{self.height}' viewBox='0 0 {self.width} {self.height}'"
        )
        body = "\n".join(self.parts)
        return f"<svg xmlns='http://www.w3.org/2000/svg' role='img' {size}>\n{body}\n</svg>\n"


def flip() -> Picture:
    """Why an answer changes with the batch."""
    picture = Picture(920, 150, "From another order of addition to another token")
    picture.row(
        24,
        [
            (("another batch", "another order of sums"), PLAIN),
            (("last bit of FP32", "differs"), FLOAT),
            (("rounded to BF16", "65,536 times larger"), LOSS),
            (("logits shift", "layer after layer"), LOSS),
            (("close pair flips", "another text"), LOSS),
        ],
    )
    picture.words(382, 110, "heal, layercast: no such rounding", size=13, anchor="start")
    picture.words(
        20, 130, "exact: the order does not matter, nothing differs", size=13, anchor="start"
    )
    return picture


def pipeline() -> Picture:
    """The way of one compile."""
    picture = Picture(920, 150, "The way of one compile")
    picture.row(
        24,
        [
            (("Dynamo", "graph of your model"), PLAIN),
            (("passes", "heal:: operators, FP32"), FLOAT),
            (("check", "after every pass"), CHECK),
            (("Inductor", "forward and backward"), PLAIN),
            (("C++ or Triton", "what runs"), PLAIN),
        ],
    )
    picture.words(
        460, 122, "what cannot be rewritten is kept as traced, and listed by healpass.explain"
    )
    return picture


def pieces() -> Picture:
    """Two 16-bit products that make one FP32 product."""
    picture = Picture(860, 230, "An FP32 product from 16-bit pieces")
    picture.box(20, 83, 150, 64, ("x", "FP32 activation"), PLAIN)
    picture.box(250, 24, 170, 60, ("high", "FP16, times 2^e"), FLOAT)
    picture.box(250, 146, 170, 60, ("low", "FP16, what is left"), FLOAT)
    picture.box(500, 24, 130, 60, ("high @ w", "second"), PLAIN)
    picture.box(500, 146, 130, 60, ("low @ w", "first"), PLAIN)
    picture.box(700, 83, 140, 64, ("sum", "FP32"), FLOAT)
    for y in (54, 176):
        picture.arrow(174, 115, 246, y)
        picture.arrow(424, y, 496, y)
        picture.arrow(634, y, 698, 115)
    picture.words(565, 120, "w: BF16 or FP16, one piece", size=13)
    return picture


def attention() -> Picture:
    """Attention over integers."""
    picture = Picture(920, 190, "Attention over integers")
    picture.row(
        24,
        [
            (("Q, K, V", "FP32 or 16 bits"), PLAIN),
            (("INT16 digits", "scale per token, head"), INTEGER),
            (("Q K", "integer sums, exact"), INTEGER),
            (("softmax", "FP32, or exact"), FLOAT),
            (("weights V", "pieces, or digits"), FLOAT),
        ],
    )
    picture.box(202, 116, 154, 52, ("cache", "keeps the digits"), INTEGER)
    picture.arrow(279, 92, 279, 114)
    picture.words(380, 147, "INT16: the bytes of BF16, and a finer step", size=13, anchor="start")
    return picture


def digits() -> Picture:
    """One answer from integers."""
    picture = Picture(920, 190, "Exact products by digits")
    picture.row(
        24,
        [
            (("a row", "FP32"), PLAIN),
            (("integers", "rounded once"), INTEGER),
            (("INT8 digits", "base 256, balanced"), INTEGER),
            (("sums of products", "in any order"), INTEGER),
            (("result", "rounded once"), FLOAT),
        ],
    )
    picture.words(460, 124, "x = 2^e (d2 * 65536 + d1 * 256 + d0),   every d in -128 ... 127")
    picture.words(
        460,
        154,
        "integers add to one value, whatever the batch, tile, split, rank or GPU",
        size=13,
    )
    return picture


def bounds() -> Picture:
    """Observed errors under their bounds."""
    picture = Picture(860, 210, "Observed errors and their bounds")
    left, right, zero = 240, 800, 40
    for name, limit, seen, y in (
        ("heal::linear", 0.72, 0.16, 60),
        ("heal::sdpa", 0.95, 0.24, 105),
        ("a low piece dropped", 0.72, 0.9, 150),
    ):
        width = (right - left) * limit
        fill = FLOAT if seen < limit else LOSS
        picture.words(left - 16, y + 5, name, anchor="end")
        picture.parts.append(
            f"<rect x='{left}' y='{y - 13}' width='{width:g}' height='26' rx='3' fill='{fill}' "
            f"stroke='{LINE}'/><circle cx='{left + (right - left) * seen:g}' cy='{y}' r='7' "
            f"fill='{INK}'/>"
        )
    picture.words(left, zero - 8, "0", size=13)
    picture.words(
        left,
        194,
        "bar: the derived bound.  dot: the observed error.  The last row is the inverse test.",
        size=13,
        anchor="start",
    )
    return picture


def tensorcore() -> Picture:
    """One step of a tensor core."""
    picture = Picture(920, 150, "One step of a tensor core")
    picture.row(
        24,
        [
            (("L exact products", "and the accumulator"), PLAIN),
            (("align", "to one exponent"), PLAIN),
            (("keep F bits", "cut off the rest"), LOSS),
            (("add", "exactly"), PLAIN),
            (("round", "toward zero, FP32"), LOSS),
        ],
    )
    picture.words(
        460, 122, "V100: L = 4, F = 23;   A100: L = 8, F = 24;   H100, B200: L = 16, F = 25"
    )
    return picture


def passes() -> Picture:
    """The passes in order."""
    picture = Picture(860, 250, "The passes in order")
    rows = (
        ("sizes", "overloads", "expand", "tensor_parallel"),
        ("matmul", "attention", "flex", "prepack"),
        ("promote", "exact", "cache_reads", "autocast"),
    )
    for number, names in enumerate(rows):
        fill = (PLAIN, FLOAT, FLOAT)[number]
        picture.row(20 + 62 * number, [((name,), fill) for name in names], height=42)
    picture.words(
        20, 232, "a check of the graph follows each pass that changed it", size=13, anchor="start"
    )
    picture.words(840, 232, "then inside Inductor: outline, decompose", size=13, anchor="end")
    return picture


def lowering() -> Picture:
    """Where an operator can go."""
    picture = Picture(860, 250, "Where an operator can go")
    picture.box(20, 93, 190, 64, ("heal:: operator", "in the graph"), FLOAT)
    picture.box(330, 20, 250, 56, ("CPU", "Inductor C++, one C++ template"), PLAIN)
    picture.box(330, 97, 250, 56, ("CUDA", "Triton templates"), PLAIN)
    picture.box(330, 174, 250, 56, ("anything else", "the reference implementation"), PLAIN)
    picture.box(650, 97, 190, 56, ("self-check", "once per GPU, version"), CHECK)
    for y in (48, 125, 202):
        picture.arrow(214, 125, 326, y)
    picture.arrow(584, 125, 646, 125)
    return picture


PICTURES: tuple[Callable[[], Picture], ...] = (
    flip,
    pipeline,
    pieces,
    attention,
    digits,
    bounds,
    tensorcore,
    passes,
    lowering,
)


def main() -> None:
    """Write every picture beside this file."""
    for draw in PICTURES:
        Path(__file__).with_name(f"{draw.__name__}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
