"""measure and prune: from a model and text to scores, to a plan, and to a folder that is proven."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.api.assess import Bench, Evaluation, Source, bench, evaluate, opened, text_of
from shoal.api.journal import journaled
from shoal.data import Data
from shoal.errors import UsageError, WriteError
from shoal.evaluate import Progress
from shoal.methods._task import Task
from shoal.models.inspect import inspect
from shoal.models.load import Loaded
from shoal.plan import Cost, Plan, Shape, Spec, check, cost, parse_plan, require
from shoal.record import Record
from shoal.registry import get
from shoal.scores import Found, Legal, Scores
from shoal.write.surgery import blueprint


@dataclass(frozen=True)
class Pruned:
    """What `prune` found. `before` and `after` are costs; evaluation and bench are None when not asked for."""

    loaded: Loaded
    spec: Spec
    plan: Plan
    method: str
    found: Found
    before: Cost
    after: Cost
    data: Data | None
    evaluation: Evaluation | None = None
    bench: Bench | None = None
    records: tuple[Record, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for --json and the records."""
        return {
            "method": self.method,
            "plan": str(self.plan),
            "hash": self.plan.hash,
            "dropped": {name: list(self.plan.dropped(name)) for name, _ in self.plan.stacks},
            "data": None if self.data is None else self.data.info.to_dict(),
            "cost": {"dense": self.before.to_dict(), "pruned": self.after.to_dict()},
            "scores": None if self.found.scores is None else self.found.scores.to_dict(),
            "trace": [{"plan": c.notation, "score": c.score, "note": c.note} for c in self.found.trace],
            "evaluation": None if self.evaluation is None else self.evaluation.to_dict(),
            "bench": None if self.bench is None else self.bench.to_dict(),
        }


def measure(
    source: Source,
    name: str = "block-influence",
    *,
    data: Any = "builtin",
    split: str = "calibrate",
    length: int = 512,
    limit: int = 16,
    stride: int | None = None,
    bos: bool = False,
    seed: int | None = None,
    batch: int = 1,
    stack: str | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Scores:
    """Score every layer by the measure `name` (see `shoal ls measures`) on `limit` windows of `length` tokens.

    `settings` are the measure's own options; `options` go to `shoal.load`. Raises `UsageError` U501 for a name that does
    not exist, `DataError` for text that cannot be used.
    """
    loaded = opened(source, **options)
    text = text_of(loaded, data, split=split, length=length, limit=limit, stride=stride, bos=bos, seed=seed)
    function = get("measures", name).load()
    scores: Scores = function(loaded.model, text, stack=stack, batch=batch, progress=progress, **(settings or {}))
    return scores


def prune(
    source: Source,
    *,
    method: str = "shortgpt",
    plan: Plan | str | None = None,
    drop: int | None = None,
    keep: float | None = None,
    data: Any = "builtin",
    split: str = "calibrate",
    length: int = 512,
    limit: int = 16,
    stride: int | None = None,
    bos: bool = False,
    batch: int = 1,
    seed: int = 0,
    stack: str | None = None,
    settings: Mapping[str, Any] | None = None,
    writable: bool = True,
    zero_parts: bool = False,
    journal: Path | None = None,
    assess: bool = False,
    test_data: Any = "builtin",
    progress: Progress | None = None,
    **options: Any,
) -> Pruned:
    """Find a plan with `drop` layers less (or a share `keep` of the layers) by a published method, or take `plan` as it is.

    Nothing is changed and nothing written; pass the result to `shoal.write`. `writable`: only plans that a stock class can
    express are looked at. `assess`: perplexity, agreement and generation on `test_data`'s test split and a paired timing.
    `journal`: a file in which searches keep what they evaluated. Raises `UsageError` (U5xx), `PlanError` (P1xx).
    """
    loaded = opened(source, **options)
    spec = inspect(loaded.model)
    identity = Plan.identity(spec, source=loaded.source)
    text = None
    if plan is not None:
        if drop is not None or keep is not None:
            raise UsageError("give a plan or a number of layers to drop, not both", code="U521")
        plan = parse_plan(plan, identity) if isinstance(plan, str) else plan
        found, method = Found(require(plan, spec)), "listed"
        if writable:
            blueprint(loaded.model, plan, zero_parts=zero_parts)
    else:
        count = layers_to_drop(spec, stack, drop, keep)
        text = text_of(loaded, data, split=split, length=length, limit=limit, stride=stride, bos=bos)
        task = Task(
            model=loaded.model,
            data=text,
            plan=identity,
            spec=spec,
            legal=_legal(loaded, spec, writable=writable, zero_parts=zero_parts),
            objective=journaled(loaded.model, identity, path=journal, batch=batch, progress=progress),
            stack=stack,
            batch=batch,
            seed=seed,
            progress=progress,
        )
        found = get("methods", method).load()(task, drop=count, **(settings or {}))
    shape = Shape()
    result = Pruned(
        loaded, spec, found.plan, method, found, cost(identity, spec, shape), cost(found.plan, spec, shape), text
    )
    if not assess:
        return result
    worth = evaluate(loaded, plan=found.plan, data=test_data, batch=batch, limit=8, progress=progress)
    timed = bench(loaded, plan=found.plan, seed=seed, progress=progress)
    return Pruned(**{**vars(result), "evaluation": worth, "bench": timed})


def layers_to_drop(spec: Spec, stack: str | None, drop: int | None, keep: float | None) -> int:
    """The number of layers to remove. Raises U522 when it is not given once, or leaves none, or takes none."""
    depth = spec.stack(stack).depth
    if (drop is None) == (keep is None):
        raise UsageError("say how much to remove: --drop LAYERS, or --keep SHARE such as 0.8", code="U522")
    if keep is not None and not 0 < keep < 1:
        raise UsageError(f"--keep {keep} is not a share between 0 and 1", code="U522")
    count = drop if drop is not None else depth - max(1, round(depth * (keep or 0)))
    if not 1 <= count < depth:
        raise UsageError(f"cannot remove {count} of {depth} layers; give 1 to {depth - 1}", code="U522")
    return count


def _legal(loaded: Loaded, spec: Spec, *, writable: bool, zero_parts: bool) -> Legal:
    def legal(plan: Plan) -> bool:
        if check(plan, spec):
            return False
        if not writable:
            return True
        try:
            blueprint(loaded.model, plan, zero_parts=zero_parts)
        except WriteError:
            return False
        return True

    return legal
