"""Ordered: each sequence runs a span of layers in the order that a predictor finds best for it."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch

from shoal.deciding.gating import halved
from shoal.deciding.places import PlaceOptions, PlacePolicy
from shoal.deciding.policy import Grain, Policy
from shoal.errors import NotationError, UsageError
from shoal.examples import PolicyExamples, Refusal
from shoal.plan import Plan, Run, Spec, format_steps
from shoal.plan.notation import parse_steps
from shoal.plan.select import whole_run
from shoal.plan.steps import decides

EXAMPLES = PolicyExamples(
    deciding=("ordered:orders=1-2+2,choose=1",),
    never=("ordered:orders=1-2+2,1,choose=0", "ordered:orders=0-3,choose=0", "ordered:orders=2-3+3,2m,2a,choose=0"),
    always={"ordered:orders=1-2+2,1,choose=1": "0,2,1,3", "ordered:orders=1-3+3,2,1+2,choose=2": "0,2"},
    refused=(
        Refusal("orders that have not learned", "ordered:orders=1-2+2,1", "U714", "order-0.weight"),
        Refusal("no span of the plan", "ordered:orders=2,1+1-2", "U713", "orders=2,1"),
        Refusal("an order that is not there", "ordered:orders=1-2+2,1,choose=2", "U713", "choose=2"),
        Refusal("a layer outside of the span", "ordered:orders=1-2+3,1,choose=0", "U713", "layer 3"),
        Refusal("no layers", "ordered:orders=first,choose=0", "U713", "orders=first"),
    ),
)  # fmt: skip
PLACE = "order"


def ordered(
    plan: Plan,
    spec: Spec,
    *,
    orders: str = "",
    choose: int | None = None,
    relax: Literal["none", "mixture"] = "none",
) -> Policy:
    """Choose for each sequence one of a few orders of the same layers, by its prompt, and keep it to the end.

    `orders` 1-3+1-2,3m,3a joins lists of layers and halves by +: the first is a span of the plan as it stands, and any
    other one is what may run in its place; without them all layers of the plan but the first, and the same with the mlp
    in front of the attention in each. One of them may leave a layer out or run it twice. With x [hidden] the mean over
    the prompt's real tokens of the states in front of the span, each scaled to a root mean square of 1 in float32, the
    sequence takes the k with the highest p_k = softmax(w_k . x + b_k); w_k is order-K.weight [1, hidden], b_k
    order-K.bias [1]. The plan holds the span once for each order, and each has keys and values of its own; an order
    that no row of a batch takes is not called, one that some rows take is called for all (simulated).

    relax: none, the best order runs in training too; mixture, the term `order-mixture` compares all of them. `choose`:
    this order (from 0) for every sequence, without tensors: before anything has learned.

    Source: Zhu et al. 2021 (IOT, arXiv 2103.03457): orders of the parts of decoder layers, by the mean of what the
    encoder says.

    How we differ: there is no encoder, so what the layers in front of the span make of the prompt is read, and in
    training the whole window is the prompt; b is added, and w begins with 0, so that every sequence begins with the
    first order. The KV cache has rows for each order's layers; those of orders that a sequence did not take are zeros.
    Raises U713 for orders that are none, U714 for a predictor without tensors.
    """
    if not decides(plan.steps()):
        plan = _placed(plan, spec, orders)
    gates = {run.gate for run in plan.steps() if isinstance(run, Run)} - {None}
    if choose is not None and not 0 <= choose < len(gates):
        raise _no_order(f"choose={choose} of {len(gates)} orders", f"give a number from 0 to {len(gates) - 1}")
    return _Ordered(plan, PlaceOptions(rows=len(gates), by_row=True, relax=relax, single=False), choose)


class _Ordered(PlacePolicy):
    grain: ClassVar[Grain] = "row"
    consistent = True

    def __init__(self, plan: Plan, options: PlaceOptions, choose: int | None) -> None:
        super().__init__(plan, options)
        self.choose = choose

    def start(self, spec: Spec) -> dict[str, torch.Tensor]:
        """As good as alike, and the first order for all."""
        made = super().start(spec)
        made[f"{PLACE}-0.bias"].fill_(0.1)
        return made

    def fixed(self, place: str) -> int | None:
        return self.choose


def _placed(plan: Plan, spec: Spec, orders: str) -> Plan:
    """The plan with each order behind a gate of its own, one behind the other."""
    steps, pieces = plan.steps(), [piece for piece in orders.split("+") if piece]
    if not orders:
        span = steps[1:]
        turned = [one for step in span for one in reversed(halved(plan.with_steps((step,)), spec).steps())]
        lists = [span, tuple(turned)]
    else:
        lists = [_runs_of(piece) for piece in pieces]
    first = lists[0] if lists else ()
    at = next((n for n in range(len(steps)) if first and steps[n : n + len(first)] == first), None)
    if at is None or not all(whole_run(step) for step in first):
        raise _no_order(
            f"orders={orders:.60} does not begin with whole layers as they stand in the plan {format_steps(steps)}",
            "write them as in 1-3+1,3,2",
        )
    there = {run.layer for run in first if isinstance(run, Run)}
    gated: list[Run] = []
    for number, one in enumerate(lists):
        for run in one:
            if not isinstance(run, Run) or run.layer not in there or not run.own_tensors:
                what = f"layer {run.layer}" if isinstance(run, Run) else format_steps((run,))
                raise _no_order(
                    f"an order runs {what}, which is not one of the layers {format_steps(first)}", "leave it out"
                )
            gated.append(replace(run, gate=f"{PLACE}-{number}"))
    return plan.with_steps((*steps[:at], *gated, *steps[at + len(first) :]))


def _runs_of(text: str) -> tuple[Run, ...]:
    try:
        return tuple(parse_steps(text))  # type: ignore[arg-type]
    except NotationError:
        raise _no_order(f"orders={text:.60} is no list of layers", "write it as in 1-3 or 1,3m,3a") from None


def _no_order(what: str, remedy: str) -> UsageError:
    return UsageError(f"ordered: {what}; {remedy}", code="U713")
