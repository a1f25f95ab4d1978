"""Exits, layer dropout and halting in training: weights as the papers have them, values as plain models give them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from shoal.api.heal import heal
from shoal.deciding.learning import Learning
from shoal.deciding.policy_text import make_policy
from shoal.errors import UsageError
from shoal.evaluation import perplexity
from shoal.healing.exits import open_exits, weights_of
from shoal.healing.learner import Learner
from shoal.healing.shown import side_of
from shoal.live import running
from shoal.models.load import Loaded
from shoal.models.opened import open_model
from shoal.plan import Plan, parse_plan
from shoal.plan.steps import runs

from .families import tiny
from .healing import batch_of, deep, gradients, learner_of
from .planted import random_data
from .test_loops import counted


def loss_of(learner: Learner, batch: dict[str, torch.Tensor]) -> float:
    with torch.no_grad():
        return float(learner(**batch)["loss"])


def nll_of(plan: str, batch: dict[str, torch.Tensor], layers: int = 6) -> float:
    """Cross-entropy of a static plan, per token, by the model's own head."""
    model = deep("llama", layers)
    with running(model, plan), torch.no_grad():
        logits = model(batch["ids"]).logits
    return float(cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["ids"][:, 1:].flatten()))


def test_weights_of_exits_are_those_of_the_papers() -> None:
    """Thirty layers, e_scale 0.2."""
    e = weights_of(30, "layerskip", 0.2)
    assert {layer: e[layer] for layer in (0, 1, 2, 10, 28, 29)} == pytest.approx(
        {0: 0.0, 1: 0.2, 2: 0.6, 10: 11.0, 28: 81.2, 29: 110.2}
    )
    aligned = weights_of(30, "aligned", 0.2)
    assert sum(aligned) == pytest.approx(1) and aligned[0] == pytest.approx(2 / (30 * 31))
    assert weights_of(4, "uniform", 0.2) == [1.0] * 4


def test_which_exits_count_in_a_step() -> None:
    assert open_exits(8, "all", 3, 0.5, "x") == [True] * 8
    turns = [open_exits(8, "rotate:4", step, 0.0, "x") for step in range(4)]
    assert [[n for n, on in enumerate(turn) if on] for turn in turns] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    rising = [sum(open_exits(8, "gradual", 0, progress, "x")) for progress in (0.0, 0.0625, 0.25, 0.5, 1.0)]
    assert rising == [1, 2, 5, 8, 8]
    assert open_exits(8, "gradual", 0, 0.0, "x")[-1]
    with torch.no_grad():
        assert all(open_exits(8, "rotate:4", 0, 0.0, "x"))
    for wrong in ("rotate", "rotate:0", "last"):
        with pytest.raises(UsageError, match="U502"):
            open_exits(8, wrong, 0, 0.0, "x")


@pytest.mark.parametrize("by", ["layerskip", "aligned", "uniform"])
def test_the_loss_at_exits_is_that_of_the_plans_that_end_there(by: str) -> None:
    batch = batch_of()
    with learner_of(deep(), f"exit-loss:by={by}", plan="0-5") as learner:
        found = loss_of(learner, batch)
    plans = ["0", *(f"0-{last}" for last in range(1, 6))]
    weights = weights_of(6, by, 0.2)  # type: ignore[arg-type]
    right = sum(w * nll_of(plan, batch) for w, plan in zip(weights, plans, strict=True)) / sum(weights)
    assert found == pytest.approx(right, rel=1e-5)


def test_the_end_teaches_the_exits_and_learns_nothing_itself() -> None:
    batch = batch_of()
    with learner_of(deep(), "exit-kd:at=every:2", plan="0-5", learn=("all",)) as learner:
        found = loss_of(learner, batch)
        moved = gradients(learner, batch, 4)
    model = deep()
    with torch.no_grad():
        end = model(batch["ids"]).logits[:, :-1].float().log_softmax(-1)
        total = 0.0
        for plan in ("0-1", "0-3"):
            with running(model, plan):
                exit_ = model(batch["ids"]).logits[:, :-1].float().log_softmax(-1)
            total += float((end.exp() * (end - exit_)).sum(-1).mean()) / 2
    assert found == pytest.approx(total, rel=1e-4)
    assert all(float(gradient.abs().max()) == 0 for name, gradient in moved.items() if "heal-4" in name)
    assert any(float(gradient.abs().max()) > 0 for name, gradient in moved.items() if "heal-3" in name)


@pytest.mark.parametrize(
    "policy", ["exit:after=2,prefill=true", "exit:confidence=0.02,first=1,every=2,prefill=true", "act:bias=-1"]
)
def test_a_recorder_is_told_what_norm_and_head_read(policy: str) -> None:
    """Not the state behind the last layer, where tokens have left before."""
    model, ids = deep(), batch_of()["ids"]
    opened = open_model(model)
    plan = parse_plan("0-4,5x3" if policy.startswith("act") else "0-5", Plan.identity(opened.spec))
    side = side_of(opened, make_policy(policy, plan, opened.spec).plan, {}, plan.stack_name(), policy)
    with torch.no_grad():
        read = side.logits(side.show(ids, None).last)
        side.remove()
        with running(model, plan, policy=policy):
            assert torch.equal(read, model(ids).logits)


def test_dropout_rates_are_those_of_the_paper() -> None:
    opened = open_model(deep("llama", 6))
    plan = Plan.identity(opened.spec)
    policy = make_policy("dropped:most=0.5", plan, opened.spec)
    rates = [policy.probability(layer, 1.0) for layer in range(6)]  # type: ignore[attr-defined]
    assert rates == pytest.approx([0.5 * (2 ** (layer / 5) - 1) for layer in range(6)])
    deeper = open_model(deep("llama", 30))
    thirty = make_policy("dropped:most=1", Plan.identity(deeper.spec), deeper.spec)
    golden = {0: 0, 10: 0.2700, 15: 0.4312, 20: 0.6129, 29: 1}
    assert {n: thirty.probability(n, 1.0) for n in golden} == pytest.approx(golden, abs=1e-4)  # type: ignore[attr-defined]
    rising = make_policy("dropped:most=0.5,rises=true", plan, opened.spec)
    assert rising.probability(5, 0.0) == 0 and rising.probability(5, 1.0) == pytest.approx(0.5)  # type: ignore[attr-defined]


def test_layers_are_left_out_for_whole_sequences_and_on_held_out_text_never() -> None:
    model, batch = deep(), {"input_ids": batch_of(64)["ids"]}
    ids = batch["input_ids"]
    with running(model, "0-5", policy="dropped:most=0.6,by=uniform") as handle:
        with torch.no_grad():
            whole = model(ids).logits
        with handle.learning(Learning(seed=3)):
            drawn = model(ids).logits
            depth = handle.trace.counts.asked
            again = model(ids).logits
        with handle.learning(Learning(seed=4)):
            other = model(ids).logits
    assert torch.equal(drawn, again) and not torch.equal(drawn, other)
    assert (depth - 6 * ids.numel()) / (6 * ids.numel()) == pytest.approx(0.4, abs=0.06)  # the first pass ran all
    with torch.no_grad():
        assert torch.equal(whole, model(ids).logits)


def test_a_menu_of_depths_is_run_by_sequences() -> None:
    """The first row runs the largest, the second the smallest, as the static plans of these depths do."""
    model, ids = deep(), batch_of(4)["ids"]
    with running(model, "0-5", policy="sampled:menu=2+4+6") as handle, handle.learning(Learning(seed=1)):
        drawn = model(ids).logits
    rights = []
    for plan in ("0-5", "0,5", "0,2,3,5"):
        with running(model, plan), torch.no_grad():
            rights.append(model(ids).logits)
    assert torch.allclose(drawn[0], rights[0][0], atol=1e-5)
    assert torch.allclose(drawn[1], rights[1][1], atol=1e-5)
    assert all(any(torch.allclose(drawn[row], right[row], atol=1e-5) for right in rights) for row in (2, 3))


def test_nothing_is_left_out_at_a_rate_of_zero() -> None:
    batch = batch_of()
    with learner_of(deep(), "cross-entropy", plan="0-5", policy="dropped:most=0") as learner:
        dropped = gradients(learner, batch, 4)
    with learner_of(deep(), "cross-entropy", plan="0-5") as learner:
        plain = gradients(learner, batch, 4)
    assert dropped.keys() == plain.keys()
    assert all(torch.equal(dropped[name], gradient) for name, gradient in plain.items())


def test_pondering_is_counted_as_the_paper_counts_it() -> None:
    """N + R, token by token; the gradient goes through the remainder alone."""
    batch = batch_of()
    with learner_of(
        deep(), "ponder:threshold=0.9", learn=("gates",), plan="0,1,5x4", policy="act:unit=halt,threshold=0.9"
    ) as learner:
        for parameter in learner.moving_tensors.values():
            torch.nn.init.normal_(parameter, 0, 0.4)
        found = loss_of(learner, batch)
        ledger = learner.sides[0].learning.ledger["halting"]
        halting = torch.stack(ledger)[:, batch["shift_labels"] != -100].T.tolist()
        moved = gradients(learner, batch, 4)
    total = 0.0
    for token in halting:
        given, loops = 0.0, 1
        for p in token:
            if given + p >= 0.9:
                break
            given, loops = given + p, loops + 1
        total += loops + (1 - given)
    assert found == pytest.approx(total / len(halting), rel=1e-5)
    assert all(float(gradient.abs().max()) > 0 for gradient in moved.values())


def test_a_larger_cost_makes_fewer_loops() -> None:
    loaded, loops = Loaded(deep("llama", 6), None, "tiny"), []
    for tau in (0.0, 3.0):
        found = heal(
            loaded, "0,1,2,3x3", "halting", settings={"tau": tau, "rate": 0.05}, tokens=2000, batch=4, held=4,
            data=random_data(100, 12), watch=random_data(4, 12, seed=1),
        )  # fmt: skip
        assert found.policy == "act:unit=halt"
        with running(loaded.model, found.plan, found.weights, policy=found.policy) as handle, torch.no_grad():
            loaded.model(random_data(8, 12, seed=2).ids)
            loops.append(handle.trace.counts.asked / handle.trace.counts.tokens)
    assert loops[1] < loops[0]


def test_early_exits_get_better_and_the_plan_stays() -> None:
    """Layer dropout is for the training alone: what is left is a stock model of the same depth."""
    loaded = Loaded(tiny("llama"), None, "tiny")
    text, held = random_data(200, 12), random_data(16, 12, seed=1)
    text.ids[:, 1::2] = text.ids[:, ::2]  # every second token is the one before it
    held.ids[:, 1::2] = held.ids[:, ::2]
    found = heal(
        loaded, Plan.identity(loaded.opened.spec), "layer-skip",
        settings={"learn": "all", "rate": 3e-3, "which": "all"}, tokens=6000, batch=4, held=8, data=text, watch=held,
    )  # fmt: skip
    assert not found.policy and found.plan.layers() == (0, 1, 2, 3)
    assert found.better  # by its objective: what the end says is not what it is after
    assert {run.gate for run in found.plan.steps()} == {None}  # type: ignore[union-attr]

    def losses(plan: str, weights: object = None) -> list[float]:
        made = []
        for last in range(4):
            with running(loaded.model, ",".join(plan.split(",")[: last + 1]), weights), torch.no_grad():  # type: ignore[arg-type]
                logits = loaded.model(held.ids).logits[:, :-1]
            made.append(float(cross_entropy(logits.flatten(0, 1), held.ids[:, 1:].flatten())))
        return made

    before, after = losses("0,1,2,3"), losses("0:heal-0,1:heal-1,2:heal-2,3:heal-3", dict(found.weights))
    assert all(new < old for new, old in zip(after, before, strict=True))


def test_the_loss_falls_with_every_exit() -> None:
    """Of a model that `aligned` trained, on held-out sequences of a toy task; before, later exits are no better."""
    loaded = Loaded(deep(), None, "own")
    whole = Plan.identity(loaded.opened.spec)
    found = heal(
        loaded, whole, "aligned", settings={"learn": "all", "rate": 1e-2}, tokens=4000, batch=4, held=16,
        data=counted(400, 0), watch=counted(4, 1),
    )  # fmt: skip
    steps = [f"{run.layer}:{run.weights}" for run in runs(found.plan.steps())]
    losses = []
    for depth in range(1, 7):
        with running(loaded.model, parse_plan(",".join(steps[:depth]), whole), dict(found.weights)):
            losses.append(perplexity(loaded.model, counted(64, 2)).nll)
    assert losses == sorted(losses, reverse=True)
    assert losses[0] - losses[-1] > 0.3
