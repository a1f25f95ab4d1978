"""Matrices in two factors: the base line of every tie, at equal stored values."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import nn

from shoal.errors import UsageError
from shoal.examples import TransformExamples
from shoal.fitting.low_rank import input_moments, linear_modules, two_factors
from shoal.fitting.result import Job, Transformed
from shoal.models.linear import matrix_of
from shoal.models.opened import open_model
from shoal.plan import Run, Step
from shoal.plan.select import run_of
from shoal.plan.steps import PartName

NEEDS_PLAN = False
EXAMPLES = TransformExamples(
    quick={"rank": 4},
    refused=(((), {"rank": 0}, "U559"), ((), {"first": 3, "last": 1}, "U559"), ((), {"every": 0}, "U559")),
)


def low_rank(
    job: Job,
    *,
    rank: int = 64,
    first: int = 0,
    last: int | None = None,
    every: int = 1,
    part: PartName = "layer",
    metric: Literal["inputs", "plain"] = "inputs",
) -> Transformed:
    """Let left right stand for each matrix of the layers `first`..`last`, every `every`th of them, or of one `part`.

    W [out, in] becomes left [out, rank] times right [rank, in], the best approximation of W x over what the module is
    given in the calibration text (`metric` inputs), or of W alone (plain). Only matrices that hold fewer numbers so are
    changed, so a `rank` beyond them changes nothing. Norms, biases and KV stay; parameters and FLOPs fall. The base
    line of ties and merges: at equal stored values it is compared with each of them. Raises U559 for numbers that fit
    no layers, and where a layer does not run whole with its own tensors.

    Source: truncated singular values (Eckart and Young 1936), in the metric of the inputs as in SVD-LLM (Wang et al.
    2024, arXiv 2403.07378) and ASVD (Yuan et al. 2023, arXiv 2312.05821).

    How we differ: one rank for all matrices; the root of the second moments is symmetric in place of a Cholesky factor.
    """
    places = _places(job, rank, first, last, every)
    opened = open_model(job.model)
    stack, facts = opened.stack(job.stack), opened.facts(job.stack).layers
    asked = [replace(run, part=part) if part != "layer" else run for _, run in places]
    modules = {key: one for key, one in linear_modules(stack, facts, asked).items() if _smaller(one, rank)}
    moments = input_moments(job, modules) if metric == "inputs" else {}
    steps: list[Step] = list(job.plan.steps(job.stack))
    weights, notes = dict(job.weights), list[str]()
    for number, (place, run) in enumerate(places):
        mine = [name for name in modules if name.startswith(f"{run.layer}.")]
        errors = []
        for name in mine:
            left, right, error = two_factors(matrix_of(modules[name]), rank, moments.get(name))
            key = f"low-rank-{run.layer}.{name.partition('.')[2]}"
            weights |= {f"{key}.left": left, f"{key}.right": right}
            errors.append(error)
        if mine:
            steps[place] = replace(run, weights=f"low-rank-{run.layer}")
            mean = (sum(error * error for error in errors) / len(errors)) ** 0.5
            notes.append(f"layer {run.layer}: {len(mine)} matrices, relative error {mean:.3f}")
        job.tell(number + 1, len(places), "low rank")
    return Transformed(job.plan.with_steps(tuple(steps), job.stack), weights, notes=tuple(notes))


def _places(job: Job, rank: int, first: int, last: int | None, every: int) -> list[tuple[int, Run]]:
    """The runs that are changed, with their places in the plan. Raises U559."""
    depth = job.plan.depth(job.stack)
    end = depth - 1 if last is None else last
    if rank < 1 or every < 1 or not 0 <= first <= end < depth:
        raise UsageError(
            f"low-rank: rank={rank} and every={every} must be 1 or more and first={first} to last={end} layers from 0 "
            f"to {depth - 1}; write low-rank:rank=64",
            code="U559",
        )
    found = [(n, run) for n, run in enumerate(map(run_of, job.plan.steps(job.stack))) if run is not None]
    asked = [(n, run) for n, run in found if run.layer in range(first, end + 1, every)]
    wrong = next((run for _, run in asked if not run.own_tensors), None)
    if wrong is not None or len({run.layer for _, run in asked}) < len(asked):
        raise UsageError(
            f"low-rank changes layers that run once with their own tensors, and the plan {job.plan} runs others; name "
            "the layers (first, last)",
            code="U559",
        )
    return asked


def _smaller(module: nn.Module, rank: int) -> bool:
    out, width = matrix_of(module).shape
    return rank * (out + width) < out * width
