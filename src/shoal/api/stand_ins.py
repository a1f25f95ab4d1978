"""After a method has chosen what goes: put stand-ins in its place, or merge it into what stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from shoal.data import Data
from shoal.errors import UsageError
from shoal.evaluation import Progress
from shoal.executing.weights import ids_of, used_by
from shoal.fitting.result import Job, Transformed
from shoal.models.load import Loaded
from shoal.models.placed import is_offloaded
from shoal.plan import Plan, Spec, require, shapes_of
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
    `data` is None only where there is nothing to do. Without a `stack` they work on the one that the plan changes;
    raises U653 when it changes several."""
    said = []
    if then and stack is None:
        stack = _changed(found.plan)
    for one in then:
        assert data is not None
        job = Job(loaded.model, data, found.plan, found.weights, stack, batch, seed, progress)
        made = _made(one, job)
        _refuse_shared(made.plan, one.text)
        weights = used_by(made.plan, made.weights)
        require(made.plan, spec, shapes_of(weights))
        found = replace(found, plan=made.plan, weights=weights)
        said.append({"transform": one.text, **made.to_dict()})
    return found, tuple(said)


def _made(one: Then, job: Job) -> Transformed:
    """What a transform makes. Raises U738 for one that reads weights which a device map or --stream leaves in files."""
    refused = UsageError(
        f"{one.text} reads weights of many layers at once, and some lie in files here; give a model in memory, or take "
        "refit, replaceme, slerp or another that works layer by layer",
        code="U738",
    )
    try:
        made: Transformed = one.entry.load()(job, **one.options)
    except (NotImplementedError, RuntimeError, AttributeError) as error:
        if is_offloaded(job.model) and "meta" in str(error):
            raise refused from None
        raise
    if any(tensor.is_meta for tensor in made.weights.values()):
        raise refused
    return made


def _changed(plan: Plan) -> str | None:
    changed = plan.changed()
    if len(changed) > 1:
        raise UsageError(
            f"the plan changes the stacks {' and '.join(changed)}, and a stand-in is fitted in one; name it (--stack)",
            code="U653",
        )
    return changed[0] if changed else None


def _refuse_shared(plan: Plan, transform: str) -> None:
    """Raise U654 when two stacks name the same tensors: those of the one would run in the other."""
    taken: dict[str, str] = {}
    for stack, steps in plan.stacks:
        for name in sorted(ids_of(steps)):
            other = taken.setdefault(name, stack)
            if other != stack:
                raise UsageError(
                    f"{transform} makes the weights {name} for {stack}, and {other} has others of that name; write the "
                    f"plan of the {other} first and fuse the written model",
                    code="U654",
                )
