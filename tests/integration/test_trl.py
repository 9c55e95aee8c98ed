"""TRL: SFTTrainer derives from Trainer, so HealCallback is enough there, too."""

import warnings

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from rewriting import Rewritten
from tiny_llama import make_llama

from healpass import HealConfig
from healpass.integrations.trainer import HealCallback

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")


@pytest.fixture(autouse=True)
def no_gradients():
    """The folder's tests run without gradients; this trains."""
    with torch.enable_grad():
        yield


def test_a_supervised_step(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    texts = datasets.Dataset.from_list([{"text": "a tide rises"}, {"text": "and it falls"}] * 2)
    settings = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        max_length=16,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trl.SFTTrainer(
            model=make_llama(torch.float32, vocab_size=len(tokenizer)),
            args=settings,
            train_dataset=texts,
            processing_class=tokenizer,
            callbacks=[HealCallback(kv="int24")],
        )
    compiler = Rewritten(trainer.model, HealConfig(outputs="fp32", kv="int24"), aot=True)
    trainer.model.compile(backend=compiler._backend, dynamic=True)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0
    assert compiler.nodes
    assert not compiler.kept
