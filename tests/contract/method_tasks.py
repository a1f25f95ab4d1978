"""Tasks for methods: a model with its text, and one that must not be looked at; and what each method is tried with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.api.journal import journaled
from shoal.data import Data
from shoal.examples import MethodExamples
from shoal.methods._job import PruningJob
from shoal.models.inspect import inspect
from shoal.plan import Plan, check
from shoal.registry import entries

from .families import tiny
from .planted import random_data

METHODS: dict[str, MethodExamples] = {
    name: entry.examples or MethodExamples() for name, entry in entries("methods").items() if entry.removes
}
"""Those that remove something; of those that grow the model, tests/contract/test_growing.py."""
TASK = '{"context": "1 and", "continuation": "so on"}\n{"context": "2 and", "continuation": "so on"}\n'
"""What the task file of the examples holds."""


def filled(options: Mapping[str, Any], task: Path) -> dict[str, Any]:
    """`options` of an example, with the name of the task file in its place."""
    return {name: one.format(task=task) if isinstance(one, str) else one for name, one in options.items()}


class Untouchable:
    """Stands for what a data-free method must not look at."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"a data-free method looked at .{name}")


def task_of(model: Any, data: Data, **rest: Any) -> PruningJob:
    spec = inspect(model)
    plan = Plan.identity(spec)
    return PruningJob(
        model,
        data,
        plan,
        spec=spec,
        legal=lambda p: not check(p, spec),
        objective=journaled(model, plan, batch=16),
        batch=16,
        **rest,
    )


def random_task(**rest: Any) -> PruningJob:
    return task_of(tiny("llama"), random_data(4, 16), **rest)
