"""Fractional: a learned gate at each layer says whether it is skipped, runs in a few bits, or in all of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import nn

from shoal.deciding.choices import ChoiceOptions, Choosing, Picked, numbers, require_choices
from shoal.deciding.fewer_bits import MOST, FewerBits, InBits, matrices
from shoal.deciding.forward import ForwardView
from shoal.deciding.gating import gate_names, with_gates
from shoal.deciding.policy import Policy
from shoal.deciding.policy_options import layer_list
from shoal.errors import PlanError, UsageError
from shoal.examples import PolicyExamples, Refusal
from shoal.models.opened import OpenedModel
from shoal.plan import Plan, Run, Spec
from shoal.plan.sources import Fill
from shoal.plan.steps import runs

EXAMPLES = PolicyExamples(
    deciding=(
        "fractional:layers=1-2,always=4", "fractional:layers=1-2,always=0", "fractional:layers=2,always=8,grain=token",
        "fractional:layers=1,always=0,grain=token,fill=mask",
    ),
    never=("fractional:always=16", "fractional:bits=16", "fractional:always=16,grain=token"),
    always={"fractional:layers=1-2,always=0": "0,3", "fractional:layers=2-3,bits=0,grain=none": "0,1",
            "fractional:layers=1,always=0,grain=token": "0,2,3"},
    refused=(
        Refusal("gates that have not learned", "fractional", "U718", "bits-1"),
        Refusal("a layer that is not there", "fractional:layers=7,always=16", "U581", "layer 7"),
        Refusal("one bit", "fractional:bits=1+16", "U720", "bits=1"),
        Refusal("half a bit", "fractional:bits=4.5+16", "U720", "bits=4.5"),
        Refusal("bits between", "fractional:bits=12+16", "U720", "bits=12"),
        Refusal("more than all", "fractional:bits=8+32", "U720", "bits=8"),
        Refusal("bits that are no choice", "fractional:always=3", "U720", "always=3"),
        Refusal("the mask of a whole sequence", "fractional:grain=row,fill=mask,always=16", "U720", "fill=mask"),
        Refusal("experts", "fractional:always=16", "P169", "layer 1", family="mixtral"),
    ),
)  # fmt: skip
GATE = "bits"
"""What the names of its gates begin with."""


def fractional(
    plan: Plan,
    spec: Spec,
    *,
    layers: str = "",
    bits: str = "0+4+8+16",
    full: int = 16,
    grain: Literal["row", "token", "none"] = "row",
    relax: Literal["straight-through", "gumbel"] = "straight-through",
    temperature: float = 1.0,
    always: float | None = None,
    fill: Literal["auto", "project", "copy", "mask"] = "auto",
) -> Policy:
    """Skip a layer, run it in a few bits, or in all of them, as its gate says; the gates learn by `shoal heal`.

    The score of choice c at the gate g is s_c = W_c . x + b_c for the state x [hidden] in front of the layer, scaled to
    a root mean square of 1; the highest is taken. Of the `bits` 0 skips the layer, `full` is the layer as it is, and b
    of 2 to 8 has its matrices in b bits: n s in the place of w, s the largest |w| of an output row over 2^(b - 1) - 1,
    n = round(w / s). Norms, biases and what is computed with them stay as they are. A choice of b bits costs b / `full`
    of the layer, which is what the trace and the term `density` count; the copies are multiplied out for each call, so
    no time is saved here, and the trace says simulated. The tensors are g.weight [choices, hidden] and g.bias
    [choices]. `grain`: row, one choice for each sequence, of the mean of x over the prompt's real tokens, kept until
    the sequence ends, so that no key is ever missing; token, with a `fill` for tokens that skip (auto: project, in the
    bits that they would run in); none, the bias alone. `layers` (3-5,7) have gates; without them all of the plan but
    the first. `always`: gates without tensors, which take this choice for every token.

    In training the choice is hard and its gradient that of the softmax of s / `temperature` (`relax` gumbel: of s plus
    Gumbel noise, which draws the choice): of whether the layer runs at all, and, where it does, of the bits.

    Source: Shen et al. 2020 (Fractional Skipping, AAAI, arXiv 2001.00705): bits between skip and all.

    How we differ: a linear gate for each layer and not one LSTM for all; each matrix mixes what its bits make, where
    the paper mixes what the layer makes, so the values are the same and the gradient of the bits is its first order.
    Activations stay in full, and weights are not trained at all numbers of bits, as the paper's super-net is. Raises
    U718 for gates without tensors and without `always`, U720 for an option out of range, P169 for a layer with matrices
    that are no linear modules of floating-point numbers (experts, quantised weights).
    """
    chosen = numbers("fractional", "bits", bits, "U720")
    if any(one not in (0, full) and not (one.is_integer() and 2 <= one <= MOST and one < full) for one in chosen):
        raise UsageError(
            f"fractional: bits={bits} must be 0, whole numbers from 2 to {MOST}, or full={full}; write "
            f"bits=0+4+8+{full}",
            code="U720",
        )
    if grain != "token" and fill != "auto":
        raise UsageError(
            f"fractional: fill={fill} is for tokens that skip a layer that others run, and with grain={grain} no key "
            "is missing, so leave it out",
            code="U720",
        )
    options = ChoiceOptions(chosen, grain, relax, temperature, chosen[0] if len(chosen) == 1 else always)
    require_choices("fractional", options, "U720")
    named = plan.layers()[1:] if not layers else layer_list(layers)
    rule: Fill | None = None if grain != "token" else "project" if fill == "auto" else fill
    return _Fractional(with_gates(plan, spec, named, gate_names(GATE), rule), options, full)


class _Fractional(Choosing):
    name, recipe = "fractional", "fractional"

    def __init__(self, plan: Plan, options: ChoiceOptions, full: int) -> None:
        super().__init__(plan, options)
        self.full = full

    def prepare(self, opened: OpenedModel) -> FewerBits:
        stack = opened.stack()
        for run in runs(self.plan.steps()):
            if run.gate is not None:
                _require_matrices(run.layer, stack.layer(run.layer))
        return FewerBits()

    def share(self, choice: float) -> float:
        return choice / self.full

    def around(
        self, run: Run, forward: ForwardView, hidden: torch.Tensor, picked: Picked
    ) -> tuple[Callable[[nn.Module], AbstractContextManager[None]], Callable[[], bool]]:
        bits = tuple(None if one == self.full else int(one) for one in self.options.some)
        return InBits(forward.prepared, (run.layer, run.weights), bits, picked).around, lambda: False


def _require_matrices(index: int, layer: nn.Module) -> None:
    known = {id(tensor) for one in matrices(layer).values() for tensor in one.parameters(recurse=False)}
    others = [
        name
        for name, tensor in layer.named_parameters()
        if (id(tensor) not in known and tensor.dim() > 1 and "lora_" not in name)
        or not tensor.is_floating_point()
        or tensor.is_meta
    ]
    if others:
        raise PlanError(
            f"{others[0]} of layer {index} is no matrix of a linear module in floating-point numbers, so there is no "
            "copy of it in fewer bits; name other layers (fractional:layers=...)",
            code="P169",
        )
