"""Prune&Comp: the magnitude that a removed span would have added, given back by scaling the weights behind it."""

from __future__ import annotations

import torch

from shoal.examples import TransformExamples
from shoal.fitting.holes import Hole, Pair, find_holes
from shoal.fitting.result import Fit, Job, Transformed
from shoal.fitting.writers import Prober, folded_scale, renamed
from shoal.models.precision import in_float64
from shoal.plan import Map, Step
from shoal.plan.select import run_of

EXAMPLES = TransformExamples(role="corrected")


def compensate(job: Job, *, fold: bool = True, skip_first: int = 1, outlier: float = 8.0) -> Transformed:
    """Scale the state at each hole by a = mean(|y|) / mean(|x|), so that later layers meet the magnitude they know.

    x [hidden] is the state of the model as pruned so far, y [hidden] the dense model's state behind the removed span;
    means over tokens, without the first `skip_first` and those longer than `outlier` medians. With `fold` the scale
    goes into weights: what every later attention and mlp writes is divided by the product of the scales before it,
    which, under norms that ignore the scale of their input, is the same function and leaves the embedding, often
    tied to the head, alone. Without `fold`, or where a later layer's outputs cannot be rewritten exactly, it is a step
    y = a x of its own, which runs live only.

    Source: Prune&Comp, 2025 (arXiv 2507.18212).

    How we differ: the paper scales the weights before the hole.
    """
    holes = find_holes(job.plan, "compensate", job.stack)
    pair = Pair(job, skip_first=skip_first, outlier=outlier)
    scales, fits = _scales(job, pair, holes)
    steps, weights, notes = list(pair.steps), dict(job.weights), []
    if fold:
        folded = _folded(pair, {h.position: s for h, s in zip(holes, scales, strict=True)})
        if folded is not None:
            return Transformed(job.plan.with_steps(tuple(folded[0]), job.stack), weights | folded[1], tuple(fits), ())
        notes.append("what a later layer writes cannot be scaled exactly, so the scales are steps of their own")
    for hole, scale in reversed(list(zip(holes, scales, strict=True))):
        steps.insert(hole.position, Map(hole.first, hole.last, hole.weights))
        weights[f"{hole.weights}.scale"] = torch.full((pair.pruned.states[0].shape[-1],), scale)
    return Transformed(job.plan.with_steps(tuple(steps), job.stack), weights, tuple(fits), tuple(notes))


def _scales(job: Job, pair: Pair, holes: tuple[Hole, ...]) -> tuple[list[float], list[Fit]]:
    """The scale at each hole, on the stream as scaled before it, and the errors with and without it."""
    scales: list[float] = []
    fits: list[Fit] = []
    for number, hole in enumerate(holes):
        pair.prune_to(hole.position)
        targets, counted = pair.targets(hole), pair.counted(pair.limit())
        sums = torch.zeros(5, dtype=torch.float64)
        for state, target, keep in zip(pair.pruned.states, targets, counted, strict=True):
            x, y = in_float64(state[keep]), in_float64(target.to(state.device)[keep])
            z = y - x
            parts = (x.norm(dim=-1).sum(), y.norm(dim=-1).sum(), x.square().sum(), (x * z).sum(), z.square().sum())
            sums += torch.stack(parts).cpu()
        length, wanted, xx, xz, zz = sums.tolist()
        scales.append(wanted / length)
        elements = targets[0].shape[-1] * sum(int(keep.sum()) for keep in counted)
        # |y - s x|^2 as |z - (s - 1) x|^2 with z = y - x: sums of y and x would cancel where a layer changes little
        drop, scaled = ((zz - 2 * s * xz + s * s * xx) / elements for s in (0.0, scales[-1] - 1))
        fits.append(Fit(str(hole), drop, scaled, note=f"times {scales[-1]:.4g}"))
        pair.pruned.states = [state * scales[-1] for state in pair.pruned.states]
        job.tell(number + 1, len(holes), "compensate")
    return scales, fits


def _folded(pair: Pair, scales: dict[int, float]) -> tuple[list[Step], dict[str, torch.Tensor]] | None:
    """The steps with every run behind a hole scaled by one over the scales before it; None where one cannot be."""
    prober = Prober(pair)
    steps: list[Step] = []
    weights: dict[str, torch.Tensor] = {}
    total = 1.0
    for position, step in enumerate(pair.steps):
        total *= scales.get(position, 1.0)
        if total == 1.0:
            steps.append(step)
            continue
        run = run_of(step)
        if run is None or not run.own_tensors:
            return None
        layer = pair.inputs.stack.layer(run.layer)
        own: dict[str, torch.Tensor] = {}
        for part in ("attention", "mlp"):
            if run.part in ("layer", part):
                writers = prober.writers(run.layer, part)
                if not writers:
                    return None
                size = pair.pruned.states[0].shape[-1]
                own |= folded_scale(layer, writers, torch.full((size,), 1 / total))
        scaled, new = renamed(run, f"compensate-{run.layer}", own)
        steps.append(scaled)
        weights |= new
    return steps, weights
