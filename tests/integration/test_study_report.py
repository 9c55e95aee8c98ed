"""The report in a browser: complete, not wider than a phone, and it asks for nothing."""

import dataclasses
import io
import re
import shutil
import subprocess

import pytest
import torch
from PIL import Image

from healpass.study import page
from healpass.study.anatomy import Anatomy
from healpass.study.blame import Blame, Deviation
from healpass.study.configuration import Configuration, StudyPlan
from healpass.study.contributions import Contribution
from healpass.study.records import Answer, Batch, Store
from healpass.study.results import evaluate
from healpass.study.scoring import scores_of

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
EVIL = "<script>document.body.remove()</script>"
PRECISIONS = {"bf16": 0.3, "fp32": 1e-5, "exact": 0.0}
PROMPTS, TOKENS = 6, 12


def browser():
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no browser here; install chromium")
    return found


def batch(rows):
    answers = [
        Answer("finance-1", tuple(row), (0.5,) * len(row), f"{EVIL} it is {row}", None, False)
        for row in rows
    ]
    return Batch(tuple(answers), 1.5)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of made-up records, with a model's reply that would like to be a script."""
    generator = torch.Generator().manual_seed(0)
    plain = [Configuration(precision=p) for p in PRECISIONS]
    both = [c for one in plain for c in (one, dataclasses.replace(one, batch_size=8))]
    plan = StudyPlan(
        model="a-model-with-a-long-name/" + "x" * 60,
        greedy=tuple(both),
        forced=(*both, Configuration(precision="bf16", gpu="v100")),
        prompts=PROMPTS,
        max_new_tokens=TOKENS,
        forced_prompts=PROMPTS,
    )
    environment = page_environment()
    stamp = {"environment": environment, "command": f"healpass check {EVIL}"}
    store = Store.open(tmp_path_factory.mktemp("report") / "out", plan, stamp)
    texts = [torch.randn(TOKENS, 40, generator=generator) for _ in range(PROMPTS)]
    references = [scores_of(logits) for logits in texts]
    rows = [scores.top[:, 0].tolist() for scores in references]
    for unit in plan.units:
        c = unit.configuration
        noise = PRECISIONS[c.precision] * (c.batch_size > 1)
        changed = [t + noise * torch.randn(t.shape, generator=generator) for t in texts]
        if unit.kind == "forced" and c.gpu is None:
            scored = [scores_of(t, r) for t, r in zip(changed, references, strict=True)]
            store.save_scores(unit, 0, scored)
        elif unit.kind == "greedy":
            cut = [row[: TOKENS - 2] + ([39] if noise > 0.1 else [2]) for row in rows]
            store.save_answers(unit, 0, batch(cut[:3]))
            store.save_answers(unit, 3, batch(cut[3:]))
    for one in plain:
        made = [
            Deviation(
                f"model.layers.{i}.mlp.down_proj",
                PRECISIONS[one.precision] * 2**i,
                1e-3 * (i == 2),
            )
            for i in range(4)
        ]
        other = dataclasses.replace(one, batch_size=8)
        anatomy = Anatomy(
            one.precision, (Blame(one, other, tuple(made)),), {}, (Contribution("norms", 1e-3),)
        )
        store.save_json(f"anatomy-{one.precision}.json", anatomy.to_dict())
    return page.write(store, evaluate(store))


def page_environment():
    from healpass.environment import collect

    return collect().to_dict()


def screenshot(path, folder, width, height):
    target = folder / f"{width}.png"
    command = [browser(), *FLAGS, f"--user-data-dir={folder / str(width)}"]
    command += [f"--window-size={width},{height}", f"--screenshot={target}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert target.exists(), done.stderr
    return Image.open(io.BytesIO(target.read_bytes())).convert("RGB")


def ink(image, box):
    """The share of pixels in a box that are darker than the page."""
    part = image.crop(box).convert("L")
    return sum(part.histogram()[:200]) / (part.width * part.height)


@pytest.mark.parametrize(("width", "margin"), [(500, 8), (1200, 60)])
def test_the_page_fills_its_width_and_nothing_sticks_out(report, tmp_path, width, margin):
    image = screenshot(report, tmp_path, width, 3000)
    assert image.size == (width, 3000)
    assert ink(image, (0, 0, width, 3000)) > 0.01
    # Text or a figure wider than the screen would leave ink in the margin.
    assert ink(image, (0, 0, margin, 3000)) == 0
    assert ink(image, (width - margin, 0, width, 3000)) == 0


def test_every_verdict_has_its_colour(report, tmp_path):
    image = screenshot(report, tmp_path, 1200, 1000)
    colours = {colour for _, colour in image.getcolors(1 << 24)}
    assert (0, 0x73, 0x4F) in colours, "the green of what is reproducible"
    assert (0xB3, 0x40, 0x1C) in colours, "the red of what is not"


def test_what_a_model_writes_is_text_and_never_markup(report):
    text = report.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_the_page_says_what_was_found(report):
    text = report.read_text()
    assert "a V100 has no BF16 tensor core" in text
    assert "model.layers.2.mlp.down_proj" in text
    assert "yes, bit for bit" in text
    assert re.search(r"<strong>bf16</strong> gave more than one answer", text)
    assert text.count("<svg") == 4


def test_every_figure_is_there_as_svg_and_png(report):
    for name in ("survival", "depth", "margins", "cost"):
        folder = report.parent / "plots"
        assert (folder / f"{name}.svg").read_text().startswith("<svg")
        assert Image.open(folder / f"{name}.png").width > 600
