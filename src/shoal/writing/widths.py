"""Runs with another number of neurons than their layer, in a stock checkpoint."""

from __future__ import annotations

from shoal.errors import WriteError
from shoal.executing.weights import Tensors
from shoal.models.opened import OpenedModel
from shoal.plan import Plan, shapes_of
from shoal.plan.neurons import neurons_made
from shoal.plan.steps import runs
from shoal.plan.tensors import tensors_of_run


def refuse_widths(opened: OpenedModel, plan: Plan, weights: Tensors) -> None:
    """Raise W276 for runs that have not as many neurons as their layers: a stock config has one number for all."""
    shapes = shapes_of(weights)
    for stack in opened.spec.stacks:
        for run in runs(plan.steps(stack.name)):
            layer = stack.layers[run.layer]
            made = neurons_made(layer, tensors_of_run(run, shapes))
            if layer.neurons is not None and made not in (0, layer.neurons.count):
                raise WriteError(
                    f"layer {run.layer} has {made} neurons by the tensors of the plan and {layer.neurons.count} by the "
                    "config, which a stock checkpoint holds for all layers; write the plan --as planned",
                    code="W276",
                )
