"""measure and prune: from a model and text to scores, to a plan, and to a folder that is proven."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from shoal.api.assess import Bench, Evaluation, Source, bench, evaluate, opened, text_of
from shoal.api.journal import journaled
from shoal.data import Data
from shoal.errors import UsageError, WriteError
from shoal.evaluation import Progress
from shoal.methods._task import Task
from shoal.models.inspect import inspect
from shoal.models.kinds import is_causal, require_causal, require_text
from shoal.models.load import Loaded
from shoal.models.stacks import unwrap
from shoal.plan import Cost, Plan, Shape, Spec, check, cost, parse_plan, require
from shoal.record import Record, plain
from shoal.registry import get
from shoal.scores import Found, Legal, Scores
from shoal.writing.surgery import blueprint


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
        """Plain data for --json and the records; what is not finite is None."""
        return {
            "method": self.method,
            "plan": str(self.plan),
            "hash": self.plan.hash,
            "dropped": {name: list(self.plan.dropped(name)) for name, _ in self.plan.stacks},
            "data": None if self.data is None else self.data.info.to_dict(),
            "cost": {"dense": self.before.to_dict(), "pruned": self.after.to_dict()},
            "scores": None if self.found.scores is None else self.found.scores.to_dict(),
            "trace": [{"plan": c.notation, "score": plain(c.score), "note": c.note} for c in self.found.trace],
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

    `settings` are the measure's own options; `options` go to `shoal.load`. Raises `UsageError` U501 for a name and U502
    for an option that does not exist, `DataError` for text that cannot be used.
    """
    entry = get("measures", name)
    own = entry.accept(settings or {})
    loaded = opened(source, **options)
    require_text(loaded.model, f"the measure {name}")
    text = text_of(loaded, data, split=split, length=length, limit=limit, stride=stride, bos=bos, seed=seed)
    scores: Scores = entry.load()(loaded.model, text, stack=stack, batch=batch, progress=progress, **own)
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
    """Find a plan with `drop` layers less (or a share `keep` of them) by a published method, or take `plan` as it is.

    Nothing is changed and nothing written; pass the result to `shoal.write`. `writable`: only plans that a stock class
    can express are looked at. `assess`: perplexity, agreement and generation on `limit` windows, at most 8, of the test
    split of `test_data`, and a paired timing. `journal`: a file in which searches keep what they evaluated.
    Raises `UsageError` (U5xx), `PlanError` (P1xx), and `WriteError` (W2xx) for a model or plan that cannot be written.
    """
    if plan is not None and (drop is not None or keep is not None):
        raise UsageError("give a plan or a number of layers to drop, not both", code="U521")
    entry = get("methods", method)
    own = entry.accept(settings or {})
    loaded = opened(source, **options)
    spec = inspect(loaded.model)
    identity = Plan.identity(spec, source=loaded.source)
    text = None
    # before the search, which may take hours: what will be needed after it
    if assess:
        require_causal(loaded.model, "the evaluation after pruning")
    test = text_of(loaded, test_data, split="test", length=length, limit=min(limit, 8), bos=bos) if assess else None
    if writable:
        _require_writable(loaded, identity)
    if plan is not None:
        plan = parse_plan(plan, identity) if isinstance(plan, str) else plan
        found, method = Found(require(plan, spec)), "listed"
        if writable:
            blueprint(loaded.model, plan, zero_parts=zero_parts)
    else:
        count = layers_to_drop(spec, stack, drop, keep)
        if entry.reads_data or is_causal(loaded.model):  # the records of causal models name the data in any case
            require_text(loaded.model, f"the method {method}")
            text = text_of(loaded, data, split=split, length=length, limit=limit, stride=stride, bos=bos)
        task = Task(
            model=loaded.model,
            data=cast(Data, text),  # None only for a method that says that it reads none
            plan=identity,
            spec=spec,
            legal=_legal(loaded, spec, writable=writable, zero_parts=zero_parts),
            objective=journaled(loaded.model, identity, path=journal, batch=batch),
            stack=stack,
            batch=batch,
            seed=seed,
            progress=progress,
        )
        found = entry.load()(task, drop=count, **own)
    shape = Shape()
    result = Pruned(
        loaded, spec, found.plan, method, found, cost(identity, spec, shape), cost(found.plan, spec, shape), text
    )
    if test is None:
        return result
    worth = evaluate(loaded, plan=found.plan, data=test, batch=batch, progress=progress)
    timed = bench(loaded, plan=found.plan, prompt=_prompt(loaded, length), seed=seed, progress=progress)
    return replace(result, evaluation=worth, bench=timed)


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


def _require_writable(loaded: Loaded, identity: Plan) -> None:
    """Raise `WriteError` when not even the whole model can be written, so that no search ends in "no layer may go"."""
    if unwrap(loaded.model) is not loaded.model:
        raise WriteError(
            "the model is wrapped by PEFT and cannot be written; merge the adapter first (model.merge_and_unload()), "
            "or allow plans that only run live",
            code="W211",
        )
    blueprint(loaded.model, identity)


def _prompt(loaded: Loaded, length: int, new: int = 32) -> int:
    """The prompt to time: `length` tokens, or what the context leaves beside `new` decoded ones."""
    limit = getattr(loaded.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return max(1, min(length, limit - new)) if isinstance(limit, int) and limit > 0 else length


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
