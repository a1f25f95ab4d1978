"""Loop: a span of layers runs again, damped, gated token by token, or given the embeddings anew."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import atanh
from typing import Literal

import torch

from shoal.errors import UsageError
from shoal.examples import TransformExamples
from shoal.fitting.merge import middle
from shoal.fitting.result import Job, Transformed
from shoal.models.opened import open_model
from shoal.plan import Run, Step
from shoal.plan.select import run_of

NEEDS_PLAN = False
EXAMPLES = TransformExamples(
    refused=(
        ((), {"times": 0}, "U559"),
        ((), {"first": 2, "last": 9}, "U559"),
        ((), {"gate": True, "share": 1.0}, "U559"),
        ((1,), {"first": 1, "last": 1}, "U559"),
    )
)


def loop(
    job: Job,
    *,
    first: int | None = None,
    last: int | None = None,
    times: int = 2,
    order: Literal["span", "layers"] = "span",
    share: float | None = None,
    of: Literal["again", "every"] = "again",
    gate: bool = False,
    inject: float | None = None,
    embed: bool = False,
) -> Transformed:
    """Run the layers `first`..`last` of the plan (without them its middle half) `times` times, each run with a KV row.

    `order`: the span as a whole again and again (span), or each layer as often in its place (layers). What stands
    around the runs that come again, or with `of`=every around all of them, as tensors of their own, which can learn
    (the learner `plan`): `share` s, y = x + s (f(x) - x), a damped or interpolated repeat, s = 1 / `times` of every run
    being sub-steps; `gate`, the same with a share for each token, s = (tanh(w x + b) + 1) / 2, which begins with w = 0
    and at `share` (0.5 without one). At the beginning of each further loop: `inject` a, x + a e with e the state behind
    the embeddings; `embed`, x + v with a vector v for each loop, zero at first. `times`=1 and `share`=0 are the model.
    Stored parameters hardly grow, FLOPs and KV do. Raises U559 for numbers that fit no layers or give no share, and
    where something else than whole layers runs there, or layers with tensors of their own.

    Source: TroL, Lee et al. 2024 (arXiv 2406.12246: order=layers, gate=true); Universal Transformer, Dehghani et al.
    2019 (arXiv 1807.03819: embed); input injection as in deep equilibrium models, Bai et al. 2019 (arXiv 1909.01377).

    How we differ: TroL traverses again over the prompt alone and trains all of it; here every token does, with a gate
    of its own for each run (its released code has one gate for all layers). The Universal Transformer's vectors are
    sinusoids of the step; these are learned.
    """
    first, last = middle(job, first, last)
    steps = list(job.plan.steps(job.stack))
    begin, span = _span(job, first, last)
    shares = (share,) if share is not None else ()
    if times < 1 or any(not 0 <= one <= 1 for one in shares) or (gate and any(one in (0, 1) for one in shares)):
        what = "strictly between 0 and 1 for a gate" if gate else "from 0 to 1"
        raise UsageError(
            f"loop: times={times} and share={share} make no loop; give times from 1 on and a share {what}", code="U559"
        )
    weights = dict(job.weights)
    made: list[Step] = []
    like = next(open_model(job.model).stack(job.stack).layer(span[0].layer).parameters())
    hidden = open_model(job.model).spec.stack(job.stack).hidden
    for time, run in _order(span, times, order):
        own: dict[str, torch.Tensor] = {}
        if time > 0 or of == "every":
            own |= _weighed(share, hidden, gate=gate)
        if time > 0 and (order == "layers" or run is span[0]):
            own |= {} if inject is None else {"reads.-1": torch.tensor([inject])}
            own |= {"shift": torch.zeros(hidden)} if embed else {}
        name = f"loop-{run.layer}-{time}"
        weights |= {f"{name}.{key}": tensor.to(like) for key, tensor in own.items()}
        made.append(replace(run, weights=name) if own else run)
    steps[begin : begin + len(span)] = made
    return Transformed(job.plan.with_steps(tuple(steps), job.stack), weights)


def _weighed(share: float | None, hidden: int, *, gate: bool) -> dict[str, torch.Tensor]:
    """The tensors that weigh what a run does."""
    if gate:
        begin = 0.5 if share is None else share
        return {"mixer.weight": torch.zeros(1, hidden), "mixer.bias": torch.tensor([atanh(2 * begin - 1)])}
    return {} if share is None else {"change": torch.tensor([share])}


def _order(span: list[Run], times: int, order: str) -> Iterator[tuple[int, Run]]:
    """Every run with how often it ran before."""
    if order == "span":
        return ((time, run) for time in range(times) for run in span)
    return ((time, run) for run in span for time in range(times))


def _span(job: Job, first: int, last: int) -> tuple[int, list[Run]]:
    """The position of the first step among the layers first..last, and these steps. Raises U559 for anything else than
    whole layers with the base's tensors, one after the other."""
    steps = job.plan.steps(job.stack)
    runs = [(place, run_of(step)) for place, step in enumerate(steps)]
    places = [place for place, run in runs if run is not None and first <= run.layer <= last]
    found = [run for place in places if (run := run_of(steps[place])) is not None]
    plain = all(run.part == "layer" and run.weights is None and run.gate is None for run in found)
    whole = sorted({run.layer for run in found}) == [run.layer for run in found]
    whole = whole and 0 <= first <= last < job.plan.depth(job.stack)
    if not found or not plain or not whole or places != list(range(places[0], places[-1] + 1)):
        raise UsageError(
            f"layers {first} to {last} cannot run again: the plan {job.plan} must run one or more of them whole, "
            "upwards, one after the other, without tensors of their own; give first and last",
            code="U559",
        )
    return places[0], found
