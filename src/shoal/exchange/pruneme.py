"""PruneMe's way of counting: a list of layers to remove, as in `[22, 23, 26]`, where 1 is the first layer."""

from __future__ import annotations

import json

from shoal.exchange._drops import Drops, apply_drops, drops_of
from shoal.exchange._format import Format, from_json, layer_numbers
from shoal.plan import Plan, Spec

NAME = "pruneme"
FIRST = 1


def pruneme() -> Format:
    """A JSON list of the layers to remove, in any order, counted from 1 as PruneMe does.

    Source: the numbers of github.com/arcee-ai/PruneMe's CSV; ModelOpt's Minitron and economize count from 1 too.
    Says: whole layers removed. How we differ: the CSV itself ranks spans and is no plan, and its users disagree about
    which end of a span belongs to it (arcee-ai/PruneMe issue 4), so each layer is named here.
    """
    return Format(_read, _write)


def _read(text: str | bytes, identity: Plan) -> Plan:
    gone = layer_numbers(from_json(text, NAME), f"the {NAME} list (counted from 1)", identity.depth(), first=FIRST)
    return apply_drops(identity, Drops(gone, gone))


def _write(plan: Plan, spec: Spec | None = None) -> str:
    return json.dumps([layer + FIRST for layer in sorted(drops_of(plan, name=NAME, whole=True).mlp)]) + "\n"
