"""FoldGPT's grouping: neighbouring layers share one layer's matrices, each with norms and scales of its own."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from shoal.errors import UsageError
from shoal.examples import TransformExamples
from shoal.fitting.holes import Pair
from shoal.fitting.merge import middle
from shoal.fitting.result import Fit, Job, Transformed
from shoal.fitting.writers import Prober, Writer, folded_scale, output_module
from shoal.models.opened import open_model
from shoal.models.precision import in_float64
from shoal.plan import Run
from shoal.plan.steps import PartName, layers_of

NEEDS_PLAN = False
EXAMPLES = TransformExamples(refused=(((1,), {"first": 0, "group": 3, "last": 2}, "U559"),))


def fold_groups(job: Job, *, first: int | None = None, last: int | None = None, group: int = 2) -> Transformed:
    """Let the layers `first`..`last` that run share matrices in groups, in which each child is tied to its parent.

    The parent is the first of its group, and a child is written `3=2:fold-3`. Without `first` and `last` these are the
    middle half of the stack. Removed layers among them stay removed. A child keeps its norms and biases, and what its
    parent's attention and mlp write for it is scaled by one number each, s = <d, r> / <d, d> over the calibration
    tokens (each weighted by 1 / |y|^2), d what the parent's part writes on the stream as folded so far and r = y - x
    what leads to the dense state y behind that part, stored as the scale [1] of the module that writes it; s = 1 where
    that cannot be written into the weights exactly, as before a norm, which the child keeps. A planned checkpoint holds
    the shared matrices once, a stock one copies; the same FLOPs and KV. `group` 1 changes nothing. Raises U559 for a
    range or a group that holds no two layers, and where something else runs among them than whole layers, upwards, with
    their own weights and KV.

    Source: Liu et al. 2024 (FoldGPT, arXiv 2407.00928).

    How we differ: scales in closed form instead of training, no gates (drop layers by any method first).
    """
    first, last = middle(job, first, last)
    steps = list(job.plan.steps(job.stack))
    start, children = _range(job, first, last, group)
    pair = Pair(job)
    _require_parts(pair, children)
    prober, weights = Prober(pair), dict(job.weights)
    fits: list[Fit] = []
    pair.prune_to(start)
    for place, child in enumerate(children):
        parent = children[place - place % group]
        if parent != child:
            own, made = _child(pair, prober, parent, child)
            weights_id = f"fold-{child}"
            weights |= {f"{weights_id}.{name}": tensor for name, tensor in own.items()}
            steps[start + place] = Run(child, weights=weights_id if own else None, tie=parent)
            fits.append(made)
        pair.pruned.advance(steps[start + place], weights)
        job.tell(place + 1, len(children), "fold groups")
    return Transformed(job.plan.with_steps(tuple(steps), job.stack), weights, tuple(fits))


def _range(job: Job, first: int, last: int, group: int) -> tuple[int, list[int]]:
    """The position of the first step that belongs to the layers first..last, and the layers that these steps run."""
    steps = job.plan.steps(job.stack)
    places = [n for n, step in enumerate(steps) if any(first <= layer <= last for layer in layers_of(step))]
    children = [layer for n in places for layer in layers_of(steps[n])]
    whole = [steps[n] for n in places] == [Run(layer) for layer in children]
    together = not places or places == list(range(places[0], places[-1] + 1))
    if group < 1 or len(children) < max(2, group) or not whole or not together or children != sorted(set(children)):
        raise UsageError(
            f"no groups of {group} can be folded in layers {first} to {last}; name two or more layers that the plan "
            f"{job.plan} runs whole, one after the other",
            code="U559",
        )
    return places[0], children


def _require_parts(pair: Pair, children: list[int]) -> None:
    """Raise U559 for layers that cannot run an attention or an mlp alone, each of which has a scale of its own."""
    for layer in children:
        if pair.inputs.facts.layers[layer].parts is None:
            raise UsageError(
                f"layer {layer} has no attention and mlp that could be scaled apart, so its group cannot be folded; "
                "merge the layers (slerp, weighted-average) instead",
                code="U559",
            )


def _child(pair: Pair, prober: Prober, parent: int, child: int) -> tuple[dict[str, torch.Tensor], Fit]:
    """The tensors with which the parent stands in for the child, and how near it comes."""
    stack = open_model(pair.job.model).stack(pair.job.stack)
    layer, own = stack.layer(parent), dict[str, torch.Tensor]()
    pair.dense_to(child)
    scales, start, error = [], list(pair.pruned.states), (0.0, 0.0)
    for part in ("attention", "mlp"):
        writers = prober.writers(parent, part)
        run = Run(child, part, "fold" if own else None, tie=parent)
        scale, error = _scale(pair, run, own, Run(child, part), free=bool(writers))
        scales.append(f"{scale:.4g}" if writers else "1 (a norm is behind)")
        own |= _scaled(layer, writers, scale, start[0].shape[-1])
        run = replace(run, weights="fold" if own else None)
        pair.pruned.advance(run, {f"fold.{n}": t for n, t in own.items()})
        pair.dense.advance(Run(child, part))
    pair.pruned.states = start
    pair.at = child + 1
    return own, Fit(str(child), *error, note=f"scales of attention and mlp {', '.join(scales)}; errors behind the mlp")


def _scaled(layer: nn.Module, writers: tuple[Writer, ...], scale: float, hidden: int) -> dict[str, torch.Tensor]:
    """One number beside the module that writes what a part adds; experts, which are several, are scaled themselves."""
    module = output_module(layer, writers) if writers else None
    if module is None:
        return folded_scale(layer, writers, torch.full((hidden,), scale))
    return {f"{module}.scale": torch.tensor([scale], dtype=layer.get_parameter(f"{module}.weight").dtype)}


def _scale(
    pair: Pair, run: Run, own: dict[str, torch.Tensor], dense: Run, *, free: bool
) -> tuple[float, tuple[float, float]]:
    """The factor of what `run` adds that brings the stream nearest to the dense one behind `dense`, 1 unless it is
    free, and the relative errors of adding nothing and of adding it."""
    part: PartName = run.part
    assert part != "layer"
    dd = dr = rr = torch.zeros((), dtype=torch.float64)
    count = 0
    tensors = {f"fold.{n}": t for n, t in own.items()}
    with torch.no_grad():
        for number, keep in enumerate(pair.kept):
            x, y = in_float64(pair.pruned.states[number][keep]), in_float64(pair.dense.run(number, dense)[keep])
            weight = 1 / y.norm(dim=-1, keepdim=True)
            added = (in_float64(pair.pruned.run(number, run, tensors)[keep]) - x) * weight
            wanted = (y - x) * weight
            dd, dr, rr = dd + (added**2).sum(), dr + (added * wanted).sum(), rr + (wanted**2).sum()
            count += added.numel()
    scale = float(dr / dd) if free and float(dd) else 1.0
    return scale, (float(rr) / count, float(rr - 2 * scale * dr + scale**2 * dd) / count)
