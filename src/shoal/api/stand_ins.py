"""After a method has chosen what goes: put stand-ins in its place, or merge it into what stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from shoal.data import Data
from shoal.evaluation import Progress
from shoal.executing.weights import used_by
from shoal.fitting.result import Job, Transformed
from shoal.models.load import Loaded
from shoal.plan import Spec, require, shapes_of
from shoal.registry import Entry
from shoal.scores import Found
from shoal.spelling import chosen


@dataclass(frozen=True)
class Then:
    """One transform with its options, as typed: NAME or NAME:key=value,key=value."""

    text: str
    entry: Entry
    options: dict[str, Any]


def parse_then(texts: Sequence[str]) -> tuple[Then, ...]:
    """["refit:ridge=0.01", ...] -> transforms. Raises U501 for a name and U502 for an option that does not exist."""
    return tuple(Then(text, *chosen("transforms", text)) for text in texts)


def transformed(
    loaded: Loaded,
    spec: Spec,
    found: Found,
    then: Sequence[Then],
    data: Data | None,
    *,
    stack: str | None = None,
    batch: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Found, tuple[dict[str, Any], ...]]:
    """`found` with the transforms done in order, and for each what it did: name, plan, shapes of tensors, errors.
    `data` is None only where there is nothing to do."""
    said = []
    for one in then:
        assert data is not None
        job = Job(loaded.model, data, found.plan, found.weights, stack, batch, seed, progress)
        made: Transformed = one.entry.load()(job, **one.options)
        weights = used_by(made.plan, made.weights)
        require(made.plan, spec, shapes_of(weights))
        found = replace(found, plan=made.plan, weights=weights)
        said.append({"transform": one.text, **made.to_dict()})
    return found, tuple(said)
