"""Runs whose own tensors make another number of neurons in the mlp than their layer does."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

import shoal.auto  # noqa: F401 - tells transformers of planned checkpoints
from shoal.decoding.fast import FastDecoder
from shoal.errors import PlanError, WriteError
from shoal.fitting.result import Job
from shoal.live import apply, running
from shoal.models.inspect import inspect
from shoal.models.load import inspect_source
from shoal.models.opened import open_model
from shoal.models.stacks import find_stack
from shoal.plan import Plan, cost, shapes_of
from shoal.plan.moved import moved
from shoal.plan.spec import NeuronSpec
from shoal.transforms.narrow import narrow
from shoal.writing.folder import write
from shoal.writing.planned_folder import write_planned

from .families import FAMILIES, VOCAB, tiny
from .planted import random_data
from .references import CLOSE
from .shares import every

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
DENSE = [
    "llama", "gpt2", "phi3", "opt", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt_neox", "smollm3",
    "olmo2", "granite", "cohere2", "falcon", "bloom", "gptj", "gpt_neo", "stablelm", "phi", "starcoder2", "deepseek_v3",
    "llama4_text", "jamba",
]  # fmt: skip
"""Families with a dense mlp in layer 0."""
KEPT = torch.randperm(64, generator=torch.Generator().manual_seed(2))[:24]


def logits(model: Any, **batch: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**({"input_ids": IDS, "use_cache": False} | batch)).logits
    return found


def in_pieces(model: PreTrainedModel, kind: str) -> torch.Tensor:
    """Logits of a prefill, of two tokens and of single ones over a cache."""
    static = kind == "static"
    cache = StaticCache(config=model.config, max_cache_len=12) if static else DynamicCache(config=model.config)
    ends = ((0, 4), (4, 6), (6, 7), (7, 8), (8, 9))
    return torch.cat([logits(model, input_ids=IDS[:, a:b], past_key_values=cache, use_cache=True) for a, b in ends], 1)


def neurons(model: PreTrainedModel, layer: int = 0) -> NeuronSpec:
    found = open_model(model).spec.stack().layers[layer].neurons
    assert found is not None
    return found


def of_neurons(model: PreTrainedModel, chosen: torch.Tensor, layer: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of a run that has these neurons of the layer. Where a matrix has two places for each, as phi3's, the
    second stand behind all first."""
    spec, made = neurons(model, layer), {}
    for one in spec.tensors:
        held = find_stack(model).layer(layer).get_parameter(one.name).detach()
        places = torch.cat([chosen + spec.count * half for half in range(spec.places(one, 1))])
        made[f"x.{one.name}"] = held.index_select(one.dim, places)
    return made


def without_others(model: PreTrainedModel, chosen: torch.Tensor, layer: int = 0) -> PreTrainedModel:
    """The same by hand: nobody reads the other neurons of the layer."""
    spec, made = neurons(model, layer), copy.deepcopy(model)
    gone = torch.tensor(sorted(set(range(spec.count)) - set(chosen.tolist())))
    with torch.no_grad():
        find_stack(made).layer(layer).get_parameter(spec.reads.name).index_fill_(spec.reads.dim, gone, 0)
    return made


def twice(model: PreTrainedModel, layer: int = 0) -> dict[str, torch.Tensor]:
    """Each neuron two times, and read by half as much."""
    spec = neurons(model, layer)
    made = of_neurons(model, torch.arange(spec.count).repeat(2), layer)
    return made | {f"x.{spec.reads.name}": made[f"x.{spec.reads.name}"] / 2}


@pytest.mark.parametrize("family", every(4, DENSE))
def test_fewer_neurons_are_as_if_nobody_read_the_others(family: str, tmp_path: Path) -> None:
    """Live, cached, over a static cache, in a planned checkpoint; and they are held and counted once."""
    model = tiny(family, "eager")
    new = of_neurons(model, KEPT)
    by_hand = without_others(model, KEPT)
    want = logits(by_hand)
    assert not torch.allclose(want, logits(model), atol=1e-3)
    with running(model, "0:x,1-3", new):
        live = logits(model)
        torch.testing.assert_close(live, want, **CLOSE)
        for kind in ("dynamic", "static"):
            if (family, kind) != ("jamba", "static"):  # a static cache holds no recurrent states
                torch.testing.assert_close(in_pieces(model, kind), in_pieces(by_hand, kind), **CLOSE)
    torch.testing.assert_close(logits(model), logits(copy.deepcopy(model)), rtol=0, atol=0)
    spec = open_model(model).spec
    priced, plain = cost("0:x,1-3", spec, weights=shapes_of(new)), cost("0-3", spec)
    sizes = spec.stack().layers[0].sizes
    less = {name: sizes[name.removeprefix("x.")] - t.numel() for name, t in new.items()}
    assert plain.params - priced.params == sum(less.values()) > 0
    assert plain.decode_flops - priced.decode_flops == 2 * sum(less[name] for name, t in new.items() if t.dim() > 1)
    assert plain.kv_elements == priced.kv_elements
    written = write_planned(model, "0:x,1-3", tmp_path / "m", weights=new, prove=False)
    assert written.params == priced.params
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="eager")
    torch.testing.assert_close(logits(loaded), live, **CLOSE)
    assert sum(p.numel() for p in loaded.parameters()) == priced.params
    held = json.loads((tmp_path / "m" / "config.json").read_text())
    assert held.get("slots") is None, "no stock config has two widths"


@pytest.mark.parametrize("family", every(4, DENSE))
def test_neurons_that_stand_twice_change_nothing(family: str) -> None:
    model = tiny(family, "eager")
    new = twice(model)
    with running(model, "0:x,1-3", new):
        torch.testing.assert_close(logits(model), logits(copy.deepcopy(model)), **CLOSE)
    spec = open_model(model).spec
    assert cost("0:x,1-3", spec, weights=shapes_of(new)).params - cost("0-3", spec).params == sum(
        tensor.numel() // 2 for name, tensor in new.items()
    )


def test_which_layers_have_neurons() -> None:
    """Experts have none, nor has a mixer without an mlp; what stands between is asked of the graph, not of names."""
    assert sorted(set(FAMILIES) - set(DENSE)) == [
        "gemma3n_text", "gpt_oss", "mamba2", "mixtral", "nemotron_h", "qwen2_moe", "qwen3_moe",
    ]  # fmt: skip
    found = {
        name: [one.neurons.count if one.neurons else 0 for one in inspect(tiny(name, "eager")).stack().layers]
        for name in FAMILIES
    }
    wider = {"falcon": 128, "bloom": 128, "gptj": 128}
    assert {name: found[name][0] for name in DENSE} == dict.fromkeys(DENSE, 64) | wider
    assert {name: found[name] for name in FAMILIES if len(set(found[name])) > 1} == {
        "deepseek_v3": [64, 64, 0, 0], "qwen3_moe": [0, 0, 64, 0], "qwen2_moe": [64, 0, 64, 0],
        "llama4_text": [64, 0, 64, 0],
    }  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_the_meta_device_tells_as_much(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path)
    assert [one.neurons for one in inspect_source(str(tmp_path)).stack().layers] == [
        neurons(model, i) for i in range(4)
    ]


@pytest.mark.parametrize("plan", ["0,1:x,2-3", "0,1a,1m:x,2-3", "0-1,1:x,2-3", "0,1m=x,2m=x,3"])
def test_in_every_kind_of_run(plan: str) -> None:
    """Alone, beside a run of the layer with its own, and shared by several runs."""
    model = tiny("llama")
    new = of_neurons(model, KEPT, 1)
    by_hand = without_others(model, KEPT, 1)
    if "=" in plan:
        find_stack(by_hand).layer(2).mlp.load_state_dict(find_stack(by_hand).layer(1).mlp.state_dict())
    want = {"0-1,1:x,2-3": None}.get(plan, plan.replace(":x", "").replace("=x", ""))
    with running(by_hand, want or "0,1,1,2-3"):
        wanted = logits(by_hand)
    with running(model, plan, new):
        found = logits(model)
    if want is not None:
        torch.testing.assert_close(found, wanted, **CLOSE)
    else:
        assert not torch.allclose(found, wanted, atol=1e-3)


def test_fewer_bytes_are_moved() -> None:
    model = tiny("llama")
    spec, new = open_model(model).spec, shapes_of(of_neurons(model, KEPT))
    plain, fewer = moved("0-3", spec), moved("0:x,1-3", spec, weights=new)
    assert plain.weights - fewer.weights == 4 * 3 * 32 * (64 - 24) and plain.kv == fewer.kv


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_they_learn_as_modules_too(family: str) -> None:
    model = copy.deepcopy(tiny(family))
    new = of_neurons(model, KEPT)
    found = []
    for modules in (False, True):
        own = {name: tensor.clone().requires_grad_(not modules) for name, tensor in new.items()}
        handle = apply(model, "0:x,1-3", own, modules=modules)
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        found.append({name: (own if not modules else handle.tensors)[name].grad for name in own})
        handle.restore()
    for name, gradient in found[0].items():
        assert gradient is not None and bool(gradient.any())
        torch.testing.assert_close(found[1][name], gradient, **CLOSE)


@pytest.mark.parametrize("mode", ["off", "layers"])
def test_the_fast_loop_writes_the_same(mode: Any) -> None:
    model = copy.deepcopy(tiny("llama"))
    new, asked = of_neurons(model, KEPT), {"max_new_tokens": 8, "do_sample": False}
    with running(model, "0:x,1-3", new):
        want = model.generate(IDS, **asked)
    fast = FastDecoder(model, "0:x,1-3", new, mode=mode, backend="eager")
    assert torch.equal(fast.generate(IDS, **asked), want)
    assert not torch.equal(model.generate(IDS, **asked), want)


UNFIT: dict[str, tuple[str, dict[str, tuple[int, ...]], str]] = {
    "one of three": ("llama", {"mlp.up_proj.weight": (24, 32)}, "24 neurons in mlp.up_proj.weight and 64 in"),
    "another number": (
        "llama",
        {"mlp.up_proj.weight": (24, 32), "mlp.gate_proj.weight": (24, 32), "mlp.down_proj.weight": (32, 20)},
        "20 neurons in mlp.down_proj.weight and 24 in",
    ),
    "without the bias": ("gpt2", {"mlp.c_fc.weight": (32, 24), "mlp.c_proj.weight": (24, 32)}, "and 64 in mlp.c_fc.b"),
    "no whole number": ("phi3", {"mlp.gate_up_proj.weight": (25, 32), "mlp.down_proj.weight": (32, 12)}, "holds .128"),
    "another hidden size": ("llama", {"mlp.up_proj.weight": (24, 30)}, "holds .64, 32. there"),
    "none": ("llama", {"mlp.up_proj.weight": (0, 32)}, "holds .64, 32. there"),
    "with factors": (
        "llama",
        {
            "mlp.up_proj.weight": (24, 32), "mlp.gate_proj.weight": (24, 32), "mlp.down_proj.weight": (32, 24),
            "mlp.down_proj.up": (32, 2), "mlp.down_proj.down": (2, 64),
        },
        "multiply it into the matrix",
    ),
    "experts": ("mixtral", {"mlp.experts.down_proj": (4, 32, 24)}, "holds .4, 32, 64. there"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_is_refused(case: str) -> None:
    family, shapes, why = UNFIT[case]
    new = {f"x.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(PlanError, match=why) as caught:
        running(tiny(family), "0:x,1-3", new).__enter__()
    assert caught.value.code == "P129"


def test_a_stock_checkpoint_of_unlike_widths_is_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    with pytest.raises(WriteError, match=r"24 neurons.*as planned") as caught:
        write(model, "0:x,1-3", tmp_path / "m", weights=of_neurons(model, KEPT))
    assert caught.value.code == "W276"
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("word", ["scale", "shift", "up"])
def test_what_stands_beside_a_matrix_of_another_size_is_refused(word: str) -> None:
    """A factor, a scale or a shift beside a matrix whose neurons are fewer is P129; one number for all of them fits."""
    model = tiny("llama")
    made = narrow(Job(model, random_data(2, 8), Plan.identity(inspect(model))), keep=0.5, layers="1", by="magnitude")
    out = find_stack(model).layer(1).mlp.up_proj.weight.shape[0]
    beside = {f"narrow-1.mlp.up_proj.{word}": torch.ones((out, 2) if word == "up" else (out,))}
    beside |= {"narrow-1.mlp.up_proj.down": torch.ones(2, 32)} if word == "up" else {}
    with (
        pytest.raises(PlanError, match="stands beside") as caught,
        running(model, made.plan, {**made.weights, **beside}),
    ):
        pass
    assert caught.value.code == "P129"
    with running(model, made.plan, {**made.weights, "narrow-1.mlp.up_proj.scale": torch.ones(1)}):
        assert torch.isfinite(logits(model)).all()
