"""Merging removed layers into the layer before them: what all such rules share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from shoal.errors import UsageError
from shoal.evaluation.distances import angle
from shoal.fitting.holes import Hole, find_holes
from shoal.fitting.result import Job, Transformed
from shoal.models.opened import open_model
from shoal.models.packed import is_plain
from shoal.models.precision import in_float64
from shoal.models.stacks import Stack
from shoal.models.streamed import parameters_of
from shoal.plan import Step
from shoal.plan.select import whole_run

Rule = Callable[[str, Sequence[torch.Tensor], Hole], torch.Tensor]
"""(name, the tensor of the kept layer and then of each removed one in float32, hole) -> the merged tensor."""


def merged(job: Job, name: str, rule: Rule, *, norms: bool = False) -> Transformed:
    """Give the layer before each removed span the tensors that `rule` makes of its own and the removed layers'.

    `norms`: vectors (norm gains, biases) too, else matrices only. Raises U553 when the plan removes nothing, U556 when
    the layers have other tensors or shapes than the one before them, U557 when no whole layer runs before a span.
    """
    stack = open_model(job.model).stack(job.stack)
    steps: list[Step] = list(job.plan.steps(job.stack))
    weights = dict(job.weights)
    for hole in find_holes(job.plan, name, job.stack):
        run = whole_run(steps[hole.position - 1] if hole.position else None)
        if hole.part != "layer" or run is None:
            raise UsageError(
                f"{name} merges {hole} into the layer before it, and no whole layer with its own weights runs there; "
                "keep one",
                code="U557",
            )
        removed = range(hole.first, hole.last + 1)
        weights_id = f"{name}-{run.layer}"
        for key, tensor, parts in _parts(stack, name, run.layer, removed, norms):
            weights[f"{weights_id}.{key}"] = rule(key, parts, hole).to(tensor.dtype).contiguous()
        steps[hole.position - 1] = replace(run, weights=weights_id)
    return Transformed(job.plan.with_steps(tuple(steps), job.stack), weights)


def combined(
    model: torch.nn.Module, name: str, layer: int, shares: Mapping[int, float], stack: str | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of `layer` when its matrices become sum_j shares[j] * theta_j over layers j of the base, under the
    weights id NAME-LAYER. Raises U556 as `merged` does."""
    others = [index for index in shares if index != layer]
    factors = [shares.get(layer, 0.0), *(shares[index] for index in others)]
    made = {}
    for key, tensor, parts in _parts(open_model(model).stack(stack), name, layer, others, norms=False):
        total = sum((factor * part for factor, part in zip(factors, parts, strict=True)), torch.zeros_like(parts[0]))
        made[f"{name}-{layer}.{key}"] = total.to(tensor.dtype).contiguous()
    return made


def blended(
    model: torch.nn.Module,
    name: str,
    layer: int,
    other: int,
    rule: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    stack: str | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors that `rule` makes of those of `layer` and of `other`, two of one shape in float32, norms among them,
    under the weights id NAME-LAYER. Raises U556 as `merged` does."""
    parts = _parts(open_model(model).stack(stack), name, layer, [other], norms=True)
    return {f"{name}-{layer}.{key}": rule(*both).to(tensor.dtype).contiguous() for key, tensor, both in parts}


def arc(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """The point at t on the arc from `a` to `b`, tensors of one shape, each taken as one vector."""
    if t == 0 or torch.equal(a, b):
        return a
    between = angle(in_float64(a).flatten(), in_float64(b).flatten()).cpu()
    if torch.sin(between) < 1e-6:
        return a + t * (b - a)
    first, second = torch.sin((1 - t) * between) / torch.sin(between), torch.sin(t * between) / torch.sin(between)
    return (first * a + second * b).float()


def _parts(
    stack: Stack, name: str, layer: int, removed: Sequence[int], norms: bool
) -> Iterator[tuple[str, torch.Tensor, list[torch.Tensor]]]:
    """Each tensor of `layer` that is merged: its name, itself, and it and those of the removed layers in float32."""
    own = parameters_of(stack.layer(layer))
    others = [parameters_of(stack.layer(index)) for index in removed]
    _require_alike(name, layer, removed, own, others)
    for key, tensor in own.items():
        if norms or tensor.dim() >= 2:
            rest = (other[key].detach().to(tensor.device).float() for other in others)
            yield key, tensor, [tensor.detach().float(), *rest]


def _require_alike(
    name: str,
    layer: int,
    removed: Sequence[int],
    own: dict[str, torch.nn.Parameter],
    others: list[dict[str, torch.nn.Parameter]],
) -> None:
    for index, other in zip(removed, others, strict=True):
        shapes = [{key: p.shape for key, p in one.items()} for one in (own, other)]
        if shapes[0] != shapes[1]:
            raise UsageError(
                f"{name} cannot merge layer {index} into {layer}: their tensors differ; merge layers of one kind",
                code="U556",
            )
    if not all(is_plain(p) for one in (own, *others) for p in one.values()):
        raise UsageError(
            f"{name} needs the weights of layer {layer} in memory and not quantised; load the model so", code="U556"
        )


def middle(job: Job, first: int | None, last: int | None) -> tuple[int, int]:
    """`first` and `last`, or where they are not given the ends of the middle half of the stack."""
    depth = job.plan.depth(job.stack)
    quarter = depth // 4
    return quarter if first is None else first, depth - quarter - 1 if last is None else last


def share_in(t: float, name: str) -> float:
    """`t` itself when it is a share. Raises U558."""
    if not 0 <= t <= 1:
        raise UsageError(f"{name} takes t from 0 (the kept layer alone) to 1, not {t:g}", code="U558")
    return t
