"""`healpass explain --vllm`: what runs where in an engine, and every reason of a refusal."""

from __future__ import annotations

import pytest

from healpass.errors import UnavailableError
from healpass.integrations.vllm.explained import explain
from tests.support.engines import save_model


def test_layers_pages_and_graphs(llama):
    found = explain(llama, {"precision": "exact"}, {"max_model_len": 64})
    print(found.text())
    runs = {layer.name: layer.runs for layer in found.layers}
    assert runs["model.layers.1.mlp.down_proj"] == "heal::linear, exact5"
    assert runs["model.layers.1.self_attn.attn"] == "heal::paged_attention, int16 pages"
    assert runs["model.layers.0.self_attn.rotary_emb"] == "table by heal:: functions"
    assert runs["model.embed_tokens"] == "rows, in FP32"
    assert {layer.weight for layer in found.layers if "proj" in layer.name} == {"bfloat16"}
    (pages,) = found.pages
    assert "264 bytes per token and head, 1584 per token" in str(pages)
    assert "model" in {graph.name for graph in found.graphs}
    assert [graph.kept for graph in found.graphs if graph.kept] == []


def test_other_options_are_seen(llama):
    options = {"precision": "heal", "kv": "int24"}
    found = explain(llama, options, {"max_model_len": 64, "enforce_eager": True})
    assert "392 bytes per token and head" in found.text()
    assert "vLLM's eager mode" in found.text()
    assert found.graphs == []
    assert "reference implementation" not in found.text()


def test_an_eager_engine_without_a_compiler_has_no_kernel_and_says_so(llama, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    found = explain(llama, {"precision": "exact"}, {"max_model_len": 64, "enforce_eager": True})
    runs = {layer.name: layer.runs for layer in found.layers}
    assert "no kernel can be compiled here" in runs["model.layers.1.self_attn.attn"]


def test_every_reason_of_a_refusal(tmp_path):
    engine = {"enforce_eager": True, "logprobs_mode": "processed_logprobs"}
    with pytest.raises(UnavailableError) as caught:
        explain(save_model("cohere", tmp_path), {"precision": "exact"}, engine)
    assert "not of CohereForCausalLM" in str(caught.value)
    assert "'processed_logprobs' is taken elsewhere" in str(caught.value)
