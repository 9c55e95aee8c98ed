"""What each GPU generation would do to SmolLM2-135M's 210 linear layers, on CPU.

    python examples/simulated_gpus.py [--tokens 64] [--layers 30]
    python examples/simulated_gpus.py --forward [--tokens 64] [--layers 30] [--threads 2]

Every linear layer gets its real input (a forward pass in FP32 on the BF16 checkpoint), and its
output is compared with FP64 in the Frobenius norm. The rows:

* bf16: the layer as a BF16 model runs it.
* FP32: torch's FP32 matmul, which is also what heal runs on CPU unsimulated.
* layercast: FP32 on 16-bit weights by a chain of fused multiply-adds, as a GPU's FP32 units add.
* heal, ideal: two FP16 pieces, FP32 additions rounded to nearest.
* heal, v100 to b200: the same pieces, added as that generation's tensor cores add (a model of
  published tests, not silicon). B200 and H200 add as H100, Ada as A100.

Two products per layer; chains of four hardware additions, added in FP32
(`healpass.arithmetic.promotion`). No GPU is needed.

`--forward` times what a user runs instead, `torch.compile(model, backend="heal", options=
{"debug": {"simulate": ...}})` on the BF16 model: the first pass, which compiles, and the second.
Seconds of the processor stand beside those of the clock, for a machine that is busy with other
things.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from healpass.integrations import smollm2
from healpass.tensorcore import Schedule, heal_matmul, simulate_matmul

PROMPT = (
    "The tides are caused by the pull of the moon and of the sun on the water of the oceans. "
    "Twice a day the water rises and falls along most coasts, because the Earth turns under two "
    "bulges: one faces the moon, the other lies on the far side. When sun and moon pull along "
    "one line, at new and at full moon, the difference between high and low water is the "
    "largest of the month."
)


@dataclass(frozen=True)
class Layer:
    """One linear layer: its real input `[T, K]` in FP32, its weight `[N, K]` in BF16.

    `exact` is its output `[T, N]` in FP64.
    """

    name: str
    activation: Tensor
    weight: Tensor
    exact: Tensor


def bf16(activation: Tensor, weight: Tensor) -> Tensor:
    """The layer of a BF16 model."""
    return torch.nn.functional.linear(activation.bfloat16(), weight).float()


def fp32(activation: Tensor, weight: Tensor) -> Tensor:
    """Torch's FP32 matmul."""
    return activation @ weight.float().t()


def layercast(activation: Tensor, weight: Tensor) -> Tensor:
    """One FP32 fused multiply-add after the other, over all of K."""
    return simulate_matmul(
        [activation], [weight.float().t()], "sgemm", Schedule(promote_every=None)
    )


def heal(rule: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Two products of FP16 pieces, added by `rule`."""
    return lambda activation, weight: heal_matmul(activation, weight.t(), rule)


#: B200 adds as H100 does.
GENERATIONS = ("v100", "a100", "h100")
BASELINE = "FP32, heal unsimulated"
METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bf16": bf16,
    BASELINE: fp32,
    "layercast": layercast,
    "heal, ideal": heal("fp32"),
    "heal, v100": heal("v100"),
    "heal, a100": heal("a100"),
    "heal, h100 and b200": heal("h100"),
}


def capture(tokens: int, layers: int) -> list[Layer]:
    """The linear layers of the first `layers` blocks, with their inputs on the prompt."""
    model, tokenizer = smollm2.load(torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids[:, :tokens]
    found: list[Layer] = []

    def keep(name: str, module: torch.nn.Linear) -> Callable[..., None]:
        def hook(_module: object, inputs: tuple[Tensor, ...]) -> None:
            weight = module.weight.detach()
            exact = inputs[0][0].double() @ weight.double().t()
            found.append(Layer(name, inputs[0][0], weight.bfloat16(), exact))

        return hook

    for name, module in model.model.layers[:layers].named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(keep(name, module))
    with torch.no_grad():
        model(ids)
    return found


def error(y: Tensor, layer: Layer) -> float:
    """Relative error against FP64 in the Frobenius norm."""
    return float((y.double() - layer.exact).norm() / layer.exact.norm())


def measure(layers: list[Layer], console: Console) -> dict[str, tuple[list[float], float]]:
    """Every method's errors, layer by layer, and the seconds it took."""
    measured = {}
    for name, method in METHODS.items():
        method(layers[0].activation, layers[0].weight)  # compile outside the timing
        start = time.perf_counter()
        errors = [
            error(method(layer.activation, layer.weight), layer)
            for layer in track(layers, name, console=console, transient=True)
        ]
        measured[name] = errors, time.perf_counter() - start
    return measured


def table_of(layers: list[Layer], measured: dict[str, tuple[list[float], float]]) -> Table:
    """One row per method, errors beside those of FP32."""
    tokens = layers[0].activation.shape[0]
    table = Table(title=f"Error of {len(layers)} linear layers, {tokens} tokens")
    for heading in ("method", "median", "worst", "worst / FP32", "> 1.2 FP32", "seconds"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    table.add_column("layer with the worst ratio")
    baseline = measured[BASELINE][0]
    for name, (errors, seconds) in measured.items():
        ratios = [e / b for e, b in zip(errors, baseline, strict=True)]
        table.add_row(
            name,
            f"{sorted(errors)[len(errors) // 2]:.2e}",
            f"{max(errors):.2e}",
            f"{max(ratios):.2f}",
            str(sum(ratio > 1.2 for ratio in ratios)),
            f"{seconds:.1f}",
            layers[ratios.index(max(ratios))].name,
        )
    return table


def forward_times(
    tokens: int, layers: int, console: Console, generations: tuple[str, ...] = GENERATIONS
) -> Table:
    """Seconds of a simulated forward pass of the first `layers` blocks and the head."""
    model, tokenizer = smollm2.load(torch.bfloat16)
    model.model.layers = model.model.layers[:layers]
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids[:, :tokens]
    threads = torch.get_num_threads()
    size = f"{ids.shape[1]} tokens, {layers} block(s)"
    table = Table(title=f"A forward pass of {size}, {threads} thread(s)")
    for heading in ("simulate", "first pass", "second pass", "second, processor"):
        table.add_column(heading, justify="left" if heading == "simulate" else "right")
    for generation in generations:
        compiled = torch.compile(
            model, backend="heal", options={"debug": {"simulate": generation}}
        )
        seconds = []
        for _ in track(range(2), generation, console=console, transient=True):
            clock, processor = time.perf_counter(), time.process_time()
            compiled(ids, use_cache=False)
            seconds += [time.perf_counter() - clock, time.process_time() - processor]
        first, _, second, second_processor = (f"{value:.1f} s" for value in seconds)
        table.add_row(generation, first, second, second_processor)
        torch.compiler.reset()
    return table


def main() -> None:
    """Measure every layer under every rule, or a forward pass, and print the table."""
    parser = argparse.ArgumentParser(
        description="Errors of SmolLM2's linear layers by GPU generation"
    )
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--forward", action="store_true", help="time a forward pass instead")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    with torch.no_grad():
        if arguments.forward:
            console.print(forward_times(arguments.tokens, arguments.layers, console))
            return
        layers = capture(arguments.tokens, arguments.layers)
        console.print(table_of(layers, measure(layers, console)))


if __name__ == "__main__":
    main()
