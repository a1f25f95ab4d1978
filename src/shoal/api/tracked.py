"""What `--track` says of a search, a comparison and a measure: one step for each trial, cell and layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from shoal.ledger import Key
from shoal.plan import Plan, Shape, Spec, cost, parse_plan
from shoal.plan.price import shares
from shoal.report.tracking import Tracked, Values, tracking
from shoal.scores import Budget, Found, Scores


class Trials:
    """Who is told of the plans that a search looks at; nobody where there is no tracker."""

    def __init__(self, told: Tracked, identity: Plan, spec: Spec, budget: Budget | None) -> None:
        self.told, self.identity, self.spec, self.budget = told, identity, spec, budget

    def heard(self, key: Key, value: float) -> None:
        """A plan was evaluated (key and value of its journal): its objective, what it costs as shares of the dense
        model, what the budget predicts for it, and its text. One that was dropped in a race has no value."""
        if not self.told or not isinstance(key, str):
            return
        plan, shape = parse_plan(key, self.identity), Shape()
        costs = shares(cost(plan, self.spec, shape), cost(self.identity, self.spec, shape))
        predicted = None if self.budget is None else self.budget.price_of(plan)
        values = {f"cost/{unit}": share for unit, share in costs.items()}
        self.told.log({"objective": value, "cost/predicted": predicted, **values, "plan": key})

    def found(self, found: Found) -> Found:
        """`found` itself: which plans the method kept on its way, in their order, and the one it ends with."""
        if self.told:
            for one in found.trace:
                self.told.log({"trace/score": one.score, "trace/plan": one.notation, "trace/note": one.note or None})
            predicted = None if self.budget is None else self.budget.price_of(found.plan, found.weights)
            self.told.log({"found/predicted": predicted, "found/plan": str(found.plan)})
        return found


@contextmanager
def trials(track: Sequence[str], facts: Values, identity: Plan, spec: Spec, budget: Budget | None) -> Iterator[Trials]:
    """The trackers of a search, told of its trials. Raises what `tracking` raises."""
    with tracking(track, "prune", facts) as told:
        yield Trials(told, identity, spec, budget)


def tell_cell(told: Tracked, row: Mapping[str, Any], *, times: bool = False) -> None:
    """One cell of a comparison: quality, cost, seconds and times as far as they are known; `times` alone."""
    result, measured = row.get("result", {}), row.get("measured", {})
    timed = {phase: measured[phase]["median"] for phase in ("prefill", "decode") if phase in measured}
    if times:
        told.log({"cell": row["key"], **timed})
        return
    values: dict[str, float | str | None] = {"cell": row["key"], "plan": result.get("plan"), "error": row.get("error")}
    values |= {f"perplexity/{text}": value for text, value in result.get("perplexity", {}).items()}
    values |= {f"tasks/{task}": score.get("accuracy") for task, score in result.get("tasks", {}).items()}
    for name in ("price", "params", "layers", "kv", "flops", "kl", "top1", "repetition"):
        values[name] = result.get(name)
    told.log({**values, "seconds": measured.get("seconds"), "peak": measured.get("peak"), **timed})


def tell_scores(told: Tracked, scores: Mapping[str, Scores]) -> None:
    """A step for each layer, with what each measure says of it."""
    for layer in range(max((len(one.values) for one in scores.values()), default=0)):
        here = {name: one for name, one in scores.items() if layer < len(one.values)}
        values = {name: one.values[layer] for name, one in here.items()}
        errors = {f"{name} error": one.errors[layer] for name, one in here.items()}
        told.log({**values, **errors}, layer)


def tell_step(told: Tracked, entry: Mapping[str, Any], stage: int, stages: Sequence[Any], step: int) -> None:
    """What is known of a step of healing; by stage where there are several."""
    prefix = f"stage {stage}/" if len(stages) > 1 else ""
    numbers = {name: value for name, value in entry.items() if isinstance(value, int | float) and name != "step"}
    told.log({f"{prefix}{name}": value for name, value in numbers.items()}, step)
