"""Published methods, each against what its paper says it does."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.api.budget import counted_budget
from shoal.api.journal import mean_nll
from shoal.data import Data
from shoal.errors import UsageError
from shoal.evaluation.tasks import load_tasks, score_tasks
from shoal.fitting.result import Job
from shoal.live import running
from shoal.measures.angular_distance import angular_distance
from shoal.measures.block_influence import block_influence
from shoal.measures.cosine_span import cosine_span
from shoal.measures.loss_removed import loss_removed
from shoal.measures.taylor import taylor
from shoal.methods._job import PruningJob
from shoal.methods.block_pruner import block_pruner
from shoal.methods.cqil import cqil
from shoal.methods.cull_mt import cull_mt
from shoal.methods.foldgpt import foldgpt
from shoal.methods.gromov import gromov
from shoal.methods.hsd import hsd
from shoal.methods.laco import laco
from shoal.methods.llm_streamline import llm_streamline
from shoal.methods.loss_one_shot import loss_one_shot
from shoal.methods.puzzle import puzzle
from shoal.methods.shortened_llama import shortened_llama
from shoal.methods.shortgpt import shortgpt
from shoal.methods.sleb import sleb
from shoal.methods.tyukin import tyukin
from shoal.methods.unified import unified
from shoal.plan import Map, Parallel, Plan, Run
from shoal.plan import drop as drop_layers
from shoal.plan.plan import Base
from shoal.scores import Found
from shoal.transforms.difference_sum import difference_sum
from shoal.writing.surgery import rewrite

from .method_tasks import Untouchable, random_task, task_of
from .planted import PLANTED, own_text, planted
from .test_tasks import Letters


@pytest.mark.parametrize(
    ("drop", "spacing", "kept"),
    [  # the published rule for 30 layers at target speeds of 2, 3, 5 and 10
        (15, "released", (*range(0, 27, 2), 29)),
        (20, "released", (*range(0, 25, 3), 29)),
        (24, "released", (0, 6, 12, 18, 24, 29)),
        (27, "released", (0, 15, 29)),
        (10, "released", (*range(19), 29)),
        (24, "even", (0, 6, 12, 17, 23, 29)),
    ],
)
def test_unified_keeps_the_golden_sets(drop: int, spacing: Any, kept: tuple[int, ...]) -> None:
    base = Base("llama", "x", (("decoder", 30),))
    nothing: Any = Untouchable()
    plan = Plan(base, (("decoder", tuple(Run(i) for i in range(30))),))
    task = PruningJob(nothing, nothing, plan, spec=nothing, legal=lambda plan: True, objective=nothing)
    assert unified(task, drop=drop, spacing=spacing).plan.layers() == kept


@pytest.mark.parametrize("drop", [0, 3, 4])
def test_unified_keeps_two_layers(drop: int) -> None:
    with pytest.raises(UsageError, match="U504"):
        unified(random_task(), drop=drop)


def test_hsd_takes_every_second_layer_level_by_level() -> None:
    base = Base("llama", "x", (("decoder", 10),))
    nothing: Any = Untouchable()
    plan = Plan(base, (("decoder", tuple(Run(i) for i in range(10))),))
    task = PruningJob(nothing, nothing, plan, spec=nothing, legal=lambda p: True, objective=nothing)
    gone = [hsd(task, drop=number).plan.dropped() for number in range(1, 9)]
    order = [(set(more) - set(less)).pop() for less, more in itertools.pairwise([(), *gone])]
    assert order == [1, 3, 5, 7, 2, 6, 4, 8], "of 1-8 every second one; of 2 4 6 8 then 2 and 6; of 4 8 then 4"
    for number in (0, 9):
        with pytest.raises(UsageError, match="U504"):
            hsd(task, drop=number)


def dense_logits(task: PruningJob, found: Found | None = None) -> torch.Tensor:
    with torch.no_grad():
        if found is None:
            return task.model(input_ids=task.data.ids, use_cache=False).logits
        with running(task.model, found.plan, found.weights):
            return task.model(input_ids=task.data.ids, use_cache=False).logits


@pytest.mark.parametrize("family", [name for name in PLANTED if name != "qwen2"])  # its biases differ, and stay
def test_laco_lets_the_layer_that_does_nothing_become_the_one_behind_it(family: str) -> None:
    task = task_of(planted(family), own_text(family))
    found = laco(task, drop=1)
    assert found.plan.dropped() == (PLANTED[family] + 1,)
    assert torch.allclose(dense_logits(task, found), dense_logits(task), atol=1e-5)
    assert min(c.score for c in found.trace) == pytest.approx(0, abs=1e-6)


def test_laco_collapses_from_the_top_by_the_formula_of_the_paper() -> None:
    task = random_task()
    theta = [layer.mlp.down_proj.weight.detach() for layer in task.model.model.layers]
    found = laco(task, drop=3, group=3, interval=1, low=0, threshold=-1.0)
    assert str(found.plan) == "0:laco-0" and [c.notation for c in found.trace] == ["0-1", "0"]
    first = theta[1] + (theta[2] - theta[1]) + (theta[3] - theta[1])
    assert torch.allclose(found.weights["laco-0.mlp.down_proj.weight"], first, atol=1e-6), "and then 1 goes into 0"
    assert "laco-0.input_layernorm.weight" not in found.weights
    job = Job(task.model, task.data, drop_layers(task.plan, [2, 3]), batch=16)
    once = laco(task, drop=2, group=3, threshold=-1.0)
    wanted = difference_sum(job).weights
    assert {name.split(".", 1)[1] for name in once.weights} == {name.split(".", 1)[1] for name in wanted}
    assert all(torch.allclose(t, wanted[f"difference-sum-{n[5:]}"], atol=1e-6) for n, t in once.weights.items())
    for options in ({"threshold": 1.1}, {"low": 3}, {"low": 2, "drop": 2}):
        with pytest.raises(UsageError, match="U504"):
            laco(task, **{"drop": 1, **options})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="U558"):
        laco(task, drop=1, group=1)


def test_foldgpt_shares_the_matrices_of_what_sleb_leaves() -> None:
    task = random_task()
    left = sleb(task, drop=1).plan.layers()
    found = foldgpt(task, drop=1)
    assert str(found.plan) == f"{left[0]},{left[1]}={left[0]}:fold-{left[1]},{left[2]}"
    assert all(name.endswith(".scale") and tensor.shape == (1,) for name, tensor in found.weights.items())
    assert foldgpt(task, drop=1, group=1).plan == sleb(task, drop=1).plan
    assert foldgpt(task, drop=3).weights == {}


@pytest.mark.parametrize("family", tuple(PLANTED))
def test_cqil_puts_the_layer_that_does_nothing_beside_another(family: str) -> None:
    # in float64, since sums of two branches are rounded in another order than one layer behind the other
    task, null = task_of(copy.deepcopy(planted(family)).double(), own_text(family)), PLANTED[family]
    found = cqil(task, drop=1, bypass=False)
    assert {c.notation for c in found.trace} == {"(0|1),2-3", "0,(1|2),3", "0-1,(2|3)"}
    side = next(step for step in found.plan.steps() if isinstance(step, Parallel))
    assert null in {run.layer for run in side.branches}
    assert torch.allclose(dense_logits(task, found), dense_logits(task), atol=1e-5)


def test_cqil_saves_steps_and_refuses_a_budget() -> None:
    task = random_task()
    two = cqil(task, drop=2)
    assert str(two.plan) == "(0|1)bypass,(2|3)bypass"
    assert two.trace[0].score == pytest.approx(task.objective(task.data)(two.plan))
    assert str(cqil(task, drop=2, group=3, bypass=False).plan) in ("(0|1|2),3", "0,(1|2|3)")
    for options in ({"drop": 3}, {"drop": 1, "group": 1}, {"drop": 0}):
        with pytest.raises(UsageError, match="U504"):
            cqil(task, **options)
    with pytest.raises(UsageError, match="U504: no range"):
        cqil(replace(task, legal=lambda plan: False), drop=1)
    with pytest.raises(UsageError, match=r"U523.*params=0.8"):
        cqil(replace(task, budget=counted_budget("params", 0.8, task.spec)), drop=1)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_llm_streamline_is_the_span_of_the_highest_cosine_and_a_net(number: int) -> None:
    task = random_task()
    scores = cosine_span(task.model, task.data, span=number, batch=16)
    first = min(range(4 - number + 1), key=scores.values.__getitem__)
    bare = llm_streamline(task, drop=number, epochs=0, loss_epochs=0)
    assert bare.plan.dropped() == tuple(range(first, first + number)) and not bare.weights
    assert bare.scores == scores
    net = llm_streamline(task, drop=number, kind="swiglu", epochs=1, loss_epochs=0)
    assert net.plan.steps()[first] == Map(first, first + number - 1, f"map-{first}-{first + number - 1}")


def test_tyukin_goes_from_the_top_and_spares_the_last_layer_when_asked() -> None:
    found = {keep: tyukin(random_task(), drop=2, keep_last=keep).plan for keep in (True, False)}
    assert {str(plan) for plan in found.values()} == {"0,1-2m,3", "0-1,2-3m"}
    assert str(tyukin(random_task(), drop=1, part="mlp").plan) == "0-1,2a,3"
    with pytest.raises(UsageError, match="U504"):
        tyukin(random_task(), drop=4)


def test_block_pruner_is_greedy_over_parts_and_stops_at_a_budget() -> None:
    task = random_task()
    whole = block_pruner(replace(task, budget=counted_budget("params", 0.8, task.spec)))
    assert block_pruner(task, drop=len(whole.trace), exhaustive=True).plan == whole.plan


def test_puzzle_needs_a_budget() -> None:
    with pytest.raises(UsageError, match="U540"):
        puzzle(random_task())


def test_shortgpt_is_block_influence_in_one_shot() -> None:
    task = random_task()
    scores = block_influence(task.model, task.data, skip_first=3, batch=16)
    found = shortgpt(task, drop=2, skip_first=3)
    assert found.plan.dropped() == tuple(sorted(scores.order()[:2]))
    assert found.scores == scores


def test_loss_one_shot_is_the_loss_when_removed_in_one_shot() -> None:
    task = random_task()
    scores = loss_removed(task.model, task.data, batch=16)
    assert loss_one_shot(task, drop=2).plan.dropped() == tuple(sorted(scores.order()[:2]))


@pytest.mark.parametrize("tokens", ["last", "all"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_gromov_is_the_span_with_the_smallest_angle(tokens: Any, number: int) -> None:
    task = random_task()
    scores = angular_distance(task.model, task.data, span=number, tokens=tokens, batch=16)
    first = min(range(4 - number + 1), key=scores.values.__getitem__)
    found = gromov(task, drop=number, tokens=tokens)
    assert found.plan.dropped() == tuple(range(first, first + number))
    assert found.scores == scores


def test_sleb_is_greedy_on_the_loss_of_stock_models() -> None:
    task = random_task()
    gone: tuple[int, ...] = ()
    for _ in range(2):
        left = [layer for layer in range(4) if layer not in gone]
        losses = {layer: _loss_without(task, (*gone, layer)) for layer in left}
        gone += (min(losses, key=losses.__getitem__),)
    found: Found = sleb(task, drop=2)
    assert found.plan.dropped() == tuple(sorted(gone))
    assert found.trace[-1].score == pytest.approx(_loss_without(task, gone), rel=1e-5)


def _loss_without(task: PruningJob, gone: tuple[int, ...]) -> float:
    plan = Plan.identity(task.spec).with_steps(tuple(s for i, s in enumerate(task.plan.steps()) if i not in gone))
    return mean_nll(rewrite(task.model, plan), task.data, batch=16)


def test_sleb_keeps_one_layer_at_each_end_as_its_code_does() -> None:
    task = random_task()
    losses = {layer: _loss_without(task, (layer,)) for layer in (1, 2)}
    assert sleb(task, drop=1, ends=1).plan.dropped() == (min(losses, key=losses.__getitem__),)
    assert sleb(task, drop=2, ends=1).plan.dropped() == (1, 2)
    with pytest.raises(UsageError, match="U504: only 2 layers may go, not 3"):
        sleb(task, drop=3, ends=1)


def test_sleb_evaluates_no_plan_twice() -> None:
    task = random_task()
    evaluated: list[str] = []
    real = task.objective(task.data)

    def counting(data: Data) -> Any:
        return lambda plan: evaluated.append(str(plan)) or real(plan)

    sleb(PruningJob(task.model, task.data, task.plan, spec=task.spec, legal=task.legal, objective=counting), drop=3)
    assert len(evaluated) == len(set(evaluated)) == 4 + 3 + 2


@pytest.mark.parametrize("first", [1, 4])
def test_shortened_llama_keeps_its_ends_where_it_can(first: int) -> None:
    task = random_task()
    scores = taylor(task.model, task.data, batch=16)
    found = shortened_llama(task, drop=1, first=first, last=1)
    free = range(1, 3) if first == 1 else range(4)
    assert found.plan.dropped() == (min(free, key=scores.values.__getitem__),)
    by_loss = shortened_llama(task, drop=2, by="perplexity").plan
    assert by_loss == loss_one_shot(task, drop=2).plan


def test_cull_mt_removes_what_the_task_does_not_need(tmp_path: Path) -> None:
    family = "llama"
    words = [{"context": f"{i} and", "continuation": "so on"} for i in range(3)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(word) + "\n" for word in words))
    task = replace(task_of(planted(family), own_text(family)), tokenizer=Letters())
    found = cull_mt(task, drop=1, file=tmp_path / "t.jsonl")
    dense = score_tasks(task.model, Letters(), load_tasks(tmp_path / "t.jsonl"))
    others = [_task_loss(task, layer, tmp_path / "t.jsonl") for layer in range(4)]
    assert found.plan.dropped() == (others.index(min(others)),)
    assert others[PLANTED[family]] == pytest.approx(1 - dense.accuracy + dense.nll / 1000)
    with pytest.raises(UsageError, match="U574"):
        cull_mt(task_of(planted(family), own_text(family)), drop=1, file=tmp_path / "t.jsonl")


def _task_loss(task: PruningJob, layer: int, file: Path) -> float:
    with running(task.model, drop_layers(task.plan, [layer])):
        found = score_tasks(task.model, Letters(), load_tasks(file))
    return 1 - found.accuracy + found.nll / 1000
