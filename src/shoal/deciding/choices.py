"""Policies that choose how much of a run is used: gates with a score for each of a few shares, the first maybe none."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.functional import one_hot

from shoal.deciding.decisions import Decision, Reduced, Soft, straight_through
from shoal.deciding.forward import ForwardView
from shoal.deciding.gate_reading import learns, once_for_rows, prompt_mean, state_read
from shoal.deciding.policy import Policy
from shoal.errors import UsageError
from shoal.executing.weights import Tensors
from shoal.plan import Plan, Run, Spec
from shoal.plan.steps import runs

Formula = Callable[[torch.Tensor], torch.Tensor]
TENSORS = ("weight", "bias", "scale", "scale_bias")
FIRST = 2.0
"""By how much the score of the whole run begins above the others."""


@dataclass(frozen=True, slots=True)
class ChoiceOptions:
    """What is chosen from, and how gates read, decide and learn."""

    choices: tuple[float, ...]
    """In rising order; 0 means that the run is skipped."""
    grain: Literal["token", "row", "none"]
    relax: Literal["straight-through", "gumbel"]
    temperature: float
    always: float | None
    """Taken for every token, by gates without tensors."""

    @property
    def some(self) -> tuple[float, ...]:
        """Those of the choices that run at all."""
        return tuple(one for one in self.choices if one)


@dataclass(frozen=True, slots=True, eq=False)
class Picked:
    """What a gate says of each token; [batch or 1, tokens] in front of what is named."""

    which: torch.Tensor
    """Place of the choice among those that run, int64; of a token that is skipped the best of these."""
    weights: torch.Tensor | None = None
    """Where it learns: the same as 0 and 1, with a gradient for each choice that runs, [..., choices]."""

    @property
    def sole(self) -> int | None:
        """The place that all tokens have, where nothing learns."""
        first = int(self.which.flatten()[0])
        return first if self.weights is None and bool((self.which == first).all()) else None


def numbers(name: str, option: str, text: str, code: str) -> tuple[float, ...]:
    """`0+0.5+1` as numbers from 0 on, in rising order. Raises UsageError with this code."""
    try:
        found = tuple(float(piece) for piece in text.split("+"))
    except ValueError:
        found = ()
    if not found or not all(0 <= one < math.inf for one in found) or len(set(found)) != len(found):
        raise UsageError(
            f"{name}: {option}={text} cannot be read; write different numbers with + between them, 0 for none",
            code=code,
        )
    return tuple(sorted(found))


def require_choices(name: str, options: ChoiceOptions, code: str) -> None:
    """Raise UsageError with this code for options out of range."""
    if options.always is not None and options.always not in options.choices:
        known = ", ".join(f"{one:g}" for one in options.choices)
        raise UsageError(f"{name}: always={options.always:g} is none of the choices {known}; name one", code=code)
    if not 0 < options.temperature < math.inf:
        raise UsageError(f"{name}: temperature={options.temperature:g} must be above 0; write temperature=1", code=code)


class Choosing(Policy):
    """Asks a gate at each run which choice its tokens take. Subclasses say what a choice is (`reduced`)."""

    name = ""
    recipe = ""
    """Which one trains it."""

    def __init__(self, plan: Plan, options: ChoiceOptions) -> None:
        super().__init__(plan)
        self.options = options
        self.consistent = options.grain != "token"
        self.gates = tuple(dict.fromkeys(run.gate for run in runs(plan.steps()) if run.gate is not None))

    def share(self, choice: float) -> float:
        """How much of a run a choice is."""
        return choice

    def around(
        self, run: Run, forward: ForwardView, hidden: torch.Tensor, picked: Picked
    ) -> tuple[Callable[[nn.Module], AbstractContextManager[None]], Callable[[], bool]]:
        """What stands around the call for those tokens that run at all, and whether it has spared what it left out."""
        raise NotImplementedError

    def shapes(self, spec: Spec) -> dict[str, tuple[int, ...]]:
        """The tensors of all gates."""
        made = dict[str, tuple[int, ...]]()
        for gate in self.gates:
            if self.options.grain != "none":
                made[f"{gate}.weight"] = (len(self.options.choices), spec.stack().hidden)
            made[f"{gate}.bias"] = (len(self.options.choices),)
        return made

    def start(self, spec: Spec) -> dict[str, torch.Tensor]:
        """Gates that read nothing yet and take the largest choice."""
        made = {name: torch.zeros(shape) for name, shape in self.shapes(spec).items()}
        for gate in self.gates:
            made[f"{gate}.bias"][-1] = FIRST
        return made

    def check_tensors(self, tensors: Tensors, spec: Spec) -> None:
        if self.options.always is not None:
            return
        for name, right in self.shapes(spec).items():
            found = tensors.get(name)
            if found is None:
                raise UsageError(
                    f"the gate {name.rpartition('.')[0]} has no tensor {name}, so it has not learned; train it (shoal "
                    f"heal --recipe {self.recipe}), or let all tokens take one choice "
                    f"({self.name}:always={self.options.choices[-1]:g})",
                    code="U718",
                )
            if tuple(found.shape) != right:
                raise UsageError(
                    f"{name} is {list(found.shape)} instead of {list(right)}; give the options with which the gates "
                    "learned, or train them on this model",
                    code="U718",
                )

    def should_run(self, run: Run, forward: ForwardView, hidden: torch.Tensor) -> Decision | Soft | Reduced:
        options, scores = self.options, self._scores(run, forward, hidden)
        if not options.some:
            return False
        if learns(forward):
            scores = self._warm(scores, forward)
        skips = len(options.choices) - len(options.some)
        asked = scores.argmax(-1) >= skips
        answer: Decision | Soft = asked if skips else True
        which = scores[..., skips:].argmax(-1)
        picked, shares = Picked(which), scores.new_tensor([self.share(one) for one in options.some])
        share = shares[which]
        counted = share * asked
        if learns(forward):
            soft = scores[..., skips:].softmax(-1)
            weights = soft + (one_hot(which, len(shares)) - soft).detach()
            picked, counted = Picked(which, weights), weights @ shares
            if skips:
                answer = straight_through(asked, 1 - scores.softmax(-1)[..., 0])
                counted = answer.weight * counted
        if forward.learning is not None:
            forward.learning.note("gates", counted.expand(forward.rows, forward.tokens))
        return Reduced(answer, share, *self.around(run, forward, hidden, picked))

    def _scores(self, run: Run, forward: ForwardView, hidden: torch.Tensor) -> torch.Tensor:
        """Of each token, float32 [batch or 1, tokens, choices]."""
        options = self.options
        if options.always is not None:
            one = torch.tensor([choice == options.always for choice in options.choices], device=hidden.device)
            return one.float().expand(1, forward.tokens, -1)
        own = self.own(run, forward, hidden.device)
        if options.grain == "none":
            return own["bias"].expand(1, forward.tokens, -1)
        return self.read(run, forward, hidden, "", lambda state: state @ own["weight"].T + own["bias"])

    def read(self, run: Run, forward: ForwardView, hidden: torch.Tensor, what: str, formula: Formula) -> torch.Tensor:
        """A formula of the state that the grain reads, [batch, tokens, numbers]; `what` names it beside others."""
        state = state_read(hidden)
        if self.options.grain == "token":
            return formula(state)
        found = once_for_rows(f"{run.gate}{what}", forward, lambda: formula(prompt_mean(state, forward)))
        return found.expand(-1, forward.tokens, -1)

    def own(self, run: Run, forward: ForwardView, device: torch.device) -> Mapping[str, torch.Tensor]:
        """The tensors of the gate of a run, by their names behind it, float32."""
        full = {name: f"{run.gate}.{name}" for name in TENSORS}
        return {name: forward.tensors[one].to(device).float() for name, one in full.items() if one in forward.tensors}

    def _warm(self, scores: torch.Tensor, forward: ForwardView) -> torch.Tensor:
        """What the softmax is made of in training."""
        learning, options = forward.learning, self.options
        assert learning is not None
        if options.relax == "gumbel":
            each = scores if options.grain == "token" else scores[:, :1]  # a sequence decides once
            drawn = torch.rand(each.shape, generator=learning.generator).clamp(1e-6, 1 - 1e-6).to(scores.device)
            scores = scores - (-drawn.log()).log()
        return scores / options.temperature
