"""Policies that take one of several at each place of a plan: what comes next, instead of whether a layer runs.

The candidates of a place stand one behind the other in the plan, each behind a gate PLACE-NUMBER, and at most one of
them is open for a token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from shoal.deciding.decisions import Decision, Soft, straight_through
from shoal.deciding.forward import ForwardView
from shoal.deciding.gate_reading import learns, once_for_rows, prompt_mean, state_read
from shoal.deciding.policy import Policy
from shoal.errors import UsageError
from shoal.executing.weights import Tensors
from shoal.plan import Plan, Run, Spec, Step, format_steps
from shoal.plan.select import run_of
from shoal.plan.steps import gate_of

Relaxed = Literal["none", "straight-through", "gumbel", "mixture"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceOptions:
    """How the candidates of a place are scored, and how choices learn."""

    rows: int
    """How many candidates there are, and one more where a token may take none."""
    none: bool = False
    """Whether a token may take none, whose score is 0."""
    by_row: bool = False
    """Whether a sequence chooses once, by the mean of its prompt, and keeps that."""
    relax: Relaxed = "straight-through"
    temperature: float = 1.0
    final_temperature: float = 1.0
    ends: bool = False
    """Whether a token that took none takes none at later places either."""
    single: bool = True
    """Whether each candidate is one run, so that all of a place can read one state."""


@dataclass
class Chosen:
    """What was chosen at a place in one forward."""

    number: torch.Tensor
    """The candidate of each token, long [batch or 1, tokens]."""
    shares: torch.Tensor | None
    """Of each candidate, [batch or 1, tokens, rows]; None where nothing learns."""
    state: torch.Tensor
    """In front of the place, as the model has it."""


class PlacePolicy(Policy):
    """Takes one candidate at each place for a token, or for a sequence."""

    def __init__(self, plan: Plan, options: PlaceOptions) -> None:
        super().__init__(plan)
        self.options = options
        none = (options.rows - 1,) if options.none else ()
        self.places = {name: (*own, *none) for name, own in places_of(plan, single=options.single).items()}
        """By place the numbers of its candidates; one that has no run is none of the others."""

    def weight_of(self, place: str, number: int) -> str:
        """The gate by whose weight a candidate is scored."""
        return f"{place}-{number}"

    def fixed(self, place: str) -> int | None:
        """The candidate that every token takes, without tensors; None where they decide."""
        return None

    def own(self, place: str) -> int:
        """The candidate that is taken before anything has learned."""
        return self.places[place][0]

    def start(self, spec: Spec) -> dict[str, torch.Tensor]:
        """Scores that read nothing yet and take with probability 0.88 what the plan ran before."""
        made = {name: torch.zeros(shape) for name, shape in self._shapes(spec).items()}
        for place, numbers in self.places.items():
            made[f"{place}-{self.own(place)}.bias"].fill_(2.0 + math.log(max(1, len(numbers) - 1)))
        return made

    def check_tensors(self, tensors: Tensors, spec: Spec) -> None:
        if all(self.fixed(place) is not None for place in self.places):
            return
        for name, right in self._shapes(spec).items():
            found = tensors.get(name)
            if found is None or tuple(found.shape) != right:
                what = "is not there" if found is None else f"is {list(found.shape)} instead of {list(right)}"
                raise UsageError(
                    f"nothing has learned to choose here: {name} {what}; train it (shoal heal --recipe iot or mom) and "
                    "give the options that it learned with, or make one choice for all (choose)",
                    code="U714",
                )

    def _shapes(self, spec: Spec) -> dict[str, tuple[int, ...]]:
        hidden, made = spec.stack().hidden, dict[str, tuple[int, ...]]()
        for place in self.places:
            for number in self._gated(place):
                made[f"{self.weight_of(place, number)}.weight"] = (1, hidden)
                made[f"{place}-{number}.bias"] = (1,)
        return made

    def _gated(self, place: str) -> list[int]:
        """The candidates that have runs."""
        return list(self.places[place][: -1 if self.options.none else None])

    def should_run(self, run: Run, forward: ForwardView, hidden: torch.Tensor) -> Decision | Soft:
        assert run.gate is not None
        place, number = _read(run.gate)
        made: Chosen | None = forward.notes.get(place)
        if made is None:
            made = forward.notes[place] = self._choose(place, forward, hidden)
        hard = made.number == number
        weight = hard.float() if made.shares is None else made.shares[..., number]
        if forward.learning is not None:
            forward.learning.note("gates", weight.expand(forward.rows, forward.tokens))
        if not self.options.single:
            return hard
        return Soft(hard, weight, made.state)

    def _choose(self, place: str, forward: ForwardView, hidden: torch.Tensor) -> Chosen:
        fixed = self.fixed(place)
        if fixed is not None:
            number = torch.full((1, forward.tokens), fixed, device=hidden.device)
            return self._ended(place, Chosen(number, None, hidden), forward)
        scores = self._scores(place, forward, hidden)
        if forward.learning is not None:
            each = scores.softmax(-1).expand(forward.rows, forward.tokens, -1)
            for number in self.places[place]:
                forward.learning.note("choices", each[..., number])
        if not learns(forward) or self.options.relax == "none":
            made = Chosen(scores.argmax(-1), None, hidden)
        elif self.options.relax == "mixture":
            assert forward.learning is not None
            made = Chosen(torch.full_like(scores[..., 0], forward.learning.choice, dtype=torch.long), None, hidden)
        else:
            made = self._learned(scores, forward, hidden)
        return self._ended(place, made, forward)

    def _scores(self, place: str, forward: ForwardView, hidden: torch.Tensor) -> torch.Tensor:
        """Of each candidate, float32 [batch, tokens, rows]; -inf for what is no candidate of this place."""
        if self.options.by_row:
            scores = once_for_rows(
                place, forward, lambda: self._read(place, forward, prompt_mean(state_read(hidden), forward))
            )
            return scores.expand(-1, forward.tokens, -1)
        return self._read(place, forward, state_read(hidden))

    def _read(self, place: str, forward: ForwardView, state: torch.Tensor) -> torch.Tensor:
        gated = self._gated(place)
        weight, bias = (
            torch.cat([forward.tensors[name].to(state.device).float() for name in names])
            for names in ([f"{self.weight_of(place, number)}.weight" for number in gated],
                          [f"{place}-{number}.bias" for number in gated])
        )  # fmt: skip
        scores = state.new_full((*state.shape[:2], self.options.rows), -torch.inf)
        scores[..., gated] = state @ weight.T + bias
        if self.options.none:
            scores[..., -1] = 0.0
        return scores

    def _learned(self, scores: torch.Tensor, forward: ForwardView, hidden: torch.Tensor) -> Chosen:
        """The choice in training, with the shares through which its gradient flows."""
        learning, options = forward.learning, self.options
        assert learning is not None
        warm = options.temperature * (options.final_temperature / options.temperature) ** learning.progress
        if options.relax == "gumbel":
            each = scores[:, :1] if options.by_row else scores  # a sequence decides once
            scores = scores + gumbel(each.shape, learning.generator).to(scores)
        number = scores.argmax(-1)
        hot = torch.nn.functional.one_hot(number, options.rows).bool()
        return Chosen(number, straight_through(hot, (scores / warm).softmax(-1)).weight, hidden)

    def _ended(self, place: str, made: Chosen, forward: ForwardView) -> Chosen:
        """Who took none before takes none now."""
        if not self.options.ends:
            return made
        none = self.options.rows - 1
        before = forward.notes.get("ended")
        if before is not None:
            made.number = torch.where(before.to(made.number.device), none, made.number)
            if made.shares is not None:
                made.shares = made.shares * ~before.to(made.number.device)[..., None]
        forward.notes["ended"] = made.number == none
        return made


def gumbel(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Gumbel noise, on the CPU."""
    return -(-torch.rand(shape, generator=generator).clamp(1e-6, 1 - 1e-6).log()).log()


def places_of(plan: Plan, *, single: bool) -> dict[str, tuple[int, ...]]:
    """By place the numbers of its candidates, in the plan's order.

    Raises U715 for a gate that is no PLACE-NUMBER, for candidates that do not stand together, and, with `single`, for
    one of several runs.
    """
    found: dict[str, list[int]] = {}
    before: tuple[str, int] | None = None
    for step in plan.steps():
        gate = gate_of(step)
        now = None if gate is None else _read(gate)
        if gate is not None and (run_of(step) is None or now == ("", -1)):
            raise _no_place(step, f"its gate {gate} is not called PLACE-NUMBER")
        if now is not None and now == before and single:
            raise _no_place(step, f"the gate {gate} has more than one run")
        if now is not None and now != before:
            there = found.setdefault(now[0], [])
            if now[1] in there or (there and (before is None or before[0] != now[0])):
                raise _no_place(step, f"what is behind the gates {now[0]}-... does not stand together")
            there.append(now[1])
        before = now
    return {place: tuple(numbers) for place, numbers in found.items()}


def _read(gate: str) -> tuple[str, int]:
    """The place and the candidate that a gate names."""
    place, _, number = gate.rpartition("-")
    return (place, int(number)) if place and number.isascii() and number.isdecimal() else ("", -1)


def _no_place(step: Step, why: str) -> UsageError:
    return UsageError(
        f"at {format_steps((step,))} nothing can be chosen: {why}; give a plan without gates, in which the policy puts "
        "its own",
        code="U715",
    )
