"""A layer in place that is used again later, and tensors of a run that cannot stand in its layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from shoal.errors import PlanError
from shoal.live import apply, running
from shoal.models.stacks import find_stack

from .families import VOCAB, tiny
from .references import by_hand, silenced

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
BATCH = {"input_ids": IDS}
AGAIN = {
    "0,1a,0m,2-3": ("0", "1a", "0m", "2", "3"),
    "0-2,1m,3": ("0", "1", "2", "1m", "3"),
    "0-3,0m": ("0", "1", "2", "3", "0m"),
    "0-3,0-3m": ("0", "1", "2", "3", "0m", "1m", "2m", "3m"),
}


def own(family: str, attention: str = "sdpa") -> PreTrainedModel:
    return copy.deepcopy(tiny(family, attention))


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor = IDS, **kwargs: Any) -> torch.Tensor:
    return model(input_ids=ids, **kwargs).logits


def chained(model: PreTrainedModel, names: tuple[str, ...]) -> torch.Tensor:
    def chain(call: Any, hidden: torch.Tensor) -> torch.Tensor:
        for name in names:
            layer = int(name.rstrip("am"))
            if name[-1] in "am":
                with silenced(model, layer, "mlp" if name[-1] == "a" else "attention"):
                    hidden = call(layer, hidden)
            else:
                hidden = call(layer, hidden)
        return hidden

    return by_hand(model, BATCH, chain)


@pytest.mark.parametrize("plan", AGAIN)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2"])
@torch.no_grad()
def test_a_layer_in_place_can_be_used_again_later(family: str, plan: str) -> None:
    model = own(family)
    want = chained(model, AGAIN[plan])
    with running(model, plan) as handle:
        torch.testing.assert_close(logits(model, use_cache=False), want, atol=1e-5, rtol=1e-5)
        cache = DynamicCache(config=model.config)
        pieces = [logits(model, IDS[:, :4], past_key_values=cache), logits(model, IDS[:, 4:], past_key_values=cache)]
        torch.testing.assert_close(torch.cat(pieces, 1), want, atol=1e-4, rtol=1e-4)
        executor = handle.bound.executor()
        assert executor.now.calls == {}, "nothing of a forward outlives it"


@torch.no_grad()
def test_a_policy_runs_it_again_too() -> None:
    model = own("llama")
    with running(model, "0-1,0m,3"):
        want = logits(model, use_cache=False)
    with running(model, "0-1,0m,2-3", policy="skip:listed=2"):
        assert torch.equal(logits(model, use_cache=False), want)


FLOATS = (torch.float32,)
TENSOR = "x.mlp.up_proj.weight"
UNFIT: dict[str, tuple[str, dict[str, torch.Tensor], str]] = {
    "a name that the layer lacks": ("0,1:x,2-3", {"x.lora_A": torch.zeros(2, 2)}, "no tensor lora_A"),
    "a module that the layer lacks": ("0,1:x,2-3", {"x.ffn.weight": torch.zeros(2, 2)}, "no tensor ffn.weight"),
    "another shape": ("0,1:x,2-3", {TENSOR: torch.zeros(3, 5)}, r"is \[3, 5\]"),
    "a branch of a group": ("0,(1|2:x),3", {TENSOR: torch.zeros(3, 5)}, "decoder layer 2 holds"),
    "a part": ("0,1m:x,2-3", {"x.mlp.up_proj": torch.zeros(3, 5)}, "no tensor mlp.up_proj"),
    "integers": ("0,1:x,2-3", {TENSOR: torch.zeros(1, dtype=torch.int64)}, "int64"),
    "complex numbers": ("0,1:x,2-3", {TENSOR: torch.zeros(1, dtype=torch.complex64)}, "complex64"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_own_tensors_that_do_not_fit_are_refused(what: str) -> None:
    model, (plan, weights, words) = own("llama"), UNFIT[what]
    shape = find_stack(model).layer(1).mlp.up_proj.weight.shape
    weights = {n: t.new_zeros(shape) if t.dtype not in FLOATS else t for n, t in weights.items()}
    with pytest.raises(PlanError, match=words) as caught:
        apply(model, plan, weights)
    assert caught.value.code == "P129"
    apply(model, "0-3").restore()  # nothing was left behind


def test_tensors_of_maps_and_heads_have_names() -> None:
    model = own("llama")
    size = model.config.hidden_size
    with pytest.raises(PlanError, match=r"map-1-2\.weigth is no tensor of a map") as caught:
        apply(model, "0,~1-2,3", {"map-1-2.weight": torch.eye(size), "map-1-2.weigth": torch.eye(size)})
    assert caught.value.code == "P113"
    with pytest.raises(PlanError, match=r"h\.lense of exit e is no tensor of a head") as caught:
        apply(
            model,
            "0-1,!e=h?exit,2/project,3/project",
            {"h.lense": torch.eye(size)},
            policy="exit:confidence=0.9,fill=project",
        )
    assert caught.value.code == "P113"


@pytest.mark.parametrize("part", ["a", "m"])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@torch.no_grad()
def test_tensors_for_the_part_that_is_left_out_change_nothing(family: str, part: str) -> None:
    model = own(family)
    tensors = {f"x.{n}": t.clone() for n, t in find_stack(model).layer(1).named_parameters()}
    with running(model, f"0,1{part},2-3"):
        want = logits(model, use_cache=False)
    with running(model, f"0,1{part}:x,2-3", tensors):
        assert torch.equal(logits(model, use_cache=False), want)


@torch.no_grad()
def test_a_tensor_with_two_names_takes_one_value() -> None:
    model = own("llama")
    mlp: Any = find_stack(model).layer(1).mlp
    mlp.gate_proj.weight = mlp.up_proj.weight
    new = torch.randn_like(mlp.up_proj.weight)
    with running(model, "0,1:x,2-3", {"x.mlp.up_proj.weight": new}):
        want = logits(model, use_cache=False)
    both = {"x.mlp.up_proj.weight": new, "x.mlp.gate_proj.weight": new.clone()}
    with running(model, "0,1:x,2-3", both):
        assert torch.equal(logits(model, use_cache=False), want)
    assert not torch.equal(logits(model, use_cache=False), want)
    both["x.mlp.gate_proj.weight"] = new + 1
    with pytest.raises(PlanError, match="one tensor under both names") as caught:
        apply(model, "0,1:x,2-3", both)
    assert caught.value.code == "P129"


@torch.no_grad()
def test_a_mask_that_a_layer_holds_stays_a_mask() -> None:
    model = own("gpt_neo", "eager")
    layer = find_stack(model).layer(1)
    held = {f"x.{name}": buffer.clone() for name, buffer in layer.named_buffers()}
    assert any(buffer.dtype == torch.bool for buffer in held.values())
    want = logits(model, use_cache=False)
    with running(model, "0,1:x,2-3", held):
        assert torch.equal(logits(model, use_cache=False), want)
