"""The Spec of a model is the same live, on the meta device and under PEFT, and says what the model really has."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from shoal.errors import ModelError
from shoal.models.inspect import inspect
from shoal.models.meta import meta_model
from shoal.models.opened import open_model
from shoal.models.stacks import find_stack
from shoal.plan import KVSpec

from .families import DEPTH, FAMILIES, tiny

# (attention, mlp) of every layer of a family
USUAL = (("self_attn",), ("mlp",))
PARTS: dict[str, list[tuple[Any, Any]]] = {family: [USUAL] * DEPTH for family in FAMILIES} | {
    **{family: [(("attn",), ("mlp",))] * DEPTH for family in ("gpt2", "gptj", "gpt_neo")},
    **{family: [(("self_attention",), ("mlp",))] * DEPTH for family in ("bloom", "falcon")},
    "gpt_neox": [(("attention",), ("mlp",))] * DEPTH,
    "opt": [(("self_attn",), ("fc1", "fc2"))] * DEPTH,
    "jamba": [(("mamba",), ("feed_forward",)), (("self_attn",), ("feed_forward",))] * 2,
    "llama4_text": [(("self_attn",), ("feed_forward",))] * DEPTH,
    **{family: [(None, None)] * DEPTH for family in ("mamba2", "nemotron_h", "gemma3n_text")},
}
FULL = KVSpec("full", 2, 8, 8)
WIDE = KVSpec("full", 4, 8, 8)
SLIDING = KVSpec("sliding", 2, 8, 8, window=6)
KV: dict[str, list[KVSpec]] = {family: [FULL] * DEPTH for family in FAMILIES} | {
    **{family: [WIDE] * DEPTH for family in ("gpt2", "gpt_neox", "opt", "bloom", "falcon", "gptj", "gpt_neo")},
    **{family: [FULL, SLIDING] * 2 for family in ("qwen2",)},
    **{family: [SLIDING, FULL] * 2 for family in ("gemma2", "gpt_oss")},
    "mistral": [SLIDING] * DEPTH,
    "gemma3_text": [SLIDING, FULL, SLIDING, SLIDING],
    "cohere2": [SLIDING, SLIDING, SLIDING, FULL],
    "llama4_text": [SLIDING, SLIDING, SLIDING, FULL],
    "deepseek_v3": [KVSpec("full", 1, 16, 8)] * DEPTH,
    "mamba2": [KVSpec("recurrent", state=832)] * DEPTH,
    "jamba": [KVSpec("recurrent", state=768), FULL] * 2,
    "nemotron_h": [KVSpec("recurrent", state=832), FULL, KVSpec("none"), FULL],
    "gemma3n_text": [SLIDING, FULL, KVSpec("shared"), KVSpec("shared")],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_live_and_meta_give_one_spec(family: str) -> None:
    live = tiny(family, "eager")
    meta = meta_model(live.config)
    assert all(parameter.is_meta for parameter in meta.parameters())
    spec = inspect(live)
    assert inspect(meta).fingerprint == spec.fingerprint
    assert inspect(meta) == spec and spec.probed


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_and_kv_are_those_of_the_family(family: str) -> None:
    layers = inspect(tiny(family, "eager")).stack().layers
    found = [(i.attention and i.attention.modules, i.mlp and i.mlp.modules) for i in layers]
    assert found == PARTS[family]
    sizes = [replace(layer.kv, rotated=True, apart=True, any_heads=False) for layer in layers]
    assert sizes == KV[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_counted_once(family: str) -> None:
    model = tiny(family, "eager")
    spec = inspect(model)
    assert spec.params == sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())
    for layer in spec.stack().layers:
        assert sum(part.params for part in (layer.attention, layer.mlp) if part) <= layer.params


def test_layers_that_read_the_kv_of_others_say_so() -> None:
    layers = inspect(tiny("gemma3n_text")).stack().layers
    assert [layer.needs for layer in layers] == [(), (), (0,), (1,)]
    assert [layer.kv.kind for layer in layers[2:]] == ["shared", "shared"]
    assert all(layer.needs == () for layer in inspect(tiny("llama")).stack().layers)


def test_experts_count_by_the_share_that_a_token_uses() -> None:
    dense, sparse = (inspect(tiny(family)).stack().layers[0] for family in ("llama", "mixtral"))
    assert dense.mlp and sparse.mlp and dense.mlp.flops == 2 * dense.mlp.params
    experts, router = 4 * 3 * 32 * 64, 4 * 32
    assert sparse.mlp.params == experts + router
    assert sparse.mlp.flops == 2 * (experts // 2 + router)


def test_why_there_are_no_parts_is_written_down() -> None:
    assert "does more than add its attention and its mlp" in str(inspect(tiny("gemma3n_text")).parts_note)
    assert inspect(tiny("llama")).parts_note is None


@pytest.mark.parametrize("family", ["llama", "jamba", "mixtral"])
def test_peft_changes_no_spec(family: str) -> None:
    model = copy.deepcopy(tiny(family))
    bare = inspect(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))
    assert inspect(wrapped) == bare and inspect(wrapped.get_base_model()) == bare


def test_shared_layers_are_counted_apart() -> None:
    model = copy.deepcopy(tiny("llama"))
    before = inspect(model)
    size = before.stack().layers[2].mlp.params  # type: ignore[union-attr]
    model.model.layers[2].mlp = model.model.layers[1].mlp
    after = inspect(model)
    first, second = after.stack().layers[1:3]
    assert first.shared == second.shared and sum(n for _, n in first.shared) == size
    assert after.params == before.params - size == sum(p.numel() for p in model.parameters())


def test_inspecting_leaves_modes_hooks_and_gradients_alone() -> None:
    model = copy.deepcopy(tiny("llama"))
    model.model.layers[1].train()
    modes = [module.training for module in model.modules()]
    inspect(model)
    assert [module.training for module in model.modules()] == modes
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.model.layers.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_probe_answers_from_memory_until_a_layer_changes() -> None:
    model = copy.deepcopy(tiny("llama"))
    first = open_model(model).facts()
    assert open_model(model).facts() is first
    model.model.layers[2] = copy.deepcopy(model.model.layers[2])
    assert open_model(model).facts() is not first


# models that no rule can know


class Layer(GradientCheckpointingLayer):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.mlp = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.mlp(self.mix(hidden_states))


class MadeUp(PreTrainedModel):
    """Four layers, run in the order of `order`; with `hidden` they are plain attributes and in no list."""

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig, order: tuple[int, ...], hidden: bool = False) -> None:
        super().__init__(config)
        self.embed, self.order = nn.Embedding(8, 32), order
        if hidden:
            self.one, self.two, self.three, self.four = (Layer() for _ in range(4))
        else:
            self.things = nn.ModuleList(Layer() for _ in range(4))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, use_cache: bool = False) -> dict[str, Any]:
        h = self.embed(input_ids)
        for index in self.order:
            h = self.things[index](h)
        return {"logits": h}


def made_up(order: tuple[int, ...], hidden: bool = False) -> MadeUp:
    return MadeUp(LlamaConfig(vocab_size=8, hidden_size=32, num_hidden_layers=4, num_attention_heads=4), order, hidden)


def code_of(model: nn.Module) -> str:
    with pytest.raises(ModelError) as caught:
        inspect(model)
    return caught.value.code


def test_an_unknown_structure_is_found_when_its_loop_is_plain() -> None:
    stack = inspect(made_up((0, 1, 2, 3))).stack()
    assert (stack.path, stack.depth) == ("things", 4)
    assert [layer.kv for layer in stack.layers] == [KVSpec("none")] * 4


@pytest.mark.parametrize("order", [(0, 1, 1, 2, 3), (0, 1, 2), (3, 2, 1, 0), (0, 1, 2, 3, 0)])
def test_a_loop_with_an_order_of_its_own_is_refused(order: tuple[int, ...]) -> None:
    assert code_of(made_up(order)) == "M305"


def test_models_that_cannot_be_read_are_refused() -> None:
    assert code_of(nn.Sequential(nn.Linear(2, 2))) == "M301"
    assert code_of(made_up((0, 1, 2, 3), hidden=True)) == "M302"
    broken = made_up((0, 1, 2, 3))
    broken.embed = nn.Embedding(8, 16)
    assert code_of(broken) == "M305"
    assert replace(inspect(tiny("llama")), family="x").fingerprint != inspect(tiny("llama")).fingerprint


def test_a_config_that_changes_after_a_look_is_looked_at_again() -> None:
    model = copy.deepcopy(tiny("gemma3_text"))
    stack = find_stack(model)
    seen = open_model(model).facts(stack.name)
    assert seen.layers[0].window == 6
    assert open_model(model).facts(stack.name) is seen
    model.config.sliding_window = 3
    assert open_model(model).facts(stack.name).layers[0].window == 3
    assert inspect(model).stack().layers[0].kv.window == 3
