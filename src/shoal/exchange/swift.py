"""SWIFT's `skip_layers.json`: the attentions and mlps that its draft leaves out."""

from __future__ import annotations

import json
from typing import Any

from shoal.errors import NotationError
from shoal.examples import FormatExamples
from shoal.exchange._drops import Drops, apply_drops, drops_of
from shoal.exchange._format import Format, from_json, layer_numbers, shown
from shoal.plan import Plan, Spec

NAME = "swift"
PARTS = ("attention", "mlp")
EXAMPLES = FormatExamples(says="removed parts")


def swift() -> Format:
    """A JSON mapping from MODEL_TASK to the lists attention and mlp of what SWIFT's draft skips, counted from 0.

    Written under the model's name: add the task to it. When read, the mapping may lie inside others or in none, as long
    as there is one; a missing list is empty.

    Source: skip_layers.json of github.com/hemingkx/SWIFT at 312a2a0 (Xia et al. 2024, arXiv 2410.06916), which looks it
    up by model and task.

    Says: layers, attentions and mlps removed.

    How we differ: the plan is the draft's, SWIFT verifies with the whole model.
    """
    return Format(_read, _write)


def _read(text: str | bytes, identity: Plan) -> Plan:
    where, found = _the_one(_with_lists(from_json(text, NAME)))
    attention, mlp = (
        layer_numbers(found.get(part, []), f"the list {part!r} of the {NAME} file{where}", identity.depth())
        for part in PARTS
    )
    return apply_drops(identity, Drops(attention, mlp))


def _with_lists(data: object) -> list[tuple[str, dict[str, Any]]]:
    """Every mapping that holds such a list, with the keys that lead to it."""
    waiting: list[tuple[tuple[str, ...], dict[str, Any]]] = [((), data)] if isinstance(data, dict) else []
    found: list[tuple[str, dict[str, Any]]] = []
    while waiting:
        keys, here = waiting.pop(0)
        if any(isinstance(here.get(part), list) for part in PARTS):
            found.append(("/".join(keys), here))
            continue
        waiting += [((*keys, str(key)[:40]), value) for key, value in here.items() if isinstance(value, dict)]
    return found


def _the_one(found: list[tuple[str, dict[str, Any]]]) -> tuple[str, dict[str, Any]]:
    if not found:
        raise NotationError(f"the {NAME} file has no list called attention or mlp; give skip_layers.json", code="N101")
    if len(found) > 1:
        places = ", ".join(shown(place) for place, _ in found[:4])
        raise NotationError(f"the {NAME} file holds {len(found)} plans ({places}); keep one", code="N103")
    place, lists = found[0]
    return f" ({shown(place)})" if place else "", lists


def _write(plan: Plan, spec: Spec | None = None) -> str:
    drops = drops_of(plan, name=NAME)
    name = (plan.base.source or plan.base.family).rstrip("/").rpartition("/")[2] or plan.base.family
    return json.dumps({name: {"attention": sorted(drops.attention), "mlp": sorted(drops.mlp)}}) + "\n"
