"""ShortGPT's list of layers to remove, as in `[21, 22, 25]`."""

from __future__ import annotations

import json

from shoal.examples import FormatExamples
from shoal.exchange._drops import Drops, apply_drops, drops_of
from shoal.exchange._format import Format, from_json, layer_numbers
from shoal.plan import Plan, Spec

NAME = "shortgpt"
EXAMPLES = FormatExamples(says="removed layers")


def shortgpt() -> Format:
    """A JSON list of the layers to remove, in any order, counted from 0.

    Source: `layers_to_remove` of github.com/sramshetty/ShortGPT, which deletes them from the list of layers
    (short_gpt/short_hf.py at 6003ec3).

    Says: whole layers removed.
    """
    return Format(_read, _write)


def _read(text: str | bytes, identity: Plan) -> Plan:
    gone = layer_numbers(from_json(text, NAME), f"the {NAME} list", identity.depth())
    return apply_drops(identity, Drops(gone, gone))


def _write(plan: Plan, spec: Spec | None = None) -> str:
    return json.dumps(sorted(drops_of(plan, name=NAME, whole=True).mlp)) + "\n"
