"""transformers' Trainer with HealCallback, PEFT adapters in it, and saving and loading."""

import copy
import warnings

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from transformers import Trainer, TrainingArguments

from healpass import HealConfig
from healpass.errors import ConfigError
from healpass.integrations.trainer import DYNAMO, HealCallback
from healpass.integrations.transformers import heal_model
from tests.support.rewriting import Rewritten
from tests.support.tiny_llama import make_llama

ROWS = torch.arange(1, 73).reshape(8, 9) % 90 + 1


@pytest.fixture(autouse=True)
def no_gradients():
    """The folder's tests run without gradients; these train."""
    with torch.enable_grad():
        yield


def arguments(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 0,
    }
    return TrainingArguments(**settings | changes)


def trainer_of(model, folder, callbacks=(), **changes):
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    return Trainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=rows,
        eval_dataset=rows[:2],
        callbacks=list(callbacks),
    )


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def rewritten_by_torch(trainer):
    """Let torch run what HealCallback compiled, without Inductor; returns the compiler."""
    model = trainer.model
    compiler = Rewritten(model, HealConfig(outputs="fp32", kv="int24"), aot=True)
    model.compile(backend=compiler._backend, dynamic=True)
    return compiler


def run_by_torch(graph_module, inputs, *_):
    """What stands in for Inductor."""
    return aot_eager(graph_module, inputs)


def check_training_saving_and_loading(folder):
    """Losses of FP32, keys of the model, and files that load without HEAL."""
    plain = make_llama(torch.float32)
    expected = losses(trainer_of(copy.deepcopy(plain), folder / "plain"))
    model = copy.deepcopy(plain)
    trainer = trainer_of(model, folder / "heal", [HealCallback(kv="int24")])
    assert trainer.model is model
    found = losses(trainer)
    assert counters["stats"]["unique_graphs"] > 0, "the model was compiled"
    assert not counters["graph_break"]
    assert found == pytest.approx(expected, abs=1e-3), "logged with four digits"
    assert list(model.state_dict()) == list(plain.state_dict())
    trainer.save_model(str(folder / "saved"))
    again = type(model).from_pretrained(folder / "saved")
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_trainer_with_the_callback_trains_saves_and_loads(tmp_path, monkeypatch):
    """The callback's own backend, with torch in the place of Inductor."""
    monkeypatch.setattr("healpass.backend._inductor", run_by_torch)
    check_training_saving_and_loading(tmp_path)


@pytest.mark.deep
def test_trainer_with_inductor_trains_saves_and_loads(tmp_path):
    check_training_saving_and_loading(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        (torch.float32, {"gradient_checkpointing": True}),
        (torch.float32, {"bf16": True}),
        (torch.bfloat16, {}),
    ],
    ids=["checkpointing", "autocast", "bf16 weights"],
)
def test_nothing_is_kept_and_the_graph_is_whole(dtype, changes, tmp_path):
    """Gradient checkpointing, FP32 master weights under autocast, BF16 weights."""
    trainer = trainer_of(make_llama(dtype), tmp_path, [HealCallback()], max_steps=1, **changes)
    compiler = rewritten_by_torch(trainer)
    assert len(losses(trainer)) == 1
    assert compiler.nodes
    assert not compiler.kept
    assert not counters["graph_break"]


def test_evaluate_alone_is_compiled(tmp_path):
    trainer = trainer_of(make_llama(torch.float32), tmp_path, [HealCallback()])
    compiler = rewritten_by_torch(trainer)
    assert trainer.evaluate()["eval_loss"] > 0
    assert compiler.nodes


# --------------------------------------------------------------------------------- wrong use


def test_accelerate_refuses_the_name_which_is_why_there_is_a_callback(tmp_path):
    with pytest.raises(ValueError, match="'HEAL' is not a valid DynamoBackend"):
        trainer_of(make_llama(), tmp_path, torch_compile_backend="heal")


def test_a_second_compiler_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="exclude each other"):
        trainer_of(make_llama(), tmp_path, [HealCallback()], torch_compile=True)


def test_a_second_compiler_of_accelerate_launch_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(DYNAMO, "inductor")
    with pytest.raises(ConfigError, match=f"the environment says {DYNAMO}=inductor"):
        trainer_of(make_llama(), tmp_path, [HealCallback()])


@pytest.fixture
def tf32():
    """What Trainer does on a GPU: the switch is there without one, too."""
    switch = torch.backends.cuda.matmul
    before, switch.fp32_precision = switch.fp32_precision, "tf32"
    yield
    switch.fp32_precision = before


def test_tf32_is_refused(tmp_path, tf32):
    with pytest.raises(ConfigError, match="fp32_precision is 'tf32'"):
        trainer_of(make_llama(), tmp_path, [HealCallback()])


def test_a_wrong_option_is_refused_where_it_is_written():
    with pytest.raises(ConfigError, match="Did you mean 'precision'"):
        HealCallback(precisions="heal")


# -------------------------------------------------------------------------------------- PEFT


def lora(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)


def test_lora_trains_and_generates_in_heal(tmp_path):
    adapted = lora(make_llama())
    wide = copy.deepcopy(adapted).float()
    healed = heal_model(adapted, kv="int24")
    assert healed is adapted
    compiler = Rewritten(adapted, HealConfig(outputs="fp32", kv="int24"), aot=True)
    for module in (adapted.base_model, adapted.get_base_model()):
        module.compile(backend=compiler._backend, dynamic=True)
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    trainer = trainer_of(adapted, tmp_path, max_steps=1)
    trainer.train()
    moved = {name for name, value in adapted.state_dict().items() if (value != before[name]).any()}
    assert moved
    assert all("lora_" in name for name in moved), "the base stays frozen"
    assert compiler.nodes
    assert not compiler.kept
    adapted.load_state_dict(before)
    adapted.eval()
    greedy = {"do_sample": False, "max_new_tokens": 6}
    with torch.no_grad():
        expected = wide.eval().generate(input_ids=ROWS[:2], **greedy)
        assert torch.equal(adapted.generate(input_ids=ROWS[:2], **greedy), expected)
    assert not counters["graph_break"]


def test_lora_in_bf16_gives_other_logits_than_fp32():
    """The inverse of the test above: the same adapters, not compiled."""
    adapted = lora(make_llama())
    wide = copy.deepcopy(adapted).float()
    with torch.no_grad():
        assert not torch.equal(adapted(ROWS[:2]).logits.float(), wide(ROWS[:2]).logits)


def test_accelerate_prepares_a_model_that_heal_has_compiled(accelerate):
    model = heal_model(make_llama(torch.float32))
    compiler = Rewritten(model, HealConfig(outputs="fp32"), aot=True)
    model.compile(backend=compiler._backend, dynamic=True)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 1e-3))
    before = model.lm_head.weight.detach().clone()
    accelerator.backward(prepared(input_ids=ROWS, labels=ROWS, use_cache=False).loss)
    optimizer.step()
    assert (model.lm_head.weight != before).any()
    assert compiler.nodes
    assert not compiler.kept
