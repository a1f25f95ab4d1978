"""The list that llama.cpp's `llama-quantize --prune-layers` takes, as in `3,7,11`."""

from __future__ import annotations

import re

from shoal.errors import NotationError
from shoal.examples import FormatExamples
from shoal.exchange._drops import Drops, apply_drops, drops_of
from shoal.exchange._format import Format, decoded, layer_numbers, shown
from shoal.plan import Plan, Spec

NAME = "llama-quantize"
_LIST = re.compile(r"\s*(?:--prune-layers[\s=]+)?(\d{1,6}(?:\s*,\s*\d{1,6})*)\s*", re.ASCII)
EXAMPLES = FormatExamples(says="removed layers", whole=False)


def llama_quantize() -> Format:
    """The layers to remove with commas between them, counted from 0.

    A text that begins with the option's name is read too.

    Source: `parse_layer_prune` of llama.cpp (tools/quantize/quantize.cpp at 03161a4), the value of the option
    --prune-layers.

    Says: whole layers removed, at least one. Files of families with per-layer metadata do not load after llama.cpp's
    own pruning (its issue 27976).
    """
    return Format(_read, _write)


def _read(text: str | bytes, identity: Plan) -> Plan:
    plain = decoded(text, NAME)
    found = _LIST.fullmatch(plain)
    if found is None:
        raise NotationError(f"cannot read {shown(plain)} as a {NAME} list; write layers as in 3,7,11", code="N101")
    numbers = [int(number) for number in found[1].split(",")]
    gone = layer_numbers(numbers, f"the {NAME} list", identity.depth())
    return apply_drops(identity, Drops(gone, gone))


def _write(plan: Plan, spec: Spec | None = None) -> str:
    gone = drops_of(plan, name=NAME, whole=True).mlp
    if not gone:
        raise NotationError(f"{NAME} cannot say {plan}: it removes no layer; leave --prune-layers out", code="N104")
    return ",".join(map(str, sorted(gone))) + "\n"
