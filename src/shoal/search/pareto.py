"""Pareto: the plans that no other plan beats in both loss and cost."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from shoal.plan import Plan
from shoal.scores import Budget, Candidate, Found, Legal, Objective
from shoal.search._candidates import Goal, Grain, goal, named, no_value, unmet, value_of
from shoal.search._keys import KeyDecoder, breeder, decoder, quiet_study, require_trials

if TYPE_CHECKING:
    from shoal.evaluation import Progress


def pareto(
    plan: Plan,
    *,
    objective: Objective,
    budget: Budget,
    legal: Legal,
    grain: Grain = "layer",
    trials: int = 128,
    population: int = 16,
    seed: int = 0,
    stack: str | None = None,
    progress: Progress | None = None,
) -> Found:
    """Search loss and cost together, from the whole model down to the budget, and keep what nothing else dominates.

    Each trial draws how much to remove and in which order (random keys). The trace holds the non-dominated plans from
    the cheapest to the dearest, after the plan that is returned: the one of lowest loss within `budget`.

    Source: NAS-Prune (Klein et al. 2024, arXiv 2405.02267), whose search is over sub-networks of a fine-tuned
    super-network; NSGA-II (Deb et al. 2002) as optuna has it.

    How we differ: no super-network is trained, and heads and neurons stay. Raises U502, U504, U540-U547.
    """
    require_trials(trials)
    sampler = breeder(population, seed)
    own, study = decoder(goal(plan, None, budget, grain, stack), legal), quiet_study(sampler, ["minimize", "minimize"])
    own(dict.fromkeys((named(*piece) for piece in own.pieces), 0.0))  # can the budget be met at all?
    whole = budget.price_of(plan)
    tried: dict[str, tuple[float, float, Plan]] = {}
    for number in range(trials):
        trial = study.ask()
        keys = {named(*piece): trial.suggest_float(named(*piece), 0.0, 1.0) for piece in own.pieces}
        share = budget.share + (whole - budget.share) * trial.suggest_float("how far from the budget", 0.0, 1.0)
        made = _towards(own, budget, share)(keys)
        loss, price = value_of(objective, made), budget.price_of(made)
        study.tell(trial, [loss if math.isfinite(loss) else 1e9, price])
        tried.setdefault(str(made), (loss, price, made))
        if progress is not None:
            progress(number + 1, trials, "loss against cost")
    return _front(budget, list(tried.values()))


def _towards(own: KeyDecoder, budget: Budget, share: float) -> KeyDecoder:
    nearer = Goal(own.goal.start, None, Budget(budget.unit, share, budget.price), own.goal.grain, own.goal.stack)
    return KeyDecoder(nearer, own.legal, own.pieces)


def _front(budget: Budget, tried: list[tuple[float, float, Plan]]) -> Found:
    """The non-dominated plans, and of those within the budget the one of lowest loss."""
    order = sorted((one for one in tried if not math.isnan(one[0])), key=lambda one: (one[1], one[0]))
    if not order:
        raise no_value(len(tried))
    front: list[tuple[float, float, Plan]] = []
    for one in order:
        if not front or one[0] < front[-1][0]:
            front.append(one)
    within = [one for one in front if budget.met(one[2])]
    if not within:
        raise unmet(budget, order[0][2])
    best = within[-1]
    trace = [Candidate(str(made), loss, f"{budget.unit} {price:.3f}") for loss, price, made in (best, *front)]
    return Found(best[2], tuple(trace))
