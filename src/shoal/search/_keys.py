"""Random keys: a number per piece, and the plan without the pieces of the lowest ones; every draw is legal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shoal.errors import PlanError, UsageError
from shoal.plan import Plan, drop
from shoal.plan.steps import PartName
from shoal.scores import Candidate, Found, Legal, Objective, Scores
from shoal.search._candidates import Goal, named, no_value, pieces, value_of

if TYPE_CHECKING:
    from shoal.evaluation import Progress

Piece = tuple[int, PartName]


@dataclass(frozen=True, slots=True)
class KeyDecoder:
    """Keys -> plan, after Bean 1994 (random keys for sequencing): feasible by construction."""

    goal: Goal
    legal: Legal
    pieces: tuple[Piece, ...]

    def __call__(self, keys: Mapping[str, float]) -> Plan:
        """Remove pieces from the lowest key on, passing over what is illegal, until the goal is reached.

        Raises U504 or U543 when it cannot be.
        """
        plan, removed = self.goal.start, 0
        waiting = sorted(self.pieces, key=lambda piece: (keys[named(*piece)], piece))
        while not self.goal.reached(plan, removed):
            for piece in waiting:
                smaller = self._without(plan, piece)
                if smaller is not None and self.legal(smaller):
                    break
            else:
                raise self.goal.missed(plan, removed)
            waiting.remove(piece)
            plan, removed = smaller, removed + 1
        return plan

    def _without(self, plan: Plan, piece: Piece) -> Plan | None:
        try:
            return drop(plan, [piece[0]], part=piece[1], stack=self.goal.stack)
        except PlanError:  # nothing would be left
            return None


def decoder(goal: Goal, legal: Legal) -> KeyDecoder:
    """The decoder of a search towards `goal`."""
    return KeyDecoder(goal, legal, tuple(pieces(goal.start, goal.grain, goal.stack)))


def start_keys(own: KeyDecoder, scores: Scores) -> dict[str, float]:
    """Keys between 0 and 1 that remove what the scores put last; parts of a layer share its place.

    Raises U505 for scores of spans or of another model.
    """
    scores.require(own.goal.start, (1,), own.goal.stack)
    place = {layer: n / len(scores.values) for n, layer in enumerate(scores.order())}
    return {named(layer, part): place.get(layer, 1.0) for layer, part in own.pieces}


def asked(
    aim: Goal,
    legal: Legal,
    objective: Objective,
    sampler: Any,
    *,
    trials: int,
    scores: Scores | None,
    progress: Progress | None,
    stage: str,
) -> Found:
    """Let an optuna sampler propose keys `trials` times; the best plan, and all different ones in order of value.

    `scores` give the first proposal. Raises U502 for no trials, U546 when no plan had a value.
    """
    require_trials(trials)
    own, study = decoder(aim, legal), quiet_study(sampler, ["minimize"])
    if scores is not None:
        study.enqueue_trial(start_keys(own, scores))
    values: dict[str, tuple[float, Plan]] = {}
    for number in range(trials):
        trial = study.ask()
        plan = own({named(*piece): trial.suggest_float(named(*piece), 0.0, 1.0) for piece in own.pieces})
        value = value_of(objective, plan)
        values.setdefault(str(plan), (value, plan))
        study.tell(trial, value if math.isfinite(value) else 1e9)
        if progress is not None:
            progress(number + 1, trials, stage)
    return ranked(values.values())


def ranked(values: Any) -> Found:
    """The plan with the lowest value, and all of them in the trace, the best first. Raises U546 when none has one."""
    tried: Sequence[tuple[float, Plan]] = list(values)
    order = sorted((one for one in tried if not math.isnan(one[0])), key=lambda one: (one[0], str(one[1])))
    if not order:
        raise no_value(len(tried))
    return Found(order[0][1], tuple(Candidate(str(plan), value) for value, plan in order))


def require_trials(trials: int) -> None:
    """Raise U502 when there is nothing to try."""
    if trials < 1:
        raise UsageError(f"{trials} trials try nothing; use trials=1 or more", code="U502")


def samplers() -> Any:
    """The module `optuna.samplers`. Raises U547 when optuna is not installed."""
    try:
        import optuna
    except ImportError:
        raise UsageError(
            "this search needs optuna, which is not installed; run: pip install 'shoal[search]'", code="U547"
        ) from None
    return optuna.samplers


def breeder(population: int, seed: int) -> Any:
    """The sampler that breeds (NSGA-II, Deb et al. 2002). Raises U502 for a population that cannot, U547."""
    if population < 2:
        raise UsageError(f"a population of {population} cannot breed; use population=2 or more", code="U502")
    return samplers().NSGAIISampler(population_size=population, seed=seed)


def quiet_study(sampler: Any, directions: list[Any]) -> Any:
    """A study in memory, made without a word; the user's own studies are as loud as they were."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(sampler=sampler, directions=directions)
    finally:
        optuna.logging.set_verbosity(level)
