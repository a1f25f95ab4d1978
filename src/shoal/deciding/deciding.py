"""From the name of a policy to a conductor that asks it, with all that must be found out while the model is whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from shoal.deciding.arguments import Arguments
from shoal.deciding.gated import GatedConductor
from shoal.deciding.gates import Policy
from shoal.deciding.place import require_decidable, ungated
from shoal.deciding.readout import Heads, Readout, require_probes
from shoal.deciding.trace import Trace, count_calls
from shoal.errors import PlanError, UsageError
from shoal.executing.layer_list import PlannedList
from shoal.executing.weights import Tensors, hash_of_used
from shoal.models.calls import logits_in, named_arguments
from shoal.models.examine import StackFacts
from shoal.models.opened import open_model
from shoal.models.stacks import Stack
from shoal.plan import Exit, Plan, Spec, Step, format_steps
from shoal.plan.steps import runs
from shoal.plan.tensors import tensors_of
from shoal.spelling import chosen as chosen_entry


def make_policy(text: str, plan: Plan, spec: Spec) -> Policy:
    """NAME or NAME:key=value,key=value, as in `exit:confidence=0.9` or `skip:listed=3-5,7`, for this plan and model; or
    the policy.json of `shoal calibrate`.

    Raises U501 for a name and U502 for an option that does not exist, and what the policy itself raises.
    """
    if text.endswith(".json") and ":" not in text:
        text = f"calibrated:file={text}"
    entry, options = chosen_entry("policies", text)
    made: Policy = entry.load()(plan, spec, **options)
    return made


def chosen(policy: Policy | str, plan: Plan, spec: Spec) -> Policy:
    """The policy itself, held to the plan that runs. Raises P138 when it was made for another one."""
    if isinstance(policy, str):
        return make_policy(policy, plan, spec)
    if policy.plan != plan and ungated(policy.plan) != plan:
        raise PlanError(
            f"this policy was made for the plan {format_steps(ungated(policy.plan).steps())} of "
            f"{policy.plan.base.family}, not for {plan}; make it for the plan that runs",
            code="P138",
        )
    return policy


def require_tensors(policy: Policy, weights: Tensors | None) -> None:
    """Raise U605 when the policy was made with other tensors, so that its promise does not hold for these."""
    if policy.tensors not in (None, hash_of_used(policy.plan, weights)):
        raise UsageError(
            "this policy was calibrated with other lenses or heads than the plan has now; run shoal calibrate with "
            "this plan",
            code="U605",
        )


class Deciding:
    """A policy at work: its conductor's trace, and the hooks that count and listen. `remove()` takes the hooks away."""

    def __init__(self, model: Any, spec: Spec, policy: Policy, weights: Tensors) -> None:
        """Probes the model, which must be whole, for what this policy's gates, exits and fills need.

        Raises P13x for what cannot be decided on this model, P137 when a fill needs a mask that the layers are not
        given.
        """
        self.model, self.policy, self.weights = model, policy, weights
        self.stack: Stack = open_model(model).stack()
        self.facts = open_model(model).facts(self.stack.name)
        require_decidable(policy, spec, model, self.facts)
        steps = policy.plan.steps()
        fills = {run.kv.fill for run in runs(steps)}
        exits = [step for step in steps if isinstance(step, Exit)]
        self.arguments = Arguments(model, self.stack) if fills & {"mask", "defer"} else None
        self._require_masks(steps)
        self.readout = Readout(model, self.stack, self._ending) if exits else None
        own = any(step.head != "base" for step in exits)
        self._require_heads(exits, spec)
        require_probes(policy.plan, weights, policy.by)
        self.heads = Heads(model, weights) if own else None
        self.conductor: GatedConductor | None = None
        self._removes: list[Callable[[], None]] = []

    def conduct(
        self, planned: PlannedList, stack: Stack, probe: StackFacts, steps: tuple[Step, ...], weights: Tensors
    ) -> GatedConductor:
        """The conductor for `planned`; from now on the hooks are there."""
        conductor = self.conductor = GatedConductor(planned, stack, probe, steps, weights, policy=self.policy)
        conductor.know(self.arguments, self.readout, self.heads)
        self._removes.append(count_calls(self.stack, self.facts.layers, conductor.trace.counts))
        if self.heads is not None:
            self._removes.append(self.heads.remove)
        listen = self.model.register_forward_pre_hook(self._listen, with_kwargs=True)
        self._removes.append(listen.remove)
        if self.policy.reads_logits:
            self._removes.append(self.model.register_forward_hook(self._hear).remove)
        return conductor

    @property
    def trace(self) -> Trace:
        assert self.conductor is not None
        return self.conductor.trace

    @property
    def memory(self) -> dict[str, Any]:
        """What the policy remembers of the sequences that the newest forward was of."""
        assert self.conductor is not None
        return {} if self.conductor.last is None else self.conductor.last.memory

    def remove(self) -> None:
        """Take every hook away; a second call does nothing."""
        while self._removes:
            self._removes.pop()()

    def _ending(self, state: torch.Tensor) -> Any:
        assert self.conductor is not None
        return self.conductor.ends_with(state)

    def _listen(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        conductor = self.conductor
        if conductor is not None and conductor.ending is None:
            given = named_arguments(self.model, args, kwargs)
            conductor.inputs = given.get("input_ids"), given.get("attention_mask")

    def _hear(self, _: nn.Module, __: Any, out: Any) -> None:
        conductor = self.conductor
        if conductor is not None and conductor.ending is None and conductor.last is not None:
            self.policy.after_forward(conductor.last, logits_in(out)[:, -1])

    def _require_masks(self, steps: tuple[Step, ...]) -> None:
        for run in runs(steps):
            if (
                run.kv.fill in ("mask", "defer")
                and self.arguments is not None
                and self.arguments.masks[run.layer] is None
            ):
                raise PlanError(
                    f"layer {run.layer} is handed no attention mask that could be replaced, which the fill "
                    f"{run.kv.fill} needs; take the fill project",
                    code="P137",
                )

    def _require_heads(self, exits: list[Exit], spec: Spec) -> None:
        hidden, vocab = spec.stack().hidden, spec.vocab
        right = {"lens": (hidden, hidden), "lens_bias": (hidden,), "weight": (vocab, hidden), "bias": (vocab,),
                 "probe": (hidden,), "probe_bias": (1,)}  # fmt: skip
        for step in exits:
            if unknown := [name for name in tensors_of(step.head, self.weights) if name not in right]:
                raise PlanError(
                    f"{step.head}.{unknown[0]} of exit {step.name} is no tensor of a head; its tensors are called "
                    f"{', '.join(right)}",
                    code="P113",
                )
            for name, shape in right.items():
                found = self.weights.get(f"{step.head}.{name}")
                if found is not None and tuple(found.shape) != shape:
                    raise PlanError(
                        f"{step.head}.{name} of exit {step.name} is {list(found.shape)} instead of {list(shape)}; fit "
                        "it on this model",
                        code="P113",
                    )
