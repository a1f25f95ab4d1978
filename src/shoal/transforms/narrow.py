"""Mlps with fewer neurons: the most important ones first, so that narrower mlps are the beginning of wider ones."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from shoal.examples import TransformExamples
from shoal.executing.inputs import run_stack
from shoal.fitting.mlps import Mlp, kept, mlps_of, with_mlps
from shoal.fitting.result import Job, Transformed
from shoal.live import running
from shoal.models.evaluating import evaluating
from shoal.models.opened import open_model

NEEDS_PLAN = False
EXAMPLES = TransformExamples(
    refused=(
        ((), {"keep": 0.0}, "U688"),
        ((), {"keep": -1.0}, "U688"),
        ((), {"layers": "one"}, "U686"),
        ((2,), {"layers": "1-2"}, "U686"),
    )
)


def narrow(
    job: Job,
    *,
    keep: float = 0.5,
    layers: str = "",
    by: Literal["activation", "output", "magnitude", "random", "order"] = "activation",
    seed: int = 0,
) -> Transformed:
    """Put the neurons of each mlp in the order of their importance, and keep the first share `keep` of them.

    The importance of neuron j, over the tokens of the text under the plan, with a_j what the mlp makes of it:
    `activation` mean |a_j|; `output` sqrt(mean a_j^2) |W_out,j|, how much it writes; without text `magnitude`, the norm
    of all its numbers; `random`, drawn with `seed`, to compare with. An order changes nothing but the order in which
    is summed, so `keep` 1 is the model, up to rounding.

    `order` takes neurons as they stand. On a plan that was made with `keep` 1 it is the nested narrower mlp, and its
    tensors are views of the plan's: widths cost no memory, and several bound plans hold them side by side (`bind`, then
    `with bound.running()`). On the base model `order`, `keep` 1 changes nothing, bit for bit. `layers`: 3-5+9 names
    them; without it all whose neurons can be told.

    Source: Cai et al. 2024 (Flextron, arXiv 2406.10260, section 3: neurons sorted by accumulated activations, nested
    by taking the first ones); `activation` is its importance, that of Minitron (Muralidharan et al. 2024, arXiv
    2407.14679). `output` is our own.

    How we differ: neurons alone, no heads; the routers that choose widths, and the continued training of all widths
    together, are not here. A fused matrix of gate and up (phi3) has no views, so its first neurons are copied.

    Raises U686 for layers that do not run once with an mlp of their own, U687 for an mlp whose neurons are not known
    (experts, a norm between its matrices), U688 for a `keep` that is no share.
    """
    kept(1, keep, "narrow")
    mlps = mlps_of(job, layers, "narrow")
    if by == "order":
        new = {one.layer: one.known.first(one.tensors, kept(one.count, keep, "narrow")) for one in mlps}
        return Transformed(job.plan, job.weights) if keep == 1 else with_mlps(job, new, mlps, "narrow", ())
    reads = by in ("activation", "output")
    found = _by_text(job, mlps, by) if reads else {one.layer: _alone(one, by, seed) for one in mlps}
    new, notes = {}, list[str]()
    for one in mlps:
        importance = found[one.layer]
        count = kept(one.count, keep, "narrow")
        order = importance.argsort(descending=True, stable=True)[:count]
        new[one.layer] = one.known.chosen(one.tensors, order)
        share = float(importance[order].sum() / importance.sum().clamp(min=1e-30))
        said = "" if by == "random" else f", {share:.1%} of their {by}"
        notes.append(f"layer {one.layer}: {count} of {one.count} neurons{said}")
    return with_mlps(job, new, mlps, "narrow", tuple(notes))


def _alone(one: Mlp, by: str, seed: int) -> torch.Tensor:
    if by == "random":
        return torch.rand(one.count, generator=torch.Generator().manual_seed(seed * 1000 + one.layer))
    return sum((part.square().sum((1, 2)) for part in one.rows().values()), torch.zeros(())).sqrt().cpu()


class _Seen:
    """Sums over the tokens that count of what the mlps make of their neurons."""

    def __init__(self) -> None:
        self.sums: dict[int, torch.Tensor] = {}
        self.mask: torch.Tensor | None = None

    def add(self, layer: int, power: int, _: nn.Module, args: tuple[Any, ...]) -> None:
        neurons = args[0].detach().float().reshape(-1, args[0].shape[-1]).abs() ** power
        if self.mask is not None:
            neurons = neurons[self.mask.bool().flatten().to(neurons.device)]
        self.sums[layer] = self.sums.get(layer, torch.zeros(())) + neurons.sum(0).cpu()


def _by_text(job: Job, mlps: list[Mlp], by: str) -> dict[int, torch.Tensor]:
    """By layer the importance of its neurons, [neurons]."""
    opened, seen = open_model(job.model), _Seen()
    stack, power = opened.stack(job.stack), 1 if by == "activation" else 2
    done = 0
    with ExitStack() as behind, torch.no_grad(), evaluating(opened.model), running(opened, job.plan, job.weights):
        for one in mlps:
            reader = stack.layer(one.layer).get_submodule(one.reader.rpartition(".")[0])
            behind.callback(reader.register_forward_pre_hook(partial(seen.add, one.layer, power)).remove)
        for ids, mask in job.data.batches(job.batch):
            seen.mask = mask
            run_stack(opened.model, stack, ids, mask)
            done += len(ids)
            job.tell(done, len(job.data), "neurons")
    if by == "activation":
        return seen.sums
    return {one.layer: seen.sums[one.layer].sqrt() * one.rows()[one.reader].norm(dim=(1, 2)).cpu() for one in mlps}
