"""Whole models under `precision="exact"`: zero differing bits, whatever runs beside or around."""

from __future__ import annotations

import copy
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import healpass
from healpass.integrations import smollm2
from healpass.integrations.transformers import HealCache
from tests.support.bits import differing
from tests.support.families import DECODER_ONLY, FAMILIES
from tests.support.rewriting import Rewritten

BF16 = torch.bfloat16
OPTIONS = {"precision": "exact", "outputs": "fp32"}
CONFIG = healpass.HealConfig(**OPTIONS)
#: Families and prompts that `make test` compiles with Inductor; `make test-deep` compiles all.
INDUCTOR = (("qwen3", 2), ("mistral", 1))
#: What a family computes that has no exact operator.
KEPT = {"vit": {"conv2d"}}


def tiny(name: str):
    (family,) = (family for family in FAMILIES if family.name == name)
    return family.pair(0, BF16)[0], family.inputs(BF16)


def rewritten(model, **options) -> Rewritten:
    return Rewritten(model, healpass.HealConfig(**(OPTIONS | options)))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_logits_do_not_depend_on_who_adds(family):
    """The rewritten graph as it is, and with every product as a GPU generation would add it."""
    model, inputs = family.pair(0, BF16)[0], family.inputs(BF16)
    plain = rewritten(model)
    first = plain(**inputs).logits
    assert set(plain.kept) == KEPT.get(family.name, set())
    torch._dynamo.reset()
    again = rewritten(model, debug={"simulate": "h100", "order": 3})(**inputs).logits
    assert differing(again, first) == 0


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_logits_are_close_to_fp64(family):
    """Five products and INT16, eight and INT24: both within what is promised for SmolLM2,
    which holds for tiny random models too."""
    model, exact = family.pair(0, BF16)
    truth = exact(**family.inputs(torch.float64)).logits
    for options, worst in (
        ({}, 1.6e-4),
        ({"exact_products": 8, "kv": "int24"}, 5e-6),
    ):
        torch._dynamo.reset()
        logits = rewritten(model, **options)(**family.inputs(BF16)).logits
        error = float((logits.double() - truth).norm() / truth.norm())
        print(f"{family.name} {options}: error {error:.1e}, observed/bound {error / worst:.2f}")
        assert error <= worst


@pytest.mark.parametrize(("name", "prompts"), [
    pytest.param(f.name, rows, marks=() if (f.name, rows) in INDUCTOR else pytest.mark.deep)
    for f in FAMILIES if f.name not in KEPT  # torch's convolution may differ; it is listed
    for rows in (2, 1)
])  # fmt: skip
def test_compiled_logits_are_the_eager_ones(name, prompts):
    """One prompt is other loops than two, which Inductor joins and vectorizes in other ways."""
    model, inputs = tiny(name)
    given = {key: value[:prompts] for key, value in inputs.items()}
    eager = rewritten(model)(**given).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="heal", options=OPTIONS)
    assert differing(compiled(**given).logits, eager) == 0


@pytest.mark.deep
@pytest.mark.parametrize("simdlen", [256, 1], ids=["avx2", "scalar"])
def test_other_vector_widths_give_the_same_bits(simdlen):
    model, inputs = tiny("llama")
    eager = rewritten(model)(**inputs).logits
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.simdlen": simdlen}):
        compiled = torch.compile(model, backend="heal", options=OPTIONS)
        assert differing(compiled(**inputs).logits, eager) == 0


# ------------------------------------------------------------------------- batches and padding


def prompts(count: int, length: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(1, 96, (count, length), generator=generator)


def padded(row: torch.Tensor, left: int, right: int) -> dict[str, torch.Tensor]:
    """One prompt with padding and the position_ids that it has alone."""
    ids = torch.nn.functional.pad(row[None], (left, right))
    mask = torch.nn.functional.pad(torch.ones_like(row[None]), (left, right))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


@pytest.mark.parametrize("name", DECODER_ONLY)
def test_a_prompt_has_one_result_in_every_batch_and_padding(name):
    model, _ = tiny(name)
    call = rewritten(model)
    batch = prompts(17)
    alone = [call(**padded(row, 0, 0)).logits[0] for row in batch[:3]]
    for size in (2, 3, 8, 17):
        together = call(input_ids=batch[:size]).logits
        for index, row in enumerate(alone[:size]):
            assert differing(together[index], row) == 0
        assert differing(call(input_ids=batch[:size].flip(0)).logits[-1], alone[0]) == 0
    for left, right in ((3, 0), (0, 4), (2, 5)):
        result = call(**padded(batch[0], left, right)).logits[0, left : left + 9]
        assert differing(result, alone[0]) == 0


def test_heal_has_other_bits_in_another_order():
    """The inverse: the default precision fails the check of the test above it."""
    model, inputs = tiny("llama")
    results = []
    for rule in ("a100", "h100"):
        torch._dynamo.reset()
        config = healpass.HealConfig(outputs="fp32", debug={"simulate": rule})
        results.append(Rewritten(model, config)(**inputs).logits)
    assert differing(*results) > 0


def test_without_the_pass_bits_differ():
    """The inverse: exact products alone do not make a model exact; softmax and norms count."""
    model, inputs = tiny("llama")
    first = rewritten(model)(**inputs).logits
    torch._dynamo.reset()
    assert differing(rewritten(model, debug={"disable": ("exact",)})(**inputs).logits, first) > 0


# -------------------------------------------------------------------------- chunks and decoding


def in_chunks(call, config, ids: torch.Tensor, chunk: int) -> torch.Tensor:
    """The logits of a prompt fed through a cache, `chunk` tokens at a time.

    The cache is ours: a BF16 cache of the caller's would round keys and values once more.
    """
    cache, logits = HealCache(config), []
    for start in range(0, ids.shape[1], chunk):
        part = ids[:, start : start + chunk]
        positions = torch.arange(start, start + part.shape[1])[None].expand_as(part)
        output = call(
            input_ids=part, past_key_values=cache, use_cache=True, position_ids=positions
        )
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_chunked_prefill_and_decode_give_the_bits_of_one_pass(name):
    model, _ = tiny(name)
    call = rewritten(model)
    ids = prompts(2, 12)
    whole = call(input_ids=ids).logits
    for chunk in (1, 5, 7):
        assert differing(in_chunks(call, model.config, ids, chunk), whole) == 0


# ---------------------------------------------------------------------------- other processors

DIGEST = """
import hashlib, sys
import torch
sys.path.insert(0, {root!r})
from tests.support.rewriting import Rewritten
import healpass
from healpass.ops.products.exact import fastest_route
model, inputs = torch.load({saved!r}, weights_only=False)
with torch.no_grad():
    logits = Rewritten(model, healpass.HealConfig(**{options!r}))(**inputs).logits
digest = hashlib.sha256(logits.numpy().tobytes()).hexdigest()
print(digest, torch.backends.cpu.get_cpu_capability(), fastest_route("cpu"))
"""
ISAS = {
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "default": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "AVX512_CORE": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "AVX512_CORE_VNNI": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
}


def digest(saved: Path, variables: dict[str, str]) -> list[str]:
    """Digest of the logits, ATen's capability and the route of products, in a new process.

    Model and inputs are read, not made: torch's random numbers differ between capabilities.
    """
    root = str(Path(__file__).parents[2])
    code = DIGEST.format(root=root, saved=str(saved), options=OPTIONS)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | variables,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-3:]


@pytest.mark.parametrize("isa", [
    "AVX2", *(pytest.param(isa, marks=pytest.mark.deep) for isa in ISAS if isa != "AVX2")
])  # fmt: skip
def test_other_instruction_sets_give_the_same_bits(isa, tmp_path):
    """Where oneDNN saturates, the self-test finds it and the products take the FP64 route."""
    model, inputs = tiny("llama")
    logits = rewritten(model)(**inputs).logits
    here = hashlib.sha256(logits.numpy().tobytes()).hexdigest()
    torch.save((model, inputs), tmp_path / "model")
    there, capability, route = digest(tmp_path / "model", ISAS[isa])
    print(f"{isa}: ATen at {capability}, products by {route}")
    assert there == here


# ------------------------------------------------------------------------------------- SmolLM2


@pytest.fixture(scope="module")
def smol():
    """Two layers of SmolLM2 with a vocabulary of 2,000: its real widths and weights."""
    return smollm2.load(BF16, layers=2, vocabulary=2000)


TEXTS = ("The same question, asked twice,", "gets the same answer on every machine there is.")


@pytest.mark.model
def test_smollm2_has_one_result_in_batches_paddings_chunks_and_generations(smol):
    model, tokenizer = smol
    call = rewritten(model)
    rows = [tokenizer(text, return_tensors="pt")["input_ids"][0] for text in TEXTS]
    alone = [call(**padded(row, 0, 0)).logits[0] for row in rows]
    longest = max(map(len, rows))
    for side in ("left", "right"):
        gaps = [longest - len(row) for row in rows]
        sides = [(gap, 0) if side == "left" else (0, gap) for gap in gaps]
        parts = [padded(row, *gap) for row, gap in zip(rows, sides, strict=True)]
        batch = call(**{key: torch.cat([part[key] for part in parts]) for key in parts[0]})
        for index, (left, _) in enumerate(sides):
            result = batch.logits[index, left : left + len(rows[index])]
            assert differing(result, alone[index]) == 0
    assert differing(in_chunks(call, model.config, rows[0][None], 1)[0], alone[0]) == 0
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert differing(call(**padded(rows[0], 0, 0)).logits[0], alone[0]) == 0
    finally:
        torch.set_num_threads(threads)


@pytest.mark.model
def test_smollm2_under_a_generations_rule_in_another_order(smol):
    model, tokenizer = smol
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"][:, :4]
    first = rewritten(model)(input_ids=ids).logits
    torch._dynamo.reset()
    assert (
        differing(
            rewritten(model, debug={"simulate": "a100", "order": 1})(input_ids=ids).logits, first
        )
        == 0
    )


@pytest.mark.model
@pytest.mark.deep
def test_smollm2_compiled_is_eager_in_prefill_and_decode(smol):
    model, tokenizer = smol
    ids = tokenizer(TEXTS[1], return_tensors="pt")["input_ids"]
    eager = rewritten(model)(input_ids=ids).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="heal", options=OPTIONS)
    assert differing(compiled(input_ids=ids).logits, eager) == 0
    assert differing(in_chunks(compiled, model.config, ids, 1), eager) == 0


def with_heavy_tails(model):
    """Every matrix's elements divided by powers of uniform numbers: a few are large."""
    generator = torch.Generator().manual_seed(3)
    model = copy.deepcopy(model)
    for weight in model.parameters():
        if weight.dim() == 2:
            uniform = torch.rand(weight.shape, generator=generator).clamp(min=1e-6)
            weight.copy_(weight / uniform**0.3)
    return model


@pytest.mark.model
@pytest.mark.parametrize("tails", ["plain", "heavy"])
def test_smollm2_is_close_to_fp64(smol, tails):
    """Its widths, two layers of it; once with heavier tails than a 4-bit file's weights have."""
    model, tokenizer = smol
    model = with_heavy_tails(model) if tails == "heavy" else model
    ids = tokenizer(TEXTS[1], return_tensors="pt")["input_ids"]
    truth = copy.deepcopy(model).double()(input_ids=ids, use_cache=False).logits
    for options, worst in (({}, 1.6e-4), ({"exact_products": 8, "kv": "int24"}, 5e-6)):
        torch._dynamo.reset()
        logits = rewritten(model, **options)(input_ids=ids, use_cache=False).logits
        error = float((logits.double() - truth).norm() / truth.norm())
        print(f"{tails} {options}: error {error:.1e}, observed/bound {error / worst:.2f}")
        assert error <= worst


# ------------------------------------------------------------------------------------ training


def test_a_training_step_has_the_same_gradients_under_every_rule():
    """Loss and gradients of all parameters of a small network, through AOTAutograd."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(12, 16), torch.nn.LayerNorm(16), torch.nn.GELU(), torch.nn.Linear(16, 7)
    )
    x, target = torch.randn(20, 12), torch.randint(0, 7, (20,))

    def loss(x, target):
        return torch.nn.functional.cross_entropy(network(x), target)

    def gradients(**options):
        torch._dynamo.reset()
        network.zero_grad()
        with torch.enable_grad():
            call = Rewritten(loss, healpass.HealConfig(**(OPTIONS | options)), aot=True)
            call(x, target).backward()
        return [p.grad.clone() for p in network.parameters()]

    first = gradients()
    for rule in ("v100", "a100", "b200"):
        assert differing(gradients(debug={"simulate": rule, "order": 2}), first) == 0
