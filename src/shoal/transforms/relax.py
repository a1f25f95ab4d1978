"""Low-rank changes that bring tied layers nearer to their own matrices."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from shoal.errors import UsageError
from shoal.examples import TransformExamples
from shoal.executing.looked_up import TiedTensors
from shoal.fitting.low_rank import linear_modules, moments_of, two_factors
from shoal.fitting.result import Job, Transformed
from shoal.models.linear import matrix_of, turned
from shoal.models.opened import open_model
from shoal.plan import Run, Step
from shoal.plan.select import run_of

NEEDS_PLAN = False
EXAMPLES = TransformExamples(refused=(((), {"rank": 4}, "U559"),))


def relax(
    job: Job,
    *,
    rank: int = 64,
    metric: Literal["inputs", "plain"] = "inputs",
    bias: bool = False,
    start: Literal["fitted", "zero"] = "fitted",
) -> Transformed:
    """Give each tied run of the plan a change up down of `rank` beside every matrix that it shares.

    W_tied + up down [out, in] is the best approximation of the layer's own W: up [out, rank], down [rank, in] are the
    first singular vectors of W - W_tied (`metric` plain, as in the paper), or of what that difference makes of the
    module's inputs on the calibration text (inputs). At full rank the layer is its own again; at a `rank` at which the
    factors hold as many numbers as the matrix the tie saves nothing. `bias`: what is then left of W x on average over
    the text is added as a shift [out]; with `rank`=0 it is all that a run has of its own. `start`=zero fits nothing: up
    is zero and down is drawn (LoRA's own start), so that the tie is unchanged, bit for bit, until it is trained. Raises
    U559 for a rank below 1 without `bias`, for zero with `bias`, and for a plan without ties or whose tied runs have
    tensors of their own.

    Source: relaxed recursive transformers, Bae et al. 2024 (arXiv 2410.20672, section 2.2: initialisation by truncated
    singular values); the metric is that of `low-rank`.

    Biases: EdgeFormer, Ge et al. 2022 (arXiv 2202.07959).

    How we differ: EdgeFormer learns its biases, and has prefixes too; the layer that lends its own matrices (`0` in
    `15=0`) gets none, for it would be zero.
    """
    steps = list(job.plan.steps(job.stack))
    places = [(n, run) for n, step in enumerate(steps) if (run := run_of(step)) is not None and run.tie is not None]
    if (
        rank < (0 if bias else 1)
        or (bias and start == "zero")
        or not places
        or any(run.weights is not None for _, run in places)
    ):
        raise UsageError(
            f"relax:rank={rank} changes runs with shared matrices and no tensors of their own, rank 1 or more (0 with "
            f"bias=true, which goes with start=fitted), and the plan {job.plan} has none such; tie first (--with tie)",
            code="U559",
        )
    opened = open_model(job.model)
    stack, facts = opened.stack(job.stack), opened.facts(job.stack).layers
    modules = linear_modules(stack, facts, [run for _, run in places])
    fitted = start == "fitted"
    seen = moments_of(job, modules, planned=False) if fitted and (bias or metric == "inputs") else None
    moments = {} if seen is None or metric == "plain" else seen.sums
    weights, notes, draw = dict(job.weights), list[str](), torch.Generator().manual_seed(job.seed)
    for number, (place, run) in enumerate(places):
        name = f"relax-{run.layer}" if run.part == "layer" else f"relax-{run.layer}-{run.part}"
        errors = []
        for key, module in linear_modules(stack, facts, [run]).items():
            path = key.partition(".")[2]
            if (shared := _shared(job, run, path, module)) is None:
                continue
            difference = matrix_of(module) - shared
            most = min(rank, *difference.shape)
            made = two_factors(difference, most, moments.get(key)) if fitted else _zero(difference, most, draw)
            up, down, error = made
            if most:
                weights |= {f"{name}.{path}.up": up, f"{name}.{path}.down": down}
            if bias and seen is not None:
                mean = seen.mean(key).float().cpu()
                weights[f"{name}.{path}.shift"] = difference.float().cpu() @ mean - up @ (down @ mean)
            errors.append(error)
        steps[place] = replace(run, weights=name)
        mean = (sum(error * error for error in errors) / max(1, len(errors))) ** 0.5
        notes.append(f"layer {run.layer}: {mean:.3f} of the difference is left")
        job.tell(number + 1, len(places), "relax")
    changed: tuple[Step, ...] = tuple(steps)
    return Transformed(job.plan.with_steps(changed, job.stack), weights, notes=tuple(notes))


def _zero(difference: torch.Tensor, rank: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Factors [out, rank] and [rank, in] that change nothing yet, and the share of the difference that is left: all."""
    out, inner = difference.shape
    return torch.zeros(out, rank), torch.randn(rank, inner, generator=draw) * inner**-0.5, 1.0


def _shared(job: Job, run: Run, path: str, module: torch.nn.Module) -> torch.Tensor | None:
    """The matrix [out, in] that the run has in the place of a module's own; None where it has its own, as a decoder's
    attention to the encoder beside the matrices of an encoder's layer."""
    if run.tied_to is not None:
        opened = open_model(job.model)
        stack = opened.stack(job.stack)
        tied = TiedTensors(stack.layer(run.layer), opened.layer_of(run.tied_to, stack), across=run.tied_layer is None)
        return turned(module, tied[f"{path}.weight"]) if f"{path}.weight" in tied.places else None
    new = job.weights.get(f"{run.tie}.{path}.weight")
    return matrix_of(module) if new is None else turned(module, new)
