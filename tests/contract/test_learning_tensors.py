"""Tensors of a plan that learn: looked up at every use, and as modules of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import peft
import pytest
import torch
from torch import nn

import shoal
from shoal.errors import PlanError
from shoal.executing.bind import bind
from shoal.models.opened import open_model
from shoal.models.stacks import find_stack

from .families import tiny
from .kinds import kind
from .live_models import IDS, logits, own
from .test_live_training import checkpointing, gradients, in_training

NAMES = {
    "llama": ("mlp.up_proj.weight", "self_attn.q_proj.weight"),
    "gpt2": ("mlp.c_fc.weight", "attn.c_attn.bias"),
    "mixtral": ("mlp.experts.down_proj", "self_attn.o_proj.weight"),
    "jamba": ("mamba.in_proj.weight", "feed_forward.up_proj.weight"),
}


def layer_tensors(model: nn.Module, layer: int, weights_id: str, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    held = dict(find_stack(model).layer(layer).named_parameters())
    return {f"{weights_id}.{name}": held[name].detach() * 0.7 + 0.01 for name in names if name in held}


class Held(Mapping[str, torch.Tensor]):
    """A mapping that is no dict, over parameters of a module whose names hold no dots."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.module = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(t) for name, t in tensors.items()})

    def __getitem__(self, name: str) -> torch.Tensor:
        if name.replace(".", "/") not in self.module:
            raise KeyError(name)
        return self.module[name.replace(".", "/")]

    def __iter__(self) -> Iterator[str]:
        return (name.replace("/", ".") for name in self.module)

    def __len__(self) -> int:
        return len(self.module)


def frozen(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def parameters(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: nn.Parameter(tensor.clone()) for name, tensor in tensors.items()}


def moved_in_place(tensors: Any) -> None:
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.mul_(0.5).add_(0.02)


def stepped(tensors: Any) -> None:
    learning = [t for t in tensors.values() if t.requires_grad]
    for tensor in learning:
        tensor.grad = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)).to(tensor)
    torch.optim.AdamW(learning, lr=0.1, foreach=True).step()


def put_anew(tensors: Any) -> None:
    for name in list(tensors):
        tensors[name] = tensors[name].detach() * 0.5 + 0.02


USES: dict[str, tuple[str, str | None]] = {
    "map": ("0,~1-2:x,3", None),
    "layer": ("0,1:x,2-3", None),
    "part": ("0,1m:x,2-3", None),
    "branch": ("0,(1:x|2),3", None),
    "lens": ("0-3", "exit:after=1,prefill=true,head=x"),
}


def tensors_for(model: nn.Module, use: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    square = torch.eye(32) + 0.1 * torch.randn(32, 32, generator=generator)
    if use == "map":
        return {"x.weight": square, "x.bias": torch.full((32,), 0.1)}
    if use == "lens":
        return {"x-1.lens": square, "x-1.lens_bias": torch.full((32,), 0.1)}
    return layer_tensors(model, 1, "x", NAMES["llama"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["right dtype", "converted"])
@pytest.mark.parametrize(
    ("make", "move"),
    [(frozen, moved_in_place), (frozen, put_anew), (parameters, stepped), (parameters, put_anew), (Held, stepped)],
    ids=["written to", "put anew", "optimiser", "parameters put anew", "no dict"],
)
@pytest.mark.parametrize("use", USES)
def test_what_was_moved_is_what_the_next_forward_uses(
    use: str, make: Callable[[Any], Any], move: Callable[[Any], None], dtype: torch.dtype
) -> None:
    model, (plan, policy) = own("llama").to(dtype), USES[use]
    tensors = make({name: tensor.float() for name, tensor in tensors_for(tiny("llama"), use).items()})
    with shoal.running(model, plan, tensors, policy=policy):
        first, again = logits(model), logits(model)
        move(tensors)
        after = logits(model)
    with shoal.running(model, plan, {name: t.detach().clone() for name, t in tensors.items()}, policy=policy):
        assert torch.equal(logits(model), after)
    assert torch.equal(first, again)
    assert not torch.equal(first, after)


@pytest.mark.parametrize("use", [use for use in USES if use != "lens"])
def test_gradients_reach_the_tensors_themselves(use: str) -> None:
    """In each of two passes, in the model's dtype and in another."""
    for dtype in (torch.float32, torch.bfloat16):
        model = in_training("llama").to(dtype)
        tensors = Held({name: tensor.float() for name, tensor in tensors_for(tiny("llama"), use).items()})
        with shoal.running(model, USES[use][0], tensors):
            for _ in range(2):
                model(input_ids=IDS, labels=IDS).loss.backward()
                moving = {name: t.grad for name, t in tensors.items()}
                assert all(
                    g is not None and g.abs().max() > 0 for n, g in moving.items() if "q_proj" not in n or use != "part"
                )
                tensors.module.zero_grad()


PLANS = [
    "0,1:x,2-3",
    "0,1m:x,2-3",
    "0,1a:x,2-3",
    "0,1:x,1:x,2-3",
    "0,(1:x|2),3",
    "0,2,1:x,3",
    "1:x,2-3",
    "0,~2-2:y,1:x",
]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", NAMES)
def test_a_module_computes_and_learns_what_lent_tensors_do(family: str, plan: str) -> None:
    model = in_training(family)
    size = model.config.hidden_size
    given = layer_tensors(model, 1, "x", NAMES[family]) | {"y.weight": torch.eye(size) * 1.1}
    lent = parameters(given)
    with shoal.running(model, plan, lent):
        want, base = logits(model), gradients(model)
        learned = {name: t.grad for name, t in lent.items() if t.grad is not None}
    for checkpointed in (False, True):
        if checkpointed:
            checkpointing(model)
        with shoal.running(model, plan, given, modules=True) as handle:
            if checkpointed:
                checkpointing(model)
            assert torch.equal(logits(model), want)
            found = gradients(model)
            for name, gradient in learned.items():
                torch.testing.assert_close(handle.tensors[name].grad, gradient, atol=1e-6, rtol=1e-5)
            assert {name for name in found if not name.startswith("shoal.")} <= base.keys()
            for name in base.keys() & found.keys():
                torch.testing.assert_close(found[name], base[name], atol=1e-6, rtol=1e-5)


def test_modules_come_and_go_with_the_plan() -> None:
    model = own("llama")
    model.requires_grad_(False)
    names, asked = list(model.state_dict()), {n: p.requires_grad for n, p in model.named_parameters()}
    dense, modules = logits(model), list(model.modules())
    handle = shoal.apply(
        model, "0,1:x,~2-2:y,3", {"y.scale": torch.full((32,), 0.9), "y.limit": torch.ones(1)}, modules=True
    )
    added = [name for name in model.state_dict() if name not in names]
    assert set(names) <= set(model.state_dict())
    layer = [name.removeprefix("model.layers.1.") for name in names if name.startswith("model.layers.1.")]
    assert added == [f"shoal.layers.x.{n}" for n in layer] + ["shoal.tensors.y.scale", "shoal.tensors.y.limit"]
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {name for name in added if not name.endswith("limit")}
    assert {n: p.requires_grad for n, p in model.named_parameters() if n in asked} == asked
    assert type(handle.layers["x"]) is type(model.get_submodule("model.layers.1"))
    assert list(handle.tensors) == [name.split(".", 2)[2] for name in added]
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    before = {name: tensor.detach().clone() for name, tensor in handle.tensors.items()}
    for _ in range(2):
        optimiser.zero_grad()
        with handle.paused(), torch.no_grad():
            assert torch.equal(model(input_ids=IDS, use_cache=False).logits, dense), "the teacher never moves"
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimiser.step()
    assert all(torch.equal(before[n], t) == n.endswith("limit") for n, t in handle.tensors.items())
    kept, planned = {n: t.detach().clone() for n, t in handle.tensors.items()}, logits(model)
    handle.restore()
    assert list(model.state_dict()) == names
    assert list(model.modules()) == modules
    assert torch.equal(logits(model), dense)
    with shoal.running(model, "0,1:x,~2-2:y,3", kept):
        assert torch.equal(logits(model), planned), "lent, they are the same plan"


def test_what_is_known_of_the_model_stays_known() -> None:
    model = own("llama")
    known, spec = open_model(model), open_model(model).spec
    with shoal.running(model, "0,1:x,2-3", modules=True) as handle:
        with handle.paused():
            assert open_model(model) is known
        model.config.extra = 1  # another setting: it is looked at anew
        with handle.paused():
            assert open_model(model) is not known
            assert open_model(model).spec == spec


def test_peft_finds_the_layers_and_adapts_them() -> None:
    model = own("llama")
    with shoal.running(model, "0,1:x,2-3", modules=True):
        plain = logits(model)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(model, config)
        assert not torch.equal(logits(adapted), plain)
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        found = {n for n, p in adapted.named_parameters() if p.grad is not None and "lora_A" in n}
        assert len(found) == 4
        assert any(".shoal.layers.x." in name for name in found)
        assert not any(".layers.1." in name for name in found)
        adapted.unload()
        assert torch.equal(logits(model), plain)


@pytest.mark.parametrize(
    "policy",
    ["skip:listed=2", "ffn-skip:cold_first=0,cold_last=1,threshold=0.5,prefill=true", "exit:confidence=0.05,first=0"],
)
def test_a_policy_runs_and_counts_modules(policy: str) -> None:
    model = own("llama")
    given = layer_tensors(model, 2, "x", NAMES["llama"])
    told = []
    for modules in (False, True):
        with shoal.running(model, "0-1,2:x,3", given, policy=policy, modules=modules) as handle:
            told.append((logits(model), handle.trace.to_dict()))
    assert torch.equal(told[0][0], told[1][0])
    assert told[0][1] == told[1][1]


def test_the_first_layer_of_an_encoder_decoder_is_a_module_too() -> None:
    model = copy.deepcopy(kind("t5"))
    batch = {"input_ids": IDS, "decoder_input_ids": IDS}
    for plan in ("encoder: 0:a,1-3; decoder: 0,1:b,2-3", "encoder: 0-3; decoder: 0:b,2-3", "encoder: 0,2-3"):
        dense = logits(model, **batch)
        with shoal.running(model, plan.replace(":a", "").replace(":b", "")):
            want = logits(model, **batch)
        with shoal.running(model, plan, modules=True) as handle:
            assert torch.equal(logits(model, **batch), want)
            with handle.paused():
                assert torch.equal(logits(model, **batch), dense)


def test_tensors_of_two_layers_are_no_module() -> None:
    model = own("llama")
    tensors = layer_tensors(model, 1, "x", NAMES["llama"])
    with shoal.running(model, "0,1:x,2:x,3", tensors):
        logits(model)
    names = list(model.state_dict())
    with pytest.raises(PlanError, match="x are for decoder layer 1 and for decoder layer 2") as caught:
        shoal.apply(model, "0,1:x,2:x,3", tensors, modules=True)
    assert caught.value.code == "P154"
    assert list(model.state_dict()) == names
    with shoal.running(model, "0,1:x,2-3", modules=True) as handle, handle.paused():
        with pytest.raises(PlanError) as caught:
            bind(model, "0-1,2:x,3", handle.tensors)
        assert caught.value.code == "P154"
        with pytest.raises(PlanError) as caught:
            shoal.apply(model, "0,1:y,2-3", modules=True)
        assert caught.value.code == "P122"


@pytest.mark.parametrize(
    "weights", [{"x.mlp.up.weight": torch.zeros(2, 2)}, {"x.mlp.up_proj.weight": torch.zeros(2, 2)}]
)
def test_tensors_that_do_not_fit_leave_nothing_behind(weights: dict[str, torch.Tensor]) -> None:
    model = own("llama")
    names = list(model.state_dict())
    with pytest.raises(PlanError) as caught:
        shoal.apply(model, "0,1:x,2-3", weights, modules=True)
    assert caught.value.code == "P129"
    with pytest.raises(PlanError) as caught:
        shoal.apply(model, "0,1:x,~2-2:y,3", modules=True)
    assert caught.value.code == "P112", "only a layer has something to begin with"
    assert list(model.state_dict()) == names


def test_names_with_dots_and_those_of_methods_are_names() -> None:
    model = own("llama")
    with shoal.running(model, "0:c,1:a.b,2:train,3", modules=True) as handle:
        assert set(handle.layers) == {"c", "a.b", "train"}
        assert torch.equal(
            handle.tensors["a.b.mlp.up_proj.weight"], model.get_submodule("model.layers.1.mlp.up_proj").weight
        )
        assert len(handle.tensors) == len({id(t) for t in handle.tensors.values()})
        again = copy.deepcopy(model)
        assert torch.equal(logits(again), logits(model))
        with torch.no_grad():
            handle.tensors["c.mlp.up_proj.weight"].zero_()
        assert not torch.equal(logits(again), logits(model)), "a copy has modules of its own"
