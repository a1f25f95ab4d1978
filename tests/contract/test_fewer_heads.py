"""Runs whose own tensors make fewer heads of keys and values than their layer does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

import shoal.auto  # noqa: F401 - tells transformers of planned checkpoints
from shoal.compressing.job import cache_job
from shoal.errors import PlanError
from shoal.fitting.result import Job
from shoal.live import running
from shoal.models.opened import open_model
from shoal.models.stacks import find_stack
from shoal.plan import Plan, cost, shapes_of
from shoal.plan.moved import moved
from shoal.transforms.share_kv import share_kv
from shoal.writing.planned_folder import write_planned

from .families import VOCAB, tiny
from .planted import random_data
from .references import CLOSE
from .shares import pairs

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
PADDED = {"input_ids": IDS.clone(), "attention_mask": torch.ones_like(IDS)}
PADDED["input_ids"][1, :3], PADDED["attention_mask"][1, :3] = 0, 0
PADDED["position_ids"] = (PADDED["attention_mask"].cumsum(-1) - 1).clamp(min=0)
FAMILIES = [
    "llama", "qwen2", "qwen3", "gemma3_text", "mixtral", "mistral", "starcoder2", "phi", "granite", "smollm3",
    "gpt_oss", "qwen3_moe",
]  # fmt: skip
PLANS = ("0,1:x,2-3", "0,1:x,2@1,3", "0,1:x,2@a1,3")


def logits(model: Any, **batch: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**({"input_ids": IDS, "use_cache": False} | batch)).logits
    return found


def narrow(model: PreTrainedModel, layer: int = 1) -> dict[str, torch.Tensor]:
    """The mean of the two heads of keys, and of those of values, biases too."""
    made = {}
    for name, p in find_stack(model).layer(layer).named_parameters():
        if name.rpartition(".")[0].endswith(("k_proj", "v_proj")):
            made[f"x.{name}"] = p.detach().unflatten(0, (2, -1)).mean(0)
    assert made
    return made


def widened(model: PreTrainedModel, layer: int = 1) -> PreTrainedModel:
    """The same by hand: both heads of the layer are their mean."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in find_stack(made).layer(layer).named_parameters():
            if name.rpartition(".")[0].endswith(("k_proj", "v_proj")):
                p.copy_(p.unflatten(0, (2, -1)).mean(0, keepdim=True).expand(2, *[-1] * p.dim()).flatten(0, 1))
    return made


def allowed(family: str, plan: str) -> bool:
    """Whether layers 1 and 2 are of one kind there."""
    layers = open_model(tiny(family, "eager")).spec.stack().layers
    return "@" not in plan or (layers[1].kind, layers[1].kv) == (layers[2].kind, layers[2].kv)


@pytest.mark.parametrize(("family", "plan"), pairs(5, FAMILIES, PLANS))
def test_one_head_is_as_two_alike(family: str, plan: str, tmp_path: Path) -> None:
    """Live, cached, padded, over a static cache, in a planned checkpoint; and it is held and counted once."""
    if not allowed(family, plan):
        return
    model = tiny(family, "eager")
    new = narrow(model)
    with running(widened(model), plan.replace(":x", "")) as by_hand:
        want, padded = logits(by_hand.model), logits(by_hand.model, **PADDED)
    with running(model, plan, new):
        live = logits(model)
        torch.testing.assert_close(live, want, **CLOSE)
        torch.testing.assert_close(logits(model, **PADDED)[0], padded[0], **CLOSE)
        torch.testing.assert_close(logits(model, **PADDED)[1, 3:], padded[1, 3:], **CLOSE)
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=12)):
            pieces = [
                logits(model, input_ids=IDS[:, a:b], past_key_values=cache, use_cache=True)
                for a, b in ((0, 4), (4, 6), (6, 7), (7, 8), (8, 9))
            ]
            torch.testing.assert_close(torch.cat(pieces, 1), want, **CLOSE)
        cache = DynamicCache(config=model.config)
        logits(model, input_ids=IDS[:, :4], past_key_values=cache, use_cache=True)
    spec = open_model(model).spec
    priced = cost(plan, spec, weights=shapes_of(new))
    held = sum(row.keys.numel() + row.values.numel() for row in cache.layers if row.keys is not None)
    assert held == priced.kv_per_token * 8
    less = sum(tensor.numel() for tensor in new.values())
    plain = cost(plan.replace(":x", ""), spec)
    assert plain.params - priced.params == less and plain.kv_per_token - priced.kv_per_token > 0
    written = write_planned(model, plan, tmp_path / "m", weights=new, prove=False)
    assert written.params == priced.params
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="eager")
    torch.testing.assert_close(logits(loaded), live, **CLOSE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_and_checkpointing(attention: str) -> None:
    model = copy.deepcopy(tiny("llama", attention)).train()
    found = []
    for checkpointing in (False, True):
        new = {name: tensor.clone().requires_grad_() for name, tensor in narrow(model).items()}
        if checkpointing:
            model.activation_checkpointing_enable()
        with running(model, "0,1:x,2@1,3", new):
            model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        found.append({name: tensor.grad for name, tensor in new.items()})
    for name, gradient in found[0].items():
        assert gradient is not None and bool(gradient.any())
        torch.testing.assert_close(found[1][name], gradient, **CLOSE)


def test_fewer_bytes_are_moved() -> None:
    model = tiny("llama", "eager")
    spec, new = open_model(model).spec, shapes_of(narrow(model))
    plain, fewer = moved("0,1,2@1,3", spec), moved("0,1:x,2@1,3", spec, weights=new)
    assert plain.weights - fewer.weights == 4 * sum(shape[0] * shape[1] for shape in new.values())
    assert plain.kv - fewer.kv == 2 * 512 * 4 * 16, "for the layer, and for the one that reads it"


@pytest.mark.parametrize(
    ("family", "change", "why"),
    [
        ("llama", {"self_attn.k_proj.weight": (8, 32)}, "make 1 of keys and 2 of values heads"),
        ("llama", {"self_attn.k_proj.weight": (4, 32), "self_attn.v_proj.weight": (4, 32)}, "holds .16, 32. there"),
        ("llama", {"self_attn.q_proj.weight": (8, 32)}, "holds .32, 32. there"),
        ("stablelm", {"self_attn.k_proj.weight": (8, 32), "self_attn.v_proj.weight": (8, 32)}, "holds"),
        ("opt", {"self_attn.k_proj.weight": (8, 32), "self_attn.v_proj.weight": (8, 32)}, "holds"),
        ("falcon", {"self_attention.query_key_value.weight": (8, 32)}, "holds"),
    ],
)
def test_what_does_not_fit_is_refused(family: str, change: dict[str, tuple[int, int]], why: str) -> None:
    model = tiny(family, "eager")
    new = {f"x.{name}": torch.zeros(shape) for name, shape in change.items()}
    with pytest.raises(PlanError, match=why) as caught:
        running(model, "0,1:x,2-3", new).__enter__()
    assert caught.value.code == "P129"


def test_pages_and_compressing_caches_are_refused() -> None:
    model = copy.deepcopy(tiny("llama", "sdpa"))
    with running(model, "0,1:x,2-3", narrow(model)):
        with pytest.raises(PlanError, match="fewer heads of keys and values") as caught:
            model.generate_batch([IDS[0].tolist()])
        assert caught.value.code == "P162"
        with pytest.raises(PlanError, match="fewer heads of keys and values") as caught:
            cache_job(model)
        assert caught.value.code == "P161"


@pytest.mark.parametrize("how", ["average", "first"])
def test_the_transform_makes_the_mean_of_neighbours(how: Any) -> None:
    model = tiny("llama", "eager")
    whole = Plan.identity(open_model(model).spec)
    made = share_kv(Job(model, random_data(2, 16), whole, {}), pairs="1-2", how=how, heads=1)
    assert str(made.plan) == "0,1:share-kv-1,2@1,3"
    layers = [dict(find_stack(model).layer(n).named_parameters()) for n in (1, 2)]
    for name in ("self_attn.k_proj.weight", "self_attn.v_proj.weight"):
        both = layers[0][name] if how == "first" else (layers[0][name] + layers[1][name]) / 2
        torch.testing.assert_close(made.weights[f"share-kv-1.{name}"], both.detach().unflatten(0, (2, -1)).mean(0))
    assert cost(made.plan, open_model(model).spec, weights=shapes_of(made.weights)).kv_per_token == 2 * 32 + 16
    with running(model, made.plan, made.weights):
        assert logits(model).isfinite().all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_later_source_may_make_fewer(attention: str) -> None:
    model = tiny("llama", attention)
    with running(widened(model, 3), "0,1@3,2-3") as by_hand:
        want = logits(by_hand.model)
    with running(model, "0,1@3,2,3:x", narrow(model, 3)):
        torch.testing.assert_close(logits(model), want, **CLOSE)
        cache = DynamicCache(config=model.config)
        pieces = [
            logits(model, input_ids=IDS[:, a:b], past_key_values=cache, use_cache=True) for a, b in ((0, 4), (4, 9))
        ]
        torch.testing.assert_close(torch.cat(pieces, 1), want, **CLOSE)


@pytest.mark.parametrize("plan", ["0,1:x,2@v1+,3", "0,1@v0+:x,2-3"])
def test_values_of_other_numbers_of_heads_are_not_added(plan: str) -> None:
    model = tiny("llama", "eager")
    with pytest.raises(PlanError, match="so they cannot be added") as caught:
        running(model, plan, narrow(model)).__enter__()
    assert caught.value.code == "P129"


def test_heads_that_other_layers_of_the_model_read_stay() -> None:
    """In Gemma 3n the last layers read the keys of an earlier one, and divide their heads among as many as it has."""
    model = tiny("gemma3n_text")
    assert [layer.needs for layer in open_model(model).spec.stack().layers] == [(), (), (0,), (1,)]
    with pytest.raises(PlanError, match="P129"), running(model, "0,1:x,2-3", narrow(model)):
        pass
