"""The report in a browser: complete, not wider than a phone, and it asks for nothing."""

import dataclasses
import html
import io
import json
import re
import shutil
import subprocess

import pytest
import torch
from PIL import Image

from healpass.study.judge.anatomy import Anatomy
from healpass.study.judge.blame import Blame, Deviation
from healpass.study.judge.contributions import ALL, KINDS, Contribution
from healpass.study.judge.results import evaluate
from healpass.study.plan.configuration import Configuration, StudyPlan
from healpass.study.plan.tasks import Task
from healpass.study.report import page
from healpass.study.run.records import Answer, Batch, Store
from healpass.study.run.score import scores_of

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
        parts = [Contribution(kind, PRECISIONS[one.precision]) for kind in (*KINDS, ALL)]
        blames = tuple(Blame(one, other, tuple(made)) for _ in range(12))
        anatomy = Anatomy(one.precision, blames, {}, tuple(parts))
        store.save_json(f"anatomy-{one.precision}.json", anatomy.to_dict())
    return page.write(store, evaluate(store))


def page_environment():
    from healpass.environment import collect

    return collect().to_dict()


def browse(path, folder, *flags):
    """Open a page in a browser with a profile of its own; return what it prints."""
    command = [browser(), *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def screenshot(path, folder, width, height):
    target = folder / f"{width}.png"
    browse(path, folder, f"--window-size={width},{height}", f"--screenshot={target}")
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


#: An A4 page between margins of 14 mm, in CSS pixels of 1/96 inch.
PAPER = int((210 - 2 * 14) / 25.4 * 96)
#: Puts what paper cannot show into the page: what is wider than its place, dark areas, and blocks
#: that a page may end in the middle of.
MEASURE = """<script>
const all = [...document.querySelectorAll("body, body *")];
const name = e => e.tagName + "." + e.className;
const light = e => {
  const [r, g, b, a = 1] = getComputedStyle(e).backgroundColor.match(/[\\d.]+/g).map(Number);
  return a == 0 || (r + g + b) / 3 > 200;
};
const whole = ".scroll, tr, .card, .example, figure, pre, p";
document.body.dataset.found = JSON.stringify({
  wide: all.filter(e => e.scrollWidth > e.clientWidth && e.clientWidth > 0
    && getComputedStyle(e).display != "inline" && !e.closest("svg")).map(name),
  dark: all.filter(e => !light(e)).map(name),
  torn: all.filter(e => e.matches(whole) && getComputedStyle(e).breakInside != "avoid").map(name),
});
</script>"""


def measure(report, folder, *, on_paper):
    """What cannot be printed of a page, with the print style or with the screen's."""
    text = report.read_text()
    assert "@media print" in text
    if on_paper:
        text = text.replace("@media print", "@media all")
    copy = folder / "page.html"
    copy.write_text(text.replace("</body>", f"{MEASURE}</body>"))
    dom = browse(copy, folder, f"--window-size={PAPER},3000", "--dump-dom")
    return json.loads(html.unescape(re.search(r'data-found="([^"]*)"', dom).group(1)))


def test_a_printed_page_shows_whole_tables_on_white(report, tmp_path):
    assert measure(report, tmp_path, on_paper=True) == {"wide": [], "dark": [], "torn": []}


def test_what_could_not_be_printed_would_be_found(report, tmp_path):
    found = measure(report, tmp_path, on_paper=False)
    assert "DIV.scroll" in found["wide"]
    assert found["dark"] == ["PRE."]
    assert "TR." in found["torn"]


def test_the_page_prints(report, tmp_path):
    target = tmp_path / "report.pdf"
    browse(report, tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={target}")
    pages = re.findall(rb"/Type\s*/Page\b", target.read_bytes())
    assert 2 <= len(pages) <= 8


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
    assert re.search(r"<strong>fp32, exact</strong> gave the same answer every time", text)
    assert "<td>0 %</td>" in text, "the accuracy of answers that are all wrong"
    assert text.count("<svg") == 4


def test_what_flips_on_given_text_only_is_not_said_to_answer_twice(tmp_path):
    one = Configuration(precision="fp32")
    two = dataclasses.replace(one, batch_size=2)
    plan = StudyPlan(model="m", greedy=(one, two), forced=(one, two), prompts=1, max_new_tokens=1)
    store = Store.open(tmp_path / "out", plan, {"environment": page_environment(), "command": "c"})
    first, second = torch.eye(2, 5)[:1], torch.eye(2, 5)[1:]
    for unit in plan.units:
        if unit.kind == "greedy":
            store.save_answers(unit, 0, batch([[0]]))
        else:
            other = unit.configuration.batch_size == 2
            reference = scores_of(first)
            store.save_scores(unit, 0, [scores_of(second, reference) if other else reference])
    text = page.write(store, evaluate(store)).read_text()
    assert "<strong>fp32</strong> preferred another token on given text" in text
    assert "gave more than one answer" not in text


def test_the_page_tells_right_answers_by_domain(tmp_path):
    """A domain's name comes from a user's file: it is text, too."""
    one = Configuration(precision="fp32")
    plan = StudyPlan(model="m", greedy=(one, dataclasses.replace(one, batch_size=2)), prompts=2)
    store = Store.open(tmp_path / "out", plan, {"environment": page_environment(), "command": "c"})
    for unit in plan.units:
        right = unit.configuration.batch_size == 2
        found = [Answer(f"q{i}", (1,), (0.5,), "", None, right or i == 1) for i in range(2)]
        store.save_answers(unit, 0, Batch(tuple(found), 1.0))
    tasks = [
        Task(id=f"q{i}", kind="number", question="?", answer="1", tolerance="0", domain=domain)
        for i, domain in enumerate((EVIL, "law"))
    ]
    text = page.write(store, evaluate(store, tasks)).read_text()
    table = text[text.index("Right answers by domain") :]
    table = table[: table.index("</table>")]
    cells = re.findall(r"<td>(.*?)</td>", table)
    assert cells == ["fp32", "0 to 100 %", "100 %"]
    assert "law,<br>1 prompts" in table
    assert "&lt;script&gt;" in table
    assert "<script" not in table
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["precisions"][0]["domains"]["law"]["Accuracy"] == {
        "batch 1": 100.0,
        "batch 2": 100.0,
    }


def test_every_figure_is_there_as_svg_and_png(report):
    for name in ("survival", "depth", "margins", "cost"):
        folder = report.parent / "plots"
        assert (folder / f"{name}.svg").read_text().startswith("<svg")
        assert Image.open(folder / f"{name}.png").width > 600
