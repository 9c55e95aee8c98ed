"""How often a model compiles: two graphs for all lengths; none that the cache on disk has."""

import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters


@pytest.mark.parametrize("options", [{}, {"precision": "layercast"}], ids=["heal", "layercast"])
def test_one_graph_serves_all_lengths_and_one_the_single_token(llama, options):
    compiled = torch.compile(llama, backend="heal", dynamic=True, options=options)
    before = counters["stats"]["unique_graphs"]
    for length in (2, 3, 17, 64, 511, 512):
        compiled(torch.ones(1, length, dtype=torch.long), use_cache=False)
    assert counters["stats"]["unique_graphs"] == before + 1
    compiled(torch.ones(1, 1, dtype=torch.long), use_cache=False)
    compiled(torch.ones(1, 100, dtype=torch.long), use_cache=False)
    assert counters["stats"]["unique_graphs"] == before + 2


COMPILE_ONCE = """
import sys, torch, transformers
from torch._dynamo.utils import counters
torch.manual_seed(0)
config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
    num_hidden_layers=1, num_attention_heads=2)
model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
model.compile(backend="heal", dynamic=True, options={"outputs": sys.argv[1]})
with torch.no_grad():
    model(torch.ones(1, 8, dtype=torch.long), use_cache=False)
stats = counters["inductor"]
print("hits", stats["fxgraph_cache_hit"], "misses", stats["fxgraph_cache_miss"])
"""


def compile_in_a_process(folder, outputs):
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE_ONCE, outputs],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split("\n")[-2]


def test_a_second_process_finds_the_compiled_graph_and_another_option_does_not(tmp_path):
    assert compile_in_a_process(tmp_path, "traced") == "hits 0 misses 1"
    assert compile_in_a_process(tmp_path, "traced") == "hits 1 misses 0"
    assert compile_in_a_process(tmp_path, "fp32") == "hits 0 misses 1"
