"""What a learner is given and what it answers: the tensors that move, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shoal.deciding.policy import Policy
from shoal.errors import UsageError
from shoal.models.opened import OpenedModel
from shoal.plan import Parallel, Plan, Run, Step
from shoal.plan.tensors import tensors_of

if TYPE_CHECKING:
    from shoal.data import Data

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class LearnJob:
    """A model and the plan whose tensors shall learn."""

    opened: OpenedModel
    plan: Plan
    weights: Tensors
    """Tensors that the plan names already."""
    stack: str
    data: Data | None = None
    """Text, for a learner that chooses by what the model does."""
    batch: int = 1
    seed: int = 0
    policy: Policy | None = None
    """Who decides at the plan's gates."""

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps that are healed."""
        return self.plan.steps(self.stack)

    def layer(self, index: int) -> nn.Module:
        """A layer of the base."""
        return self.opened.stack(self.stack).layer(index)


@dataclass
class Moving:
    """Tensors that move while a plan runs, the frozen base beside them."""

    plan: Plan
    """What runs while they move."""
    weights: Tensors
    """What it names, moving tensors among them."""
    parameters: dict[str, nn.Parameter]
    """What moves, by the names that checkpoints have."""
    finish: Callable[[Tensors], tuple[Plan, dict[str, torch.Tensor]]]
    """From the plan's other tensors, finished, to the plan with all of them as they are by then, in the dtypes of the
    base."""
    detach: Callable[[], None] = lambda: None
    """Takes out of the model what was put into its modules."""
    without: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)
    """A context in which the model's modules are the base's own."""
    rate: float | None = None
    """Its own learning rate; None: that of the stage."""


def whole_runs(job: LearnJob, positions: Sequence[int] | None = None) -> list[Run]:
    """The runs at these positions of the steps (None: at all), branches of groups among them, each layer once.

    Raises U679 for tied runs, whose shared matrices would become their own.
    """
    steps = job.steps if positions is None else [job.steps[n] for n in positions]
    found = [run for step in steps for run in _runs(step)]
    if (tied := next((run for run in found if run.tie is not None), None)) is not None:
        raise UsageError(
            f"layer {tied.layer} of the plan has the matrices of {tied.tie}, and this learner would give it its own; "
            "let the plan's own tensors learn (--learn plan, or RECIPE:learn=plan)",
            code="U679",
        )
    return list({(run.layer, run.weights): run for run in found}.values())


def _runs(step: Step) -> tuple[Run, ...]:
    return step.branches if isinstance(step, Parallel) else (step,) if isinstance(step, Run) else ()


def unused(job: LearnJob, run: Run) -> tuple[str, ...]:
    """How the names in its layer begin of what a run does not call, as it takes that from another layer."""
    roles = job.opened.facts(job.stack).layers[run.layer].roles
    return () if roles is None else tuple(f"{name}." for name in roles.unused(run.unmade))


def tensors_in(job: LearnJob, run: Run) -> dict[str, torch.Tensor]:
    """What a run's layer computes with: its own parameters, or the plan's in their place; by name in the layer."""
    named = job.layer(run.layer).named_parameters()
    own: dict[str, torch.Tensor] = {n.replace(".base_layer.", "."): p for n, p in named if ".lora_" not in n}
    return own if run.weights is None else {**own, **tensors_of(run.weights, job.weights)}


def healed_id(job: LearnJob, run: Run) -> str:
    """The id of the healed tensors of a run: `heal-12`, whatever they were before; where the layer runs with several
    weights, these are in the name too."""
    several = len({one.weights for one in whole_runs(job) if one.layer == run.layer}) > 1
    if not several or run.weights is None:
        return f"heal-{run.layer}"
    return run.weights if run.weights.startswith("heal-") else f"heal-{run.layer}-{run.weights}"


def with_weights(plan: Plan, stack: str, ids: Mapping[tuple[int, str | None], str]) -> Plan:
    """The plan in which the runs of (layer, weights so far) have new weights."""

    def changed(run: Run) -> Run:
        return replace(run, weights=ids.get((run.layer, run.weights), run.weights))

    def of(step: Step) -> Step:
        if isinstance(step, Parallel):
            return replace(step, branches=tuple(map(changed, step.branches)))
        return changed(step) if isinstance(step, Run) else step

    return plan.with_steps(tuple(map(of, plan.steps(stack))), stack)


def cloned(
    job: LearnJob, runs: Sequence[Run], what: str, *, keep: Callable[[int, str], bool] = lambda layer, name: True
) -> Moving:
    """Clones of the layers of `runs` that learn, float32 in training; the base's own tensors never move.

    `keep`: which parameters move, by base layer and name there; the others stay as they are. Raises U675 for none.
    """
    ids = {(run.layer, run.weights): healed_id(job, run) for run in runs}
    moving: dict[str, nn.Parameter] = {}
    fixed: dict[str, torch.Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for run in runs:
        silent = unused(job, run)
        for name, tensor in tensors_in(job, run).items():
            if name.startswith(silent):
                continue
            full = f"{ids[run.layer, run.weights]}.{name}"
            dtypes[full] = tensor.dtype
            if keep(run.layer, name) and tensor.is_floating_point():
                moving[full] = nn.Parameter(tensor.detach().float().clone())
            elif run.weights is not None and f"{run.weights}.{name}" in job.weights:
                fixed[full] = tensor
    if not moving:
        raise nothing_moves(what)
    plan = with_weights(job.plan, job.stack, ids)
    weights = {**job.weights, **fixed, **moving}

    def finish(others: Tensors) -> tuple[Plan, dict[str, torch.Tensor]]:
        made = {name: p.detach().to(dtypes[name]).contiguous() for name, p in moving.items()}
        return plan, {**others, **fixed, **made}

    return Moving(plan, weights, moving, finish)


def nothing_moves(what: str) -> UsageError:
    """U675: a learner that finds no tensor."""
    return UsageError(
        f"{what} finds nothing in this plan that could learn; choose another (shoal ls learners)", code="U675"
    )
