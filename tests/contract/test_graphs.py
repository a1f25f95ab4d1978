"""Graphs compute what the model computes, and are gone behind the block; what does not fit is refused by code."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import shoal
from shoal.errors import ShoalError, UsageError
from shoal.graphs import fused
from shoal.registry import entries

from .families import FAMILIES, tiny
from .shares import every, pairs

GRAPHS = list(entries("graphs"))
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))


BITS = {"siblings": 1e-5, "norms": 1e-4, "stack": 0.0}
"""How far logits may be apart in float32, as a share of the largest; 0 where the same bits are promised."""


def own(family: str) -> Any:
    """A copy whose norms have gains that matter."""
    model = copy.deepcopy(tiny(family, "sdpa" if family == "llama" else "eager"))  # not all families have sdpa
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 and parameter.numel() in (8, 32):
                parameter.add_(torch.rand_like(parameter) * 0.5)
    return model


def decoded(model: Any) -> torch.Tensor:
    """Logits of a prefill and of three steps from its cache, and those of one pass beside them."""
    with torch.no_grad():
        out = model(IDS[:, :6], use_cache=True)
        name = "past_key_values" if getattr(out, "past_key_values", None) is not None else "cache_params"
        found = [out.logits]
        for at in range(6, 9):
            position = {} if name == "cache_params" else {"position_ids": torch.tensor([[at]])}
            out = model(IDS[:, at : at + 1], **{name: getattr(out, name)}, use_cache=True, **position)
            found.append(out.logits)
        return torch.cat([*found, model(IDS, use_cache=False).logits], 1)


def apart(have: torch.Tensor, want: torch.Tensor) -> float:
    return float((have - want).abs().max() / want.abs().max())


@pytest.mark.parametrize(("family", "graph"), pairs(2, FAMILIES, GRAPHS))
def test_a_graph_computes_what_the_model_computes_and_leaves_no_trace(family: str, graph: str) -> None:
    model = own(family)
    dense, forwards = decoded(model), [vars(m).get("forward") for m in model.modules()]
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    refused = None
    try:
        with fused(model, graph) as handle:
            assert apart(decoded(model), dense) <= BITS[graph]
            assert sorted(model.state_dict()) == sorted(tensors)
            assert handle.graphs[0].replaced > 0
            assert handle.difference <= BITS[graph]
    except UsageError as error:
        refused = error.code
    assert refused in (None, "U662")
    after = model.state_dict()
    assert all(torch.equal(after[name], t) for name, t in tensors.items())
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
    assert [vars(m).get("forward") for m in model.modules()] == forwards
    assert torch.equal(decoded(model), dense)
    assert "_shoal_graphs" not in vars(model)


FITS = {
    "siblings": {"llama", "qwen2", "qwen3", "mistral", "gemma2", "olmo2", "granite", "opt", "smollm3", "phi", "jamba"},
    "norms": {"llama", "qwen2", "qwen3", "mistral", "gemma2", "granite", "smollm3", "gemma3_text", "phi3"},
    "stack": {"llama", "qwen3", "phi3", "granite", "olmo2"},
}


@pytest.mark.parametrize(("graph", "family"), [(g, f) for g, fits in FITS.items() for f in sorted(fits)])
def test_these_families_fit(graph: str, family: str) -> None:
    """The product above would pass if everything were refused."""
    with fused(own(family), graph) as handle:
        assert handle.graphs[0].replaced >= 4


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_gains_are_gone(family: str) -> None:
    model = own(family)
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    neutral = 0.0 if family == "gemma3_text" else 1.0
    with fused(model, "norms") as handle:
        norm, q = model.model.layers[1].input_layernorm, model.model.layers[1].self_attn.q_proj
        assert torch.equal(norm.weight, torch.full_like(norm.weight, neutral))
        gain = plain["model.layers.1.input_layernorm.weight"] + (1 - neutral)
        assert torch.equal(q.weight, plain["model.layers.1.self_attn.q_proj.weight"] * gain)
        assert "model.norm" in handle.graphs[0].left or not model.config.tie_word_embeddings
    assert handle.difference > 0, "gains that matter are folded with rounding"


def test_a_head_that_is_tied_keeps_its_norm_and_one_of_its_own_takes_it() -> None:
    model = own("llama")
    model.config.tie_word_embeddings = False
    with fused(model, "norms") as handle:
        assert "model.norm" not in handle.graphs[0].left
    model.lm_head.weight = model.model.embed_tokens.weight
    with fused(model, "norms") as handle:
        assert "tied" in handle.graphs[0].left["model.norm"]


def test_siblings_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven products of a layer become four: q, k and v are one, gate and up another."""
    model, calls = own("llama"), []
    product = torch.nn.functional.linear

    def counted(*args: Any) -> torch.Tensor:
        calls.append(args[1].shape)
        return product(*args)

    monkeypatch.setattr("shoal.graphs.siblings.linear", counted)
    with fused(model, "siblings") as handle:
        calls.clear()
        with torch.no_grad():
            model(IDS)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if ".layers.0." in name}
        assert calls == [(64, 32), (128, 32)] * 4
        assert handle.graphs[0].replaced == 20
        storages = {p.untyped_storage().data_ptr() for p in model.model.layers[0].self_attn.parameters()}
        assert len(storages) == 2, "views of one matrix, and the output's own"
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (32, 32)


def test_gradients_reach_the_parameters_under_siblings() -> None:
    model = own("llama")
    model(IDS).logits.sum().backward()
    want = model.model.layers[0].self_attn.k_proj.weight.grad.clone()
    model.zero_grad()
    with fused(model, "siblings"):
        model(IDS).logits.sum().backward()
    assert torch.equal(model.model.layers[0].self_attn.k_proj.weight.grad, want)


def test_matrices_that_were_exchanged_meanwhile_are_used() -> None:
    model = own("llama")
    layer = model.model.layers[0].self_attn
    with fused(model, "siblings"):
        layer.k_proj._parameters["weight"], before = nn.Parameter(layer.k_proj.weight * 2), layer.k_proj.weight
        have = decoded(model)
        layer.k_proj._parameters["weight"] = before
    layer.k_proj.weight.data *= 2
    assert apart(have, decoded(model)) < 1e-6


@pytest.mark.parametrize("graph", ["norms", "siblings"])
@pytest.mark.parametrize("plan", ["0-1,3", "0,1a,2m,3", "0,1x2,2-3", "0-1,2@1,3", "0,(1|2),3"])
def test_with_a_plan(graph: str, plan: str) -> None:
    model = own("llama")
    with shoal.running(model, plan):
        want = decoded(model)
        with fused(model, graph):
            assert apart(decoded(model), want) < 1e-4
        assert torch.equal(decoded(model), want)


def test_tensors_of_a_plan_are_not_folded() -> None:
    model = own("llama")
    tensors = {"a.mlp.gate_proj.weight": torch.randn(64, 32)}
    with shoal.running(model, "0,1:a,2-3", tensors):
        want = decoded(model)
        with fused(model, "norms", "siblings") as handle:
            assert apart(decoded(model), want) < 1e-4
        assert "model.layers.1.post_attention_layernorm" in handle.graphs[0].left


def test_both_at_once_in_any_order() -> None:
    model = own("llama")
    dense, names = decoded(model), []
    for texts in (("norms", "siblings"), ("siblings", "norms")):
        with fused(model, *texts) as handle:
            names.append([graph.name for graph in handle.graphs])
            assert apart(decoded(model), dense) < 1e-4
            assert all(group._is_whole() for group in handle.graphs[1].groups)  # type: ignore[attr-defined]
    assert names == [["norms", "siblings"]] * 2
    assert torch.equal(decoded(model), dense)


def test_half_precision_has_a_limit_of_its_own() -> None:
    with fused(own("llama").to(torch.bfloat16), "norms") as handle:
        assert 0 < handle.difference < handle.limit == 5e-2


REFUSED = {
    "a norm with a bias": ("norms", "gpt2", "U662", "it has a bias"),
    "no two of one input": ("siblings", "gpt2", "U662", "no two linear modules"),
    "layers of two kinds": ("stack", "gemma2", "U662", "layer 1 is not made as layer 0"),
    "layers with and without rope": ("stack", "smollm3", "U662", "layer 2 is not made as layer 0"),
    "layers of two shapes": ("stack", "deepseek_v3", "U662", "layer 2 is not made as layer 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    graph, family, code, words = REFUSED[case]
    with pytest.raises(ShoalError, match=words) as caught, fused(own(family), graph):
        pass
    assert caught.value.code == code


@pytest.mark.parametrize("graph", GRAPHS)
def test_models_whose_matrices_are_elsewhere_are_refused(graph: str) -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(own("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    quantised = own("llama")
    quantised.config.quantization_config = {"quant_method": "gptq"}
    offloaded = own("llama")
    offloaded.model.layers[0].mlp._hf_hook = object()
    for model, words in ((wrapped, "merge_and_unload"), (quantised, "float dtype"), (offloaded, "load it whole")):
        with pytest.raises(UsageError, match=words) as caught, fused(model, graph):
            pass
        assert caught.value.code == "U662"


def test_no_plan_comes_behind_a_graph_and_no_graph_twice() -> None:
    model = own("llama")
    with fused(model, "siblings"), pytest.raises(UsageError, match="put the plan on first"):
        shoal.apply(model, "0-1,3")
    with pytest.raises(UsageError, match="given twice"), fused(model, "norms", "norms"):
        pass
    with shoal.running(model, "0-1,3"), pytest.raises(UsageError, match="a plan is running"), fused(model, "stack"):
        pass


def test_a_graph_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fold without its gain, as a reader that was not seen would have it."""
    monkeypatch.setattr("shoal.graphs.norms._readers", lambda norm, reads, linears: ())
    model = own("llama")
    dense = decoded(model)
    with pytest.raises(UsageError, match="logits differ by") as caught, fused(model, "norms"):
        pass
    assert caught.value.code == "U663"
    assert torch.equal(decoded(model), dense)


@pytest.mark.parametrize("cached", every(2, [False, True]))
def test_stack_is_a_scan_for_the_compiler(cached: bool) -> None:
    """One body is traced, whatever the depth; the eager backend keeps the test quick."""
    torch._dynamo.reset()
    model, graphs = own("llama"), []

    def backend(module: Any, _: Any) -> Any:
        graphs.append(module)
        return module.forward

    dense = decoded(model)
    with fused(model, "stack"), torch.no_grad():
        compiled = torch.compile(model, backend=backend)
        out = compiled(IDS[:, :6], use_cache=cached)
        have = out.logits
        if cached:
            step = compiled(IDS[:, 6:7], past_key_values=out.past_key_values, position_ids=torch.tensor([[6]]))
            have = torch.cat([have, step.logits], 1)
            assert out.past_key_values.get_seq_length() == 7
    assert apart(have, dense[:, : have.shape[1]]) < 1e-5
    scans = [node for module in graphs for node in module.graph.nodes if "scan" in str(node.target)]
    assert len(scans) >= 1 + cached
    torch._dynamo.reset()
