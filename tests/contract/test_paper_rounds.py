"""Methods that look again after every removal, against stock models that are built anew for every round."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from shoal.errors import UsageError
from shoal.fitting.fused import around, beside
from shoal.fitting.holes import Hole
from shoal.ledger import Ledger
from shoal.methods.fusegpt import fusegpt
from shoal.methods.prune_and_comp import prune_and_comp
from shoal.plan import drop
from shoal.scores import Found
from shoal.transforms.compensate import compensate
from shoal.writing.surgery import rewrite

from .families import tiny_of
from .method_tasks import random_task, task_of
from .planted import DEEP, random_data
from .transform_jobs import do, job


def weak() -> PreTrainedModel:
    """Six layers of which the second, the third and the fourth do little, so that holes have layers behind them."""
    model = tiny_of("llama", DEEP)
    for n, share in ((1, 0.3), (2, 0.4), (3, 0.5)):
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            model.model.layers[n].get_submodule(part).weight.data.mul_(share)
    return model


TASK = task_of(weak(), random_data(6, 20, seed=2))


@torch.no_grad()
def states(found: Found) -> tuple[torch.Tensor, ...]:
    """What every layer of the stock model of a plan is given and the last one leaves, before the final norm; and what
    the head is given."""
    model: Any = rewrite(TASK.model, found.plan, weights=found.weights)
    seen: list[torch.Tensor] = []
    handles = [one.register_forward_pre_hook(lambda _, args, kw: seen.append(args[0] if args else kw["hidden_states"]),
                                             with_kwargs=True) for one in model.model.layers]  # fmt: skip
    handles.append(model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0])))
    out = model.model(input_ids=TASK.data.ids, use_cache=False).last_hidden_state
    for handle in handles:
        handle.remove()
    return (*(one.double() for one in seen), out.double())


def influences(found: Found) -> dict[int, float]:
    """Block influence of every layer that is left, by hand."""
    seen = states(found)
    layers = found.plan.layers()
    return {
        layer: float((1 - cosine_similarity(seen[n], seen[n + 1], dim=-1)).mean()) for n, layer in enumerate(layers)
    }


def macro_influences(found: Found) -> dict[int, float]:
    """How much the state in front of the head turns without one layer more; the last token predicts nothing."""
    whole = states(found)[-1]
    without = {layer: states(replace(found, plan=drop(found.plan, [layer])))[-1] for layer in found.plan.layers()}
    return {layer: float((1 - cosine_similarity(whole, one, dim=-1))[:, :-1].mean()) for layer, one in without.items()}


def test_prune_and_comp_looks_again_at_the_compensated_model() -> None:
    gone: list[int] = []
    found = prune_and_comp(TASK, drop=3)
    for number in range(1, 4):
        made = TASK.then(compensate, Found(drop(TASK.plan, gone))) if gone else Found(TASK.plan)
        values = influences(made)
        gone.append(min(values, key=values.__getitem__))
        assert found.trace[number - 1].score == pytest.approx(values[gone[-1]], rel=1e-3)
    assert found.plan.dropped() == tuple(sorted(gone))
    once = prune_and_comp(TASK, drop=3, once=True)
    first = influences(Found(TASK.plan))
    assert once.plan.dropped() == tuple(sorted(sorted(first, key=first.__getitem__)[:3]))
    assert [c.score for c in once.trace] != [c.score for c in found.trace], "the later scores are of another model"


def test_fusegpt_looks_again_at_the_fused_model() -> None:
    first, second = (fusegpt(TASK, drop=number, epochs=2) for number in (1, 2))
    values = macro_influences(Found(TASK.plan))
    assert first.plan.dropped() == (min(values, key=values.__getitem__),)
    again = macro_influences(first)
    assert second.plan.dropped() == tuple(sorted({*first.plan.dropped(), min(again, key=again.__getitem__)}))
    assert [c.score for c in second.trace] == pytest.approx([min(values.values()), min(again.values())], rel=1e-3)
    assert again != {layer: values[layer] for layer in again}
    assert all(name.split(".")[0] in str(second.plan) for name in second.weights)
    once = fusegpt(TASK, drop=2, epochs=2, once=True)
    assert once.plan.dropped() == tuple(sorted(sorted(values, key=values.__getitem__)[:2]))


def test_the_rounds_of_a_small_budget_are_not_measured_again_for_a_large_one() -> None:
    memo: Ledger[Any] = Ledger()
    fusegpt(replace(TASK, memo=memo), drop=2, epochs=2)
    assert len(memo) == 2 and memo.saved == 0
    large = fusegpt(replace(TASK, memo=memo), drop=3, epochs=2)
    assert len(memo) == 3 and memo.saved > 0
    assert large.trace == fusegpt(TASK, drop=3, epochs=2).trace
    fusegpt(replace(TASK, memo=memo), drop=2, epochs=1)
    assert len(memo) == 4, "its second round is of another model"


def test_a_layer_that_took_another_in_goes_into_others_as_it_is_then() -> None:
    """With no training a fused group is its layers, whatever was fused before."""
    bare = fusegpt(random_task(), drop=2, epochs=0)
    assert not bare.weights and len(bare.plan.dropped()) == 2


@pytest.mark.parametrize(
    ("position", "group", "places"),
    [
        (10, 8, range(7, 14)),  # three before the hole and four behind it
        (1, 8, range(7)),
        (28, 8, range(22, 29)),
        (10, 3, range(9, 11)),
        (29, 3, range(27, 29)),
        (0, 2, range(1)),
        (3, 100, range(29)),
    ],
)
def test_a_group_holds_the_nearest_neighbours(position: int, group: int, places: range) -> None:
    """Of 30 layers one is gone, so 29 steps are left."""
    assert around(group)(Hole(position, position, position), 0, 29) == places


def test_neighbours_are_counted_on_each_side() -> None:
    assert beside(2)(Hole(10, 10, 10), 0, 29) == range(8, 12)
    assert beside(2)(Hole(1, 1, 1), 0, 29) == range(3)


def test_seven_neighbours_take_a_layer_in() -> None:
    model = tiny_of("llama", 9)
    made = do("fuse-group", job(model, [4]), group=8, epochs=1)
    assert [step.weights for step in made.plan.steps()] == [None, *(f"fuse-group-{n}" for n in (1, 2, 3, 5, 6, 7, 8))]
    with pytest.raises(UsageError, match="U657"):
        do("fuse-group", job(model, [4]), group=1)
    with pytest.raises(UsageError, match="U657"):
        fusegpt(TASK, drop=1, group=1)
