"""Task when removed: what each layer is worth to the user's own task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shoal.errors import ShoalError, UsageError
from shoal.evaluation.candidates import without_each
from shoal.evaluation.mean_scores import mean_scores
from shoal.evaluation.scoring import logits_of, windows
from shoal.evaluation.tasks import Option, Tasks, is_right, load_tasks, option_scores
from shoal.live import running
from shoal.models.evaluating import evaluating
from shoal.scores import Traits

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluation import Progress
    from shoal.scores import Scores

Metric = Callable[[Any], float | Sequence[float]]
"""The model as it runs now -> what it is worth, higher is better: one number, or one for each item."""

TRAITS = Traits(least=False)


def task_removed(
    model: Any,
    data: Data | None = None,
    *,
    metric: Metric | None = None,
    file: str | None = None,
    limit: int = 100,
    score: Literal["accuracy", "logprob"] = "accuracy",
    part: Literal["layer", "attention", "mlp"] = "layer",
    tokenizer: Any = None,
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """How much the user's own metric falls when one layer (or its attention or mlp) is removed.

    f_i = metric(model) - metric(model without i). The metric is, from Python, any function of the running model that
    returns one number or one for each item, higher being better; from a `file` of jsonl items the `accuracy` (or the
    mean log-probability, `logprob`) of the right answer over the first `limit` items, with lines of `context` and
    `continuation` (the last word, as in LAMBADA) or of `query`, `choices` and `gold`; without both the share of next
    tokens of `data` that the model foretells. Below 0 where the task gains by the removal.

    Source: the criterion of CULL-MT (Rostami and Dousti 2024, arXiv 2411.06506), which repeats it greedily.

    How we differ: any metric instead of a translation score; with one number for each item, differences are paired and
    have a standard error over items. Cost: the metric once per layer. Raises U533 when the metric fails or is not
    finite, D450 or D451 for a file that holds no items, U532 for a missing tokenizer, U507 while a plan is running.
    """
    plans = without_each(model, "task when removed", part=part, stack=stack)
    measure, source = _metric(data, metric, file, limit, score, tokenizer, batch)
    total, refused = 1 + len(plans.plans), list(plans.refused)
    dense = _worth(measure, model, "the whole model")
    sums: list[list[float]] = []
    for layer, plan in enumerate(plans.plans):
        if progress is not None:
            progress(layer + 1, total, "task when removed")
        if plan is None:
            sums.append([math.nan] * len(dense))
            continue
        with running(model, plan):
            without = _worth(measure, model, f"the model without layer {layer}", len(dense))
        sums.append([a - b for a, b in zip(dense, without, strict=True)])
    if progress is not None:
        progress(total, total, "task when removed")
    described = source or (data.info.describe() if data is not None else "")
    return mean_scores(
        "task-removed", f"fall of {'the metric' if metric else score}", sums, [1] * len(dense), described,
        stack=plans.stack, tokens=0 if data is None or source else data.ids.numel(), notes=tuple(refused),
        detail={"dense": math.fsum(dense) / len(dense)},
    )  # fmt: skip


def _metric(
    data: Data | None, metric: Metric | None, file: str | None, limit: int, score: Any, tokenizer: Any, batch: int
) -> tuple[Metric, str | None]:
    """The function to call, and the words for what it looks at when that is not `data`."""
    if metric is not None:
        return metric, f"the metric {getattr(metric, '__name__', type(metric).__name__)}"
    if file is not None:
        tasks = load_tasks(file, limit=limit)
        if tokenizer is None:
            raise UsageError(f"scoring the items of {file} needs the model's tokenizer; pass tokenizer=", code="U532")
        return (
            lambda model: _solved(model, tokenizer, tasks, score, batch),
            f"{Path(file).name}, {len(tasks.items)} items",
        )
    if data is None:
        raise UsageError("task-removed has nothing to judge by; give a metric, a file of items or text", code="U532")
    return lambda model: _foretold(model, data, batch), None


def _solved(model: Any, tokenizer: Any, tasks: Tasks, score: str, batch: int) -> list[float]:
    """For each item 1 if it is solved, or the log-probability of the right option among the options, in nats."""
    found = zip(tasks.items, option_scores(model, tokenizer, tasks, batch=batch), strict=True)
    if score == "accuracy":
        return [float(is_right(item, options)) for item, options in found]
    return [options[item.gold].logprob - (_log_sum(options) if len(options) > 1 else 0.0) for item, options in found]


def _log_sum(options: Sequence[Option]) -> float:
    most = max(one.logprob for one in options)
    return most + math.log(math.fsum(math.exp(one.logprob - most) for one in options))


def _foretold(model: Any, data: Data, batch: int) -> list[float]:
    """For each sequence the share of its scored tokens that are the model's first choice."""
    shares: list[float] = []
    with evaluating(model):
        for ids, mask, keep in windows(data, batch, None, "task"):
            first = logits_of(model, ids, mask)[:, :-1].argmax(-1).cpu()
            hits = keep & (first == ids[:, 1:])
            shares += (hits.sum(-1) / keep.sum(-1).clamp(min=1)).tolist()
    return shares


def _worth(metric: Metric, model: Any, which: str, items: int | None = None) -> list[float]:
    """What the metric says, as one or more finite numbers; U533 in its place otherwise."""
    try:
        said: Any = metric(model)
        found = [float(value) for value in said] if hasattr(said, "__iter__") else [float(said)]
    except ShoalError:
        raise
    except Exception as error:
        raise UsageError(
            f"the metric failed for {which}: {type(error).__name__}: {error}; mend the function", code="U533"
        ) from error
    if not found or not all(map(math.isfinite, found)):
        odd = next((value for value in found if not math.isfinite(value)), "nothing")
        raise UsageError(f"the metric gave {odd} for {which}; return finite numbers, higher is better", code="U533")
    if items is not None and len(found) != items:
        raise UsageError(
            f"the metric gave {len(found)} numbers for {which} but {items} for the whole model; return one for each "
            "item, in the same order",
            code="U533",
        )
    return found
