"""Widths: a learned gate at each mlp says how many of its neurons a token, or a sequence, uses."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from shoal.deciding.choices import ChoiceOptions, Choosing, Picked, numbers, require_choices
from shoal.deciding.forward import ForwardView
from shoal.deciding.gating import gate_names, with_gates
from shoal.deciding.narrower_mlp import NarrowerMlp
from shoal.deciding.policy import Policy
from shoal.deciding.policy_options import layer_list
from shoal.errors import PlanError, UsageError
from shoal.examples import PolicyExamples, Refusal
from shoal.models.neuron_places import NeuronPlaces, neuron_places
from shoal.models.opened import OpenedModel
from shoal.plan import Plan, Run, Spec
from shoal.plan.spec import NeuronSpec
from shoal.plan.steps import PartName, runs

EXAMPLES = PolicyExamples(
    deciding=("widths:layers=1-2,always=0.5", "widths:layers=1-2,always=0", "widths:layers=2,always=0.25,grain=token"),
    never=("widths:always=1", "widths:shares=1", "widths:always=1,grain=token"),
    always={"widths:layers=1,always=0": "0,1a,2,3", "widths:layers=1-2,always=0,grain=none": "0,1a,2a,3"},
    refused=(
        Refusal("gates that have not learned", "widths", "U718", "width-1"),
        Refusal("a layer that is not there", "widths:layers=7,always=1", "U581", "layer 7"),
        Refusal("more than all neurons", "widths:shares=0.5+2", "U719", "shares=0.5"),
        Refusal("no numbers", "widths:shares=half", "U719", "shares=half"),
        Refusal("a share twice", "widths:shares=1+1", "U719", "different numbers"),
        Refusal("a width that is no choice", "widths:always=0.3", "U719", "always=0.3"),
        Refusal("a temperature of 0", "widths:temperature=0,always=1", "U719", "temperature=0"),
        Refusal("experts", "widths:layers=1,always=1", "P168", "layer 1", family="mixtral"),
    ),
)  # fmt: skip
GATE = "width"
"""What the names of its gates begin with."""


def widths(
    plan: Plan,
    spec: Spec,
    *,
    layers: str = "",
    shares: str = "0+0.25+0.5+0.75+1",
    grain: Literal["row", "token", "none"] = "row",
    scale: bool = False,
    relax: Literal["straight-through", "gumbel"] = "straight-through",
    temperature: float = 1.0,
    always: float | None = None,
) -> Policy:
    """Use the first neurons of an mlp, as many as its gate says; the gates learn by `shoal heal`.

    The score of choice c at the gate g is s_c = W_c . x + b_c for the state x [hidden] in front of the layer, scaled to
    a root mean square of 1; the highest is taken, and the mlp adds W_out (m * a) for its neurons a, m_j = 1 for the
    first `shares`_c of them and 0 for the others: the mlp without these neurons. Share 0 skips the mlp. The attention
    always runs, so no key is ever missing. The tensors are g.weight [choices, hidden] and g.bias [choices]. `grain`:
    row, one choice for each sequence, of the mean of x over the prompt's real tokens, kept until the sequence ends;
    token; none, the bias alone. `layers` (3-5,7) have gates; without them all of the plan but the first. `always`:
    gates without tensors, which take this share for every token. `scale`: kept neurons are multiplied by
    2 sigmoid(r . x + q), with an r of its own from each share to the next, g.scale [shares above 0, hidden] and
    g.scale_bias; it begins as 1.

    In training the choice is hard and its gradient that of the softmax of s / `temperature` (`relax` gumbel: of s plus
    Gumbel noise, which draws the choice): of whether the mlp runs at all, and, where it does, of how many neurons.

    Neurons stand in the order of the tensors: sort them first, with `shoal fuse MODEL --with narrow:keep=1,by=output`,
    and use that plan. Where all tokens of a call agree, the other neurons are not computed; otherwise all are, and the
    trace counts them as simulated. The trace counts an mlp with a share of its neurons as so much of half a layer.

    Source: Liu et al. 2021 (EBERT, ACL Findings 2021, 425): structures chosen for each input by small predictors,
    straight-through. Rescaled outputs: LC-Net of Xia (thesis, ark:/88435/dsp015q47rs12x), joint skipping of layers and
    channels. Nested widths: Cai et al. 2024 (Flextron, arXiv 2406.10260).

    How we differ: neurons alone, no heads; nested widths in place of a mask for each structure; the base stands still
    unless a recipe says otherwise. The formulas of LC-Net's two nets were not to be had: its rescaling is here by
    groups of neurons. Raises U718 for gates without tensors and without `always`, U719 for an option out of range, P168
    for a layer whose mlp has no neurons that are known (experts).
    """
    chosen = numbers("widths", "shares", shares, "U719")
    if chosen[-1] > 1:
        raise UsageError(f"widths: shares={shares} goes beyond 1, all neurons; write shares=0+0.5+1", code="U719")
    options = ChoiceOptions(chosen, grain, relax, temperature, chosen[0] if len(chosen) == 1 else always)
    require_choices("widths", options, "U719")
    named = plan.layers()[1:] if not layers else layer_list(layers)
    return _Widths(with_gates(plan, spec, named, _of_mlps(gate_names(GATE)), None), options, spec, scale)


def _of_mlps(names: Callable[[Run], str | None]) -> Callable[[Run], str | None]:
    """These names, and none for a run that is an attention alone."""
    return lambda run: None if run.part == "attention" else names(run)


class _Widths(Choosing):
    leaves_out: ClassVar[PartName] = "mlp"
    name, recipe = "widths", "ebert"

    def __init__(self, plan: Plan, options: ChoiceOptions, spec: Spec, scale: bool) -> None:
        super().__init__(plan, options)
        self.scale = scale
        self.neurons = {run.layer: _neurons(run, spec) for run in runs(plan.steps()) if run.gate is not None}

    def prepare(self, opened: OpenedModel) -> dict[int, NeuronPlaces | str]:
        return neuron_places(opened, sorted(self.neurons))

    def shapes(self, spec: Spec) -> dict[str, tuple[int, ...]]:
        made, groups = super().shapes(spec), len(self.options.some)
        if self.scale:
            for gate in self.gates:
                made |= {f"{gate}.scale": (groups, spec.stack().hidden), f"{gate}.scale_bias": (groups,)}
        return made

    def around(
        self, run: Run, forward: ForwardView, hidden: torch.Tensor, picked: Picked
    ) -> tuple[Callable[[nn.Module], AbstractContextManager[None]], Callable[[], bool]]:
        places: Any = forward.prepared[run.layer]
        known = places if isinstance(places, NeuronPlaces) else None
        made = NarrowerMlp(self.neurons[run.layer], known, self.options.some, picked)
        if self.scale and self.options.always is None:
            own = self.own(run, forward, hidden.device)
            logits = self.read(run, forward, hidden, " scale", lambda state: state @ own["scale"].T + own["scale_bias"])
            made = replace(made, factors=2 * logits.sigmoid())
        return made.around, lambda: made.cut


def _neurons(run: Run, spec: Spec) -> NeuronSpec:
    found = spec.stack().layers[run.layer].neurons
    if found is None:
        raise PlanError(
            f"no neurons of the mlp of layer {run.layer} of this {spec.family} are known, as of experts, so none "
            "can be left out; name other layers (widths:layers=...)",
            code="P168",
        )
    return found
