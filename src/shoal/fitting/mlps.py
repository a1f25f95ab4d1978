"""The mlps of the layers that a transform names, by neurons, and a plan in which they have others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from shoal.errors import UsageError
from shoal.fitting.result import Job, Transformed
from shoal.models.neuron_places import NeuronPlaces, neuron_places
from shoal.models.opened import open_model
from shoal.plan import Run, Step, shapes_of
from shoal.plan.neurons import neurons_made
from shoal.plan.select import run_of
from shoal.plan.tensors import tensors_of_run

_PIECE = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class Mlp:
    """The mlp of one run."""

    place: int
    """Of the run among the steps."""
    run: Run
    known: NeuronPlaces
    tensors: Mapping[str, torch.Tensor]
    """By their names in the layer those of its neurons that it runs with, the run's own or the layer's."""

    @property
    def layer(self) -> int:
        return self.run.layer

    @property
    def count(self) -> int:
        return self.known.spec.count

    @property
    def reader(self) -> str:
        """The name of the matrix that reads the neurons."""
        return self.known.spec.reads.name

    def rows(self) -> dict[str, torch.Tensor]:
        """By tensor the numbers of each neuron, [neurons, places of each, others], in float32."""
        return {name: self.known.rows(name, tensor.detach().float()) for name, tensor in self.tensors.items()}

    def tensors_of(self, rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of these rows, in the dtypes of the run's."""
        return {name: self.known.tensor(name, one).to(self.tensors[name].dtype) for name, one in rows.items()}


def listed_layers(text: str, what: str) -> frozenset[int] | None:
    """`3-5+9` -> {3, 4, 5, 9}; None for no text, which means all. Raises U686 for another text."""
    found: set[int] = set()
    for piece in text.split("+") if text else ():
        match = _PIECE.fullmatch(piece.strip())
        if match is None or int(match[1]) > int(match[2] or match[1]):
            raise UsageError(
                f"{what}: layers={text} cannot be read at {piece!r}; write spans with + between them, as in "
                "layers=3-5+9",
                code="U686",
            )
        found |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(found) or None


def mlps_of(job: Job, layers: str, what: str) -> list[Mlp]:
    """The mlps of the `layers` that a person names, or of all that run once with an mlp of known neurons.

    Raises U686 for a named layer whose mlp does not run exactly once with matrices of its own, and U687 for one whose
    neurons are not known, or have become others already.
    """
    wanted = listed_layers(layers, what)
    opened = open_model(job.model)
    stack, spec = opened.stack(job.stack), opened.spec.stack(job.stack)
    by_layer: dict[int, list[tuple[int, Run]]] = {}
    for at, run in enumerate(map(run_of, job.plan.steps(job.stack))):
        if run is not None and run.part != "attention":
            by_layer.setdefault(run.layer, []).append((at, run))
    sole = {layer: own[0] for layer, own in by_layer.items() if len(own) == 1 and own[0][1].tie is None}
    if unfit := sorted((wanted or set()) - sole.keys()):
        raise UsageError(
            f"{what}: the mlp of layer {unfit[0]} must run once with matrices of its own, and in {job.plan} it does "
            "not; name others",
            code="U686",
        )
    chosen = sorted(sole.keys() if wanted is None else wanted)
    mlps = []
    for layer, known in neuron_places(opened, chosen, stack.name).items():
        at, run = sole[layer]
        own = tensors_of_run(run, job.weights)
        made = neurons_made(spec.layers[layer], shapes_of(own))
        if isinstance(known, NeuronPlaces) and made == known.spec.count:
            module = stack.layer(layer)
            tensors = {
                one.name: (own[one.name] if one.name in own else module.get_parameter(one.name)).detach()
                for one in known.spec.tensors
            }
            mlps.append(Mlp(at, run, known, tensors))
        elif wanted is not None:
            why = known if isinstance(known, str) else f"its tensors make {made} neurons already"
            raise UsageError(f"{what} cannot change the mlp of layer {layer}: {why}; name others", code="U687")
    if not mlps:
        raise UsageError(f"{what} finds no layer of {job.plan} with an mlp of known neurons; leave it out", code="U687")
    return mlps


def kept(count: int, keep: float, what: str) -> int:
    """How many of `count` neurons a share of them is, at least one. Raises U688 for a share that is none."""
    if not 0 < keep <= 1:
        raise UsageError(f"{what}: keep={keep:g} is no share of the neurons; give one above 0, at most 1", code="U688")
    return max(1, round(keep * count))


def with_mlps(
    job: Job, new: Mapping[int, Mapping[str, torch.Tensor]], mlps: list[Mlp], name: str, notes: tuple[str, ...]
) -> Transformed:
    """The plan in which the mlps of these layers have these tensors, by their names in the layer, under NAME-LAYER;
    what else a run has of its own goes with them."""
    steps: list[Step] = list(job.plan.steps(job.stack))
    weights = dict(job.weights)
    for one in mlps:
        if one.layer in new:
            weights_id = f"{name}-{one.layer}"
            steps[one.place] = replace(one.run, weights=weights_id)
            own = tensors_of_run(one.run, job.weights) | dict(new[one.layer])
            weights |= {f"{weights_id}.{key}": tensor for key, tensor in own.items()}
    return Transformed(job.plan.with_steps(tuple(steps), job.stack), weights, notes=notes)
