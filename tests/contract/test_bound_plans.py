"""A plan bound to an opened model: packed weights, caches that another plan has filled, and all or nothing."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicCache, StaticCache

import shoal
from shoal.errors import PlanError
from shoal.executing.bind import bind
from shoal.models.inspect import inspect
from shoal.models.opened import open_model
from shoal.plan import Plan, parse_plan

from .families import tiny
from .kinds import kind

IDS = torch.randint(0, 60, (1, 12), generator=torch.Generator().manual_seed(3))


class PackedLinear(nn.Module):
    """Weights in a code of their own, as quantisers keep them: two numbers of four bits in a byte, one scale a row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(-1, keepdim=True) / 7
        codes = (linear.weight.detach() / scale).round().to(torch.int8) + 8
        self.weight = nn.Parameter((codes[:, ::2] * 16 + codes[:, 1::2]).to(torch.uint8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def unpacked(self) -> torch.Tensor:
        both = torch.stack([self.weight // 16, self.weight % 16], -1).flatten(-2)
        return (both.float() - 8).to(self.scale.dtype) * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.unpacked())


def packed(model: Any) -> Any:
    """`model` with every matrix of its layers packed, as a loader of quantised checkpoints leaves it."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                layer.set_submodule(name, PackedLinear(module))
    model.hf_quantizer = object()
    model.config.quantization_config = {"quant_method": "stand-in"}
    return model


def unpacked(model: Any) -> Any:
    """The same numbers in plain matrices."""
    plain = copy.deepcopy(tiny("llama"))
    for mine, theirs in zip(plain.model.layers, model.model.layers, strict=True):
        for name, module in mine.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.data = theirs.get_submodule(name).unpacked()
    return plain


MAPS = {
    "scale": {"s.scale": torch.full((32,), 0.9)},
    "full": {"s.weight": torch.eye(32) * 0.9, "s.bias": torch.full((32,), 0.1)},
    "low rank": {"s.up": torch.full((32, 2), 0.1), "s.down": torch.full((2, 32), 0.1)},
}


@pytest.mark.parametrize("weights", MAPS.values(), ids=list(MAPS))
@torch.no_grad()
def test_a_map_among_packed_weights_computes_in_the_states_dtype(weights: dict[str, torch.Tensor]) -> None:
    model = packed(tiny("llama"))
    plain, plan = unpacked(model), "0,~1-2:s,3"
    with shoal.running(plain, plan, weights):
        want = plain(input_ids=IDS).logits
    with shoal.running(model, plan, weights):
        assert torch.equal(model(input_ids=IDS).logits, want)
    with shoal.running(plain, "0,3"):
        assert not torch.allclose(plain(input_ids=IDS).logits, want, atol=1e-3)


def test_a_plan_of_the_plain_model_is_one_of_the_packed_model_and_the_other_way() -> None:
    plain, model = tiny("llama"), packed(tiny("llama"))
    assert inspect(model) == inspect(plain)
    for one, other in ((plain, model), (model, plain)):
        with shoal.running(other, parse_plan("0-1,3", Plan.identity(inspect(one)))):
            pass


@torch.no_grad()
def test_norms_of_a_packed_layer_can_be_replaced() -> None:
    """Its matrices cannot: P129 says so."""
    model = packed(tiny("llama"))
    norm = {"n.input_layernorm.weight": torch.full((32,), 0.5)}
    changed = unpacked(model)
    changed.model.layers[1].input_layernorm.weight.fill_(0.5)
    with shoal.running(model, "0,1:n,2-3", norm):
        assert torch.equal(model(input_ids=IDS).logits, changed(input_ids=IDS).logits)
    with pytest.raises(PlanError) as raised:
        bind(model, "0,1:n,2-3", {"n.mlp.down_proj.weight": torch.zeros(32, 64)})
    assert raised.value.code == "P129"


OTHER = {f"a.{name}": tensor * 1.5 for name, tensor in tiny("llama").model.layers[1].state_dict().items()}
CONTINUED = {
    "other weights": ("0-3", {}, "0,1:a,2-3", OTHER),
    "other values of the same weights": ("0,1:a,2-3", {n: t * 2 for n, t in OTHER.items()}, "0,1:a,2-3", OTHER),
    "fewer layers": ("0-3", {}, "0-1,3", {}),
    "more layers": ("0-1,3", {}, "0-3", {}),
    "another order": ("0-3", {}, "0,2,1,3", {}),
    "a part": ("0-3", {}, "0-1,2a,3", {}),
    "a map": ("0-1,3", {}, "0,~2-2:s,3", MAPS["scale"]),
    "no plan before": (None, {}, "0,1:a,2-3", OTHER),
}


@pytest.mark.parametrize("kept", ["dynamic", "static"])
@pytest.mark.parametrize(("before", "first", "after", "second"), CONTINUED.values(), ids=list(CONTINUED))
@torch.no_grad()
def test_a_cache_belongs_to_the_plan_that_filled_it(
    before: str | None, first: Any, after: str, second: Any, kept: str
) -> None:
    model = copy.deepcopy(tiny("llama"))
    cache: Any = DynamicCache(config=model.config) if kept == "dynamic" else StaticCache(model.config, max_cache_len=32)
    if before is None:
        model(input_ids=IDS[:, :8], past_key_values=cache)
    else:
        with shoal.running(model, before, first):
            model(input_ids=IDS[:, :8], past_key_values=cache)
    with shoal.running(model, after, second), pytest.raises(PlanError) as raised:
        model(input_ids=IDS[:, 8:], past_key_values=cache)
    assert raised.value.code == "P123"


GOES_ON = {
    "the same text": ("0-1,3", {}, "0-1,3", {}),
    "equal weights, read twice": ("0,1:a,2-3", OTHER, "0,1:a,2-3", {name: t.clone() for name, t in OTHER.items()}),
    "the whole model as a plan": (None, {}, "0-3", {}),
}


@pytest.mark.parametrize(("before", "first", "after", "second"), GOES_ON.values(), ids=list(GOES_ON))
@torch.no_grad()
def test_the_same_plan_goes_on_with_its_cache(before: str | None, first: Any, after: str, second: Any) -> None:
    model = copy.deepcopy(tiny("llama"))
    cache: Any = DynamicCache(config=model.config)
    with shoal.running(model, after, second):
        want = model(input_ids=IDS).logits[:, 8:]
    if before is None:
        model(input_ids=IDS[:, :8], past_key_values=cache)
    else:
        with shoal.running(model, before, first):
            model(input_ids=IDS[:, :8], past_key_values=cache)
    with shoal.running(model, after, second):
        torch.testing.assert_close(model(input_ids=IDS[:, 8:], past_key_values=cache).logits, want, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_cache_that_a_policy_filled_is_nobody_elses() -> None:
    model = copy.deepcopy(tiny("llama"))
    cache: Any = DynamicCache(config=model.config)
    with shoal.running(model, "0-3", policy="skip:listed=2"):
        model(input_ids=IDS[:, :8], past_key_values=cache)
    with shoal.running(model, "0-3"), pytest.raises(PlanError) as raised:
        model(input_ids=IDS[:, 8:], past_key_values=cache)
    assert raised.value.code == "P123"


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_plan_is_put_on_all_stacks_or_on_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(kind(name))
    opened = open_model(model)
    plan, lists = Plan.identity(opened.spec), [stack.layers for stack in opened.stacks]
    monkeypatch.setattr("shoal.executing.layer_runner.first_only", _second_fails())
    with pytest.raises(MemoryError):
        shoal.apply(model, plan)
    assert [stack.layers for stack in opened.stacks] == lists
    assert all(a is b for a, b in zip([stack.layers for stack in opened.stacks], lists, strict=True))


def _second_fails() -> Any:
    calls: list[int] = []

    def first_only(_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no memory for the second stack")

    return first_only


def test_a_bound_plan_is_entered_in_less_than_a_millisecond_at_any_depth() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", num_hidden_layers=32, **sizes)).eval()
    bound, taken = bind(model, "0-20,25-31"), []
    for _ in range(20):
        start = time.perf_counter()
        with bound.running():
            pass
        taken.append(time.perf_counter() - start)
    assert min(taken) < 1e-3


def test_a_bound_plan_runs_other_values_of_its_tensors_without_being_bound_again() -> None:
    model = copy.deepcopy(tiny("llama"))
    bound = bind(model, "0,~1-2:s,3", MAPS["scale"])
    with torch.no_grad():
        for value in (0.5, 2.0):
            weights = {"s.scale": torch.full((32,), value)}
            bound.use(weights)
            with bound.running():
                found = model(input_ids=IDS).logits
            with shoal.running(model, "0,~1-2:s,3", weights):
                assert torch.equal(model(input_ids=IDS).logits, found)
