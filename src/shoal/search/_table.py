"""What each layer may become, what each choice costs in loss and saves in price, as if layers did not interact."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from shoal.errors import PlanError, UsageError
from shoal.plan import Plan, drop, replace
from shoal.plan.steps import PartName
from shoal.scores import Budget, Legal, Objective
from shoal.search._candidates import judge, pieces

KEEP = "keep"
Choices = tuple[str, ...]
"""One word per layer of the table: keep, attention, mlp, layer (what is removed) or map."""


@dataclass(frozen=True, slots=True)
class Table:
    """Losses and savings of every choice of every layer."""

    layers: tuple[int, ...]
    options: tuple[Choices, ...]
    """By layer: keep, and what is legal besides it."""
    losses: tuple[tuple[float, ...], ...]
    """By layer and option: the rise of the objective against the plan that the table is made around."""
    saved: tuple[tuple[float, ...], ...]
    """By layer and option: the share of the dense cost that it saves."""

    def loss(self, chosen: Sequence[int]) -> float:
        """The sum of the losses of the option numbers `chosen`, one per layer."""
        return math.fsum(row[pick] for row, pick in zip(self.losses, chosen, strict=True))

    def saving(self, chosen: Sequence[int]) -> float:
        """The sum of the savings of the option numbers `chosen`."""
        return math.fsum(row[pick] for row, pick in zip(self.saved, chosen, strict=True))

    def words(self, chosen: Sequence[int]) -> Choices:
        return tuple(options[pick] for options, pick in zip(self.options, chosen, strict=True))


@dataclass(frozen=True, slots=True)
class Space:
    """Which plans a choice per layer reaches from `plan`."""

    plan: Plan
    layers: tuple[int, ...]
    options: tuple[Choices, ...]
    maps: Mapping[int, str]
    stack: str | None = None

    def build(self, words: Sequence[str]) -> Plan:
        """The plan in which each layer became what its word says. Raises `PlanError` when nothing would be left."""
        made = self.plan
        parts: dict[PartName, list[int]] = {"layer": [], "attention": [], "mlp": []}
        for layer, word in zip(self.layers, words, strict=True):
            if word == "map":
                made = replace(made, layer, layer, weights=self.maps[layer], stack=self.stack)
            elif word != KEEP:
                parts[_part(word)].append(layer)
        for part, gone in parts.items():
            made = drop(made, gone, part=part, stack=self.stack) if gone else made
        return made

    def whole(self) -> Choices:
        return (KEEP,) * len(self.layers)


def space(plan: Plan, legal: Legal, *, stack: str | None = None, maps: Mapping[int, str] | None = None) -> Space:
    """Every single choice that is legal. Raises U542 when there is none."""
    there = {"layer": set(plan.layers(stack))}
    there |= {part: {layer for layer, _ in pieces(plan, part, stack)} for part in ("attention", "mlp")}
    there["map"] = set(maps or {}) & there["layer"]
    layers = tuple(sorted(there["layer"]))
    bare = Space(plan, layers, ((),) * len(layers), maps or {}, stack)
    options = tuple(
        (
            KEEP,
            *(word for word in ("attention", "mlp", "layer", "map") if i in there[word] and _may(bare, i, word, legal)),
        )
        for i in layers
    )
    if all(len(own) == 1 for own in options):
        raise UsageError(
            f"the plan {plan!s:.80} leaves nothing to choose: no layer, attention or mlp may go; allow plans that only "
            "run live, or search from another plan",
            code="U542",
        )
    return Space(plan, layers, options, maps or {}, stack)


def measure(
    room: Space,
    objective: Objective,
    budget: Budget,
    legal: Legal,
    around: Choices,
    report: Callable[[int], None] | None = None,
) -> tuple[Table, float]:
    """The table of every single change from the choices `around`, each evaluated by itself, and the value there.

    A change that is illegal beside the others, or has no finite value, gets an infinite loss. Raises U544 or U545 with
    the objective, U546 when it has no finite value for the plan at the centre.
    """
    centre = room.build(around)
    here = judge(objective, [centre], exhaustive=True)[0]
    if here is None or not math.isfinite(here):
        raise UsageError(
            f"the objective has no finite value for the plan {centre!s:.80}; a search by differences needs one",
            code="U546",
        )
    changes = [
        (place, option, (*around[:place], word, *around[place + 1 :]))
        for place, words in enumerate(room.options)
        for option, word in enumerate(words)
        if word != around[place]
    ]
    plans = [(place, option, _built(room, words, legal)) for place, option, words in changes]
    wanted = [plan for _, _, plan in plans if plan is not None]
    values = iter(judge(objective, wanted, exhaustive=True, report=report))
    price = budget.price_of(centre)
    losses = [[0.0] * len(words) for words in room.options]
    saved = [[0.0] * len(words) for words in room.options]
    for place, option, plan in plans:
        value = None if plan is None else next(values)
        losses[place][option] = math.inf if value is None or not math.isfinite(value) else value - here
        saved[place][option] = 0.0 if plan is None else price - budget.price_of(plan)
    return Table(room.layers, room.options, tuple(map(tuple, losses)), tuple(map(tuple, saved))), here


def cheapest(room: Space, table: Table, legal: Legal) -> Plan:
    """A plan as cheap as removing layer by layer, the greatest saving first, gets it."""
    words = list(room.whole())
    order = sorted(
        ((table.saved[i][c], i, word) for i, options in enumerate(room.options) for c, word in enumerate(options)),
        key=lambda one: (-one[0], one[1]),
    )
    for saving, place, word in order:
        trial = [*words[:place], word, *words[place + 1 :]]
        if saving > 0 and words[place] == KEEP and set(trial) != {"layer"} and legal(room.build(trial)):
            words = trial
    return room.build(words)


def _built(room: Space, words: Choices, legal: Legal) -> Plan | None:
    try:
        plan = room.build(words)
    except PlanError:
        return None
    return plan if legal(plan) else None


def _may(room: Space, layer: int, word: str, legal: Legal) -> bool:
    return _built(room, tuple(word if i == layer else KEEP for i in room.layers), legal) is not None


def _part(word: str) -> PartName:
    return "attention" if word == "attention" else "mlp" if word == "mlp" else "layer"
