"""Tasks of lm-eval (EleutherAI's evaluation harness) on a live model, whatever plan runs on it."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from shoal.errors import DataError, UsageError, first_line
from shoal.evaluation.tasks import TaskScore
from shoal.models.evaluating import evaluating

RIGHT = ("acc", "exact_match", "em")
"""Metrics of lm-eval that say of one item whether it is right; the first that a task has counts."""
SEED = 1234
"""Of the examples in a few-shot prompt, as lm-eval draws them."""


@dataclass
class LmEvalTasks:
    """A task of lm-eval, or all tasks of a group."""

    name: str
    limit: int | None
    sha256: str
    """Of the settings and the items."""
    loaded: dict[str, Any] = field(repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process reads the tasks again: they hold functions."""
        return load_lm_eval, (self.name, self.limit)


def load_lm_eval(name: str, limit: int | None = None) -> LmEvalTasks:
    """The task or group `name` of lm-eval, or the one that a .yaml file in its format describes; `limit`: the first so
    many items of each task.

    Raises `UsageError` U575 when lm-eval is not installed, `DataError` D452 for a name that it does not know or whose
    data cannot be had, D453 for a task that says of no item whether it is right.
    """
    if find_spec("lm_eval") is None:
        raise UsageError(
            f"{name!r} is no .jsonl file, and tasks of lm-eval need that package; run: pip install 'shoal[eval]'",
            code="U575",
        )
    with _quiet():
        from lm_eval.tasks import TaskManager

        try:
            file = Path(name).suffix in (".yaml", ".yml")
            loaded: dict[str, Any] = TaskManager(include_defaults=not file).load([name])["tasks"]
            digest = _digest(loaded, limit)
        except Exception as error:  # of any library that fetches or parses a data set
            raise DataError(
                f"lm-eval cannot load the task {name} ({first_line(error, 160)}); name one that it knows (lm-eval ls "
                "tasks), load its data once with the network, or give a .jsonl file",
                code="D452",
            ) from None
    for task in loaded.values():
        metrics = [one.get("metric") for one in task.dump_config().get("metric_list") or ()]
        if metrics and not set(metrics) & set(RIGHT):
            raise DataError(
                f"the task {task.task_name} of lm-eval knows {', '.join(map(str, metrics))} and no item that is right "
                f"or wrong; choose one with {' or '.join(RIGHT)}",
                code="D453",
            )
    return LmEvalTasks(name, limit, digest, loaded)


def score_lm_eval(model: Any, tokenizer: Any, tasks: LmEvalTasks, *, batch: int = 8) -> list[TaskScore]:
    """How many items of each task the model gets right, by lm-eval's own prompts, filters and scoring.

    `error` is over items; `nll`, of the right answers, is known where the task has lm-eval's `perplexity`.
    """
    with _quiet(), evaluating(model):
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        for task in tasks.loaded.values():
            task.set_fewshot_seed(SEED)
        runner = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch)
        found: Any = evaluate(runner, {"tasks": tasks.loaded}, limit=tasks.limit, bootstrap_iters=0)
    return [_score(name, found["results"][name], found["samples"][name]) for name in tasks.loaded]


def _score(name: str, means: dict[str, Any], samples: list[dict[str, Any]]) -> TaskScore:
    # one answer may be read through several filters: the first is the task's own
    mine = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    metric = next((metric for metric in RIGHT if metric in mine[0]), None)
    if metric is None:
        raise DataError(f"the task {name} of lm-eval says of no item whether it is right; choose another", code="D453")
    right = [float(sample[metric]) for sample in mine]
    normal = [float(sample["acc_norm"]) for sample in mine if "acc_norm" in sample]
    perplexity = means.get(f"perplexity,{mine[0]['filter']}")
    return TaskScore(
        name=name,
        accuracy=fmean(right),
        error=stdev(right) / math.sqrt(len(right)) if len(right) > 1 else None,
        normalised=fmean(normal) if normal else None,
        nll=math.log(perplexity) if perplexity else math.nan,
        items=len(right),
        correct=tuple(value > 0.5 for value in right),
    )


def _digest(loaded: dict[str, Any], limit: int | None) -> str:
    total = hashlib.sha256()
    for name, task in sorted(loaded.items()):
        config = {key: value for key, value in task.dump_config().items() if not callable(value)}
        for part in (name, config, *(doc for _, doc in task.doc_iterator(limit=limit))):
            total.update(json.dumps(part, sort_keys=True, default=lambda other: type(other).__name__).encode())
    return total.hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no notes of lm-eval and what it loads data with."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
