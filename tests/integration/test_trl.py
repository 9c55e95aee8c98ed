"""TRL's trainers derive from Trainer, so HealCallback compiles there, too, but for their head."""

import warnings

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import Trainer

from healpass import HealConfig
from healpass.errors import StrictError
from healpass.integrations.trainer import HealCallback
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.rewriting import Rewritten
from tests.support.tiny_llama import make_llama

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")


@pytest.fixture(autouse=True)
def no_gradients():
    """The folder's tests run without gradients; this trains."""
    with torch.enable_grad():
        yield


@pytest.fixture
def supervised(tmp_path):
    """Makes a trainer of TRL for one step on two texts, with a HealCallback."""

    def make(peft_config=None, bf16=False, kind=trl.SFTTrainer, **options):
        tokenizer = byte_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        texts = [{"text": "a tide rises"}, {"text": "and it falls"}] * 2
        settings = trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=2,
            max_length=16,
            use_cpu=True,
            bf16=bf16,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind(
                model=make_llama(torch.float32, vocab_size=len(tokenizer)),
                args=settings,
                train_dataset=datasets.Dataset.from_list(texts),
                processing_class=tokenizer,
                peft_config=peft_config,
                callbacks=[HealCallback(**{"kv": "int24"} | options)],
            )

    return make


def train(trainer):
    """Train with graphs rewritten and run by torch; returns the compiler."""
    counters.clear()
    torch._dynamo.reset()
    compiler = Rewritten(trainer.model, HealConfig(outputs="fp32", kv="int24"), aot=True)
    trainer.model.compile(backend=compiler._backend, dynamic=True)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0
    assert compiler.nodes
    assert not compiler.kept
    return compiler


def test_a_supervised_step(supervised):
    """As TRL has it: the graph ends at the head, which is torch's."""
    with pytest.warns(UserWarning, match="whose product with the output weights is torch's"):
        train(supervised())
    assert counters["graph_break"]


class OwnLogits(trl.SFTTrainer):
    """What the warning recommends."""

    compute_loss = Trainer.compute_loss


def test_a_supervised_step_with_the_models_own_logits(supervised):
    trainer = supervised(kind=OwnLogits)
    del trainer.model.forward
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*TRL has put a fused head")
        compiler = train(trainer)
    assert not counters["graph_break"]
    weights = [name for name, p in trainer.model.named_parameters() if p.ndim == 2]
    linears = [node for node in compiler.reports[0].nodes if node.op == "linear"]
    assert len(linears) == len(weights) - 1, "all but the embedding, so the head is among them"


def begin(trainer):
    """What Trainer tells its callbacks before the first step."""
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


def end_evaluation(trainer):
    """What it tells them after an evaluation, also where nothing was trained."""
    trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics={})


@pytest.mark.parametrize("event", [begin, end_evaluation], ids=["train", "evaluate"])
@pytest.mark.parametrize("wrapped", ["plain", "autocast", "lora"])
def test_the_fused_head_is_found(supervised, wrapped, event):
    adapter = None
    if wrapped == "lora":
        adapter = pytest.importorskip("peft").LoraConfig(task_type="CAUSAL_LM", r=2)
    trainer = supervised(adapter, bf16=wrapped == "autocast")
    if wrapped == "autocast":
        trainer.accelerator.prepare_model(trainer.model)  # as train() does
    with pytest.warns(UserWarning, match="TRL has put a fused head into this model's forward"):
        event(trainer)


def test_strict_refuses_the_fused_head(supervised):
    with pytest.raises(StrictError, match="precision='exact' was asked for, but TRL"):
        begin(supervised(precision="exact", strict=True))


@pytest.mark.parametrize("way", ["head taken off", "no precision"])
def test_nothing_is_said_where_the_head_does_no_harm(supervised, way):
    """The inverse: without TRL's head, or where nothing was promised."""
    trainer = supervised(**{"precision": "traced", "kv": None} if way == "no precision" else {})
    if way == "head taken off":
        del trainer.model.forward
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begin(trainer)
