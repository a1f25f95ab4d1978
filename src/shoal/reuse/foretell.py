"""Fitting what foretells neurons, and what that costs in accuracy."""

from __future__ import annotations

import torch
from torch import nn

from shoal.data import Data
from shoal.errors import PlanError, UsageError
from shoal.executing.inputs import require_whole
from shoal.fitting.low_rank import moments_of, two_factors
from shoal.fitting.result import Job
from shoal.models.linear import matrix_of
from shoal.models.opened import OpenedModel, open_model
from shoal.plan import Plan
from shoal.reuse.foretold import Foretold
from shoal.reuse.neurons import neuron_mlps, silencers


def fit_foretold(
    model: nn.Module | OpenedModel,
    data: Data,
    *,
    rank: int,
    layers: tuple[int, ...] | None = None,
    threshold: float = 0.0,
    stack: str | None = None,
    batch: int = 1,
) -> Foretold:
    """What foretells the numbers z = W x + b in front of the activation of each mlp, in a product of `rank`.

    left right is the best approximation of W [neurons, hidden] over what the dense model gives that matrix in the text
    of `data`, bias b + (W - left right) mean(x). A product of full rank foretells z itself. With a ReLU `threshold` 0
    leaves out what is foretold to be nothing; -inf leaves out nothing; smooth activations make hardly any neuron
    nothing, and what a threshold then leaves out is missed (docs/reuse.md). `layers`: None for all whose neurons are
    known. Costs rank (hidden + neurons) multiplications a token and layer.

    Raises U555 for a rank that is not between 1 and the size of the matrix, P160 for an mlp whose neurons are not known
    or that none of its matrices can silence, U507 while a plan is running.
    """
    opened = open_model(model)
    require_whole(opened, "foretelling neurons", stack)
    spec = opened.spec.stack(stack)
    chosen = [one.index for one in spec.layers if one.neurons is not None] if layers is None else list(layers)
    mlps = neuron_mlps(opened, chosen, stack)
    if not mlps:
        raise PlanError("no neurons can be foretold: no mlp has known ones; use another model", code="P160")
    modules = {str(mlp.layer): gate for mlp, gate in zip(mlps, silencers(opened, mlps, stack), strict=True)}
    plan = Plan.identity(opened.spec)
    moments = moments_of(Job(opened.model, data, plan, stack=stack, batch=batch), modules, planned=False)
    found: dict[int, dict[str, torch.Tensor]] = {}
    for layer, gate in modules.items():
        weight, bias = matrix_of(gate).float().cpu(), getattr(gate, "bias", None)
        if not 1 <= rank <= min(weight.shape):
            raise UsageError(f"a product of rank {rank} is not possible; use 1 to {min(weight.shape)}", code="U555")
        left, right, _ = two_factors(weight, rank, moments.sums[layer])
        shift = torch.zeros(len(weight)) if bias is None else bias.detach().float().cpu()
        shift = shift + (weight - left @ right) @ moments.mean(layer).float().cpu()
        found[int(layer)] = {"left": left, "right": right, "bias": shift}
    return Foretold(found, threshold)
