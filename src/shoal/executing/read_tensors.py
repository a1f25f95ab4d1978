"""Which tensors of a model the runs of a plan read: what a checkpoint of the plan must hold, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from shoal.executing.looked_up import TiedTensors
from shoal.executing.weights import Tensors
from shoal.models.examine import LayerFacts
from shoal.models.first import first_only
from shoal.models.lists import BESIDE, Stack
from shoal.models.opened import OpenedModel
from shoal.plan import Plan, Run
from shoal.plan.low_rank import replaced_matrices
from shoal.plan.sources import StackLayer
from shoal.plan.steps import runs
from shoal.plan.tensors import tensors_of_run


def tensors_read(opened: OpenedModel, plan: Plan, weights: Tensors) -> frozenset[str]:
    """Names in the state dict of the model: all outside its layers, and of each layer what its runs read.

    A run reads its own layer's tensors without those of a part that it leaves out, of projections whose answer it takes
    from another layer, those that the plan's tensors replace, and matrices that it has from the layer that it is tied
    to; these are read there.
    """
    stacks = {f"{stack.path}.": stack for stack in opened.stacks}
    names = {name for name in opened.model.state_dict() if not name.startswith(f"{BESIDE}.")}
    found = {name for name in names if not name.startswith(tuple(stacks))}
    for prefix, stack in stacks.items():
        facts = opened.facts(stack.name).layers
        for run in runs(plan.steps(stack.name)):
            tied = None if run.tied_to is None else opened.layer_of(run.tied_to, stack)
            there = _prefix(opened, run, stack)
            for other, name in _read(run, stack.layer(run.layer), tied, facts[run.layer], weights):
                found.add(f"{there if other else f'{prefix}{run.layer}.'}{name}")
        if (first := first_only(stack)) is not None:
            found |= {name for name in names if name.startswith(f"{prefix}0.{first.prefix}")}
    return frozenset(found & names)


def _prefix(opened: OpenedModel, run: Run, stack: Stack) -> str:
    """What stands in front of the names of the layer that the run is tied to."""
    if isinstance(run.tied_to, StackLayer):
        return f"{opened.stack(run.tied_to.stack).path}.{run.tied_to.layer}."
    return f"{stack.path}.{run.tied_to}."


def _read(
    run: Run, layer: nn.Module, tied: nn.Module | None, fact: LayerFacts, weights: Tensors
) -> Iterator[tuple[bool, str]]:
    """(whether it is of the tied layer, name in its layer) of what one run reads."""
    left_out: tuple[str, ...] = ()
    if run.part != "layer":
        assert fact.parts is not None  # check P105
        left_out = fact.parts.mlp if run.part == "attention" else fact.parts.attention
    if fact.roles is not None and run.part != "mlp":
        left_out = (*left_out, *fact.roles.unused(run.unmade))
    unread = tuple(f"{name}." for name in left_out)
    names = tensors_of_run(run, weights)
    own = names.keys() | replaced_matrices(names.keys())
    elsewhere = {} if tied is None else TiedTensors(layer, tied, across=run.tied_layer is None).places
    for name in layer.state_dict():
        if name in own or name.startswith(unread):
            continue
        yield name in elsewhere, elsewhere.get(name, name)
