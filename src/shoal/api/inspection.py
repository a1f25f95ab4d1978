"""inspect, show and ls: what a model is made of, what a plan does, what there is to choose from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from shoal.models import inspect as models_inspect
from shoal.models.load import Loaded, inspect_source
from shoal.plan import Given, Plan, Spec, check, cost, given_plan, shapes_of, strip
from shoal.plan.moved import moved
from shoal.registry import KINDS, entries


def inspect(source: str | Path | nn.Module | Loaded, *, trust_remote_code: bool = False) -> Spec:
    """The Spec of a live model, or of a folder, GGUF file, hub id or `smollm2` without loading a weight.

    Raises `ModelError` (M3xx) when it cannot be found, read or understood.
    """
    if isinstance(source, Loaded):
        return models_inspect.inspect(source.model)
    if isinstance(source, nn.Module):
        return models_inspect.inspect(source)
    return inspect_source(source, trust_remote_code=trust_remote_code)


def show(
    plan: Given, spec: Spec | None = None, weights: Mapping[str, Any] | None = None, *, dtype: str = "float32"
) -> dict[str, Any]:
    """What a plan (also the place of a plan.json, or, with a `spec`, depth notation) does: its notation, hash, base,
    one strip per stack and the layers it drops; with a `spec` also the problems that `check` finds there and, when
    there are none, the cost beside that of the base model, and the bytes that a decode step moves in `dtype`
    (`shoal.plan.moved`). `weights`: the tensors that the plan names; their shapes are shown and checked."""
    plan = given_plan(plan, None if spec is None else Plan.identity(spec))
    seen: dict[str, Any] = {
        "plan": str(plan),
        "hash": plan.hash,
        "base": {"family": plan.base.family, "source": plan.base.source, "stacks": dict(plan.base.depths)},
        "strips": {name: strip(plan, name) for name, _ in plan.stacks},
        "dropped": {name: list(plan.dropped(name)) for name, _ in plan.stacks},
    }
    shapes = shapes_of(weights or {})
    if shapes:
        seen["weights"] = {name: list(shape) for name, shape in sorted(shapes.items())}
    if spec is not None:
        problems = check(plan, spec, shapes)
        seen["problems"] = [str(problem) for problem in problems]
        if not problems:
            seen["cost"] = {
                "dense": cost(Plan.identity(spec), spec).to_dict(),
                "plan": cost(plan, spec, weights=shapes).to_dict(),
            }
            seen["moved"] = {
                "dense": moved(Plan.identity(spec), spec, dtype=dtype).to_dict(),
                "plan": moved(plan, spec, dtype=dtype, weights=shapes).to_dict(),
            }
    return seen


def ls(kind: str | None = None) -> dict[str, dict[str, str]]:
    """Name and first sentence of every measure, search, method, transform, policy and format, or of one `kind`."""
    return {k: {e.name: e.summary for e in entries(k).values()} for k in KINDS if kind in (None, k)}
