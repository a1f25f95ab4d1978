"""What the attentions of several layers are given, and one layer's as predicted from another's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shoal.executing.inputs import run_stack
from shoal.fitting.result import Job
from shoal.fitting.sharing import Group
from shoal.live import running
from shoal.models.evaluating import evaluating
from shoal.models.opened import open_model
from shoal.models.precision import in_float64

Prediction = tuple[torch.Tensor, torch.Tensor]
"""What a reader is given, from what its source is given: as a linear map, and as an affine one."""
LEAST = 1e-9
"""The least ridge."""


@dataclass
class Moments:
    """Sums over tokens of x y^T, x and y [hidden + 1] what two layers' matrices read, with a 1 behind it."""

    own: dict[int, torch.Tensor]
    """Of a layer with itself."""
    cross: dict[tuple[int, int], torch.Tensor]
    """(reader, layer that is read): of both."""


def moments_of(job: Job, groups: Sequence[Group], modules: dict[int, str]) -> Moments:
    """Run the job's plan on its text and sum up what goes into `modules` (by layer, names within it). Padding does not
    count. Memory: two matrices [hidden + 1, hidden + 1] in float64 for each reader, and the inputs of one batch."""
    opened = open_model(job.model)
    stack = opened.stack(job.stack)
    seen: dict[int, torch.Tensor] = {}
    found = Moments({}, {})

    def listen(layer: int) -> torch.utils.hooks.RemovableHandle:
        def hook(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            flat = in_float64(args[0].detach().reshape(-1, args[0].shape[-1]))
            seen[layer] = torch.cat([flat, torch.ones_like(flat[:, :1])], 1)

        return stack.layer(layer).get_submodule(modules[layer]).register_forward_pre_hook(hook)

    handles = [listen(layer) for layer in modules]
    done = 0
    try:
        with running(opened.model, job.plan, job.weights), evaluating(opened.model):
            for ids, mask in job.data.batches(job.batch):
                run_stack(opened.model, stack, ids, mask)
                real = torch.ones(ids.numel(), dtype=torch.bool) if mask is None else mask.bool().flatten().cpu()
                _add(found, groups, {layer: x[real.to(x.device)] for layer, x in seen.items()})
                done += len(ids)
                job.tell(done, len(job.data), "inputs of the attentions")
    finally:
        for handle in handles:
            handle.remove()
    return found


def _add(found: Moments, groups: Sequence[Group], inputs: dict[int, torch.Tensor]) -> None:
    for layer, x in inputs.items():
        found.own[layer] = found.own.get(layer, 0) + x.T @ x
    for key in {(layer, group[0]) for group in groups for layer in group[1:]}:
        x, source = (inputs[layer] for layer in key)
        found.cross[key] = found.cross.get(key, 0) + x.T @ source.to(x.device)


def predicted(moments: Moments, layer: int, source: int, ridge: float) -> Prediction:
    """T with x_layer ~ T x_source, for matrices without and with a bias: [inputs, inputs], and one more for the 1.

    T = argmin sum |x_layer - T x_source|^2 + ridge sum_i E[x_source,i^2] |T_i - D_i|^2 over the columns, D the best
    diagonal map. So the ridge does not depend on the sizes of single channels, and pulls towards what neighbouring
    layers, which read nearly the same state under other gains, really do. It is at least `LEAST`, as a text of fewer
    tokens than channels says nothing about most of them.
    """
    own = moments.own[source]
    eye = torch.eye(len(own), dtype=own.dtype, device=own.device)
    if layer == source:
        return eye[:-1, :-1], eye
    cross = moments.cross[layer, source].to(own.device)
    energy = own.diagonal().clamp(min=float(own.diagonal().mean()) * 1e-9)
    pull = (max(ridge, LEAST) * energy).diag()
    pull[-1, -1] = 0
    left, right = own + pull, cross + (cross.diagonal() / energy).diag() @ pull
    return torch.linalg.solve(left[:-1, :-1], right[:-1, :-1].T).T, torch.linalg.solve(left, right.T).T
