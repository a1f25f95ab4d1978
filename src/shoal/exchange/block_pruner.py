"""BlockPruner's `del_order_list.json`: for each number of parts the attentions and mlps that it removes."""

from __future__ import annotations

import json

from shoal.errors import NotationError
from shoal.examples import FormatExamples
from shoal.exchange._drops import Drops, apply_drops, drops_of
from shoal.exchange._format import Format, from_json, layer_numbers, shown
from shoal.plan import Plan, Spec

NAME = "block-pruner"
ATTENTION, MLP = "mha", "mlp"
EXAMPLES = FormatExamples(says="removed parts", whole=False)


def block_pruner() -> Format:
    """A JSON mapping from a number of parts to the list of [part, layer], mha or mlp, counted from 0.

    The largest number is read; for another one give its list alone. Written under its own number.

    Source: block_search.py and eval.py of github.com/MrGGLS/BlockPruner at 8210707 (Zhong et al. 2024, arXiv
    2406.10594), whose eval.py takes the list under its --del-block-num.

    Says: layers, attentions and mlps removed, at least one.
    """
    return Format(_read, _write)


def _read(text: str | bytes, identity: Plan) -> Plan:
    found = from_json(text, NAME)
    where = f"the {NAME} list"
    if isinstance(found, dict):
        numbers = [int(key) for key in found if key.isascii() and key.isdecimal() and len(key) < 7]
        if not numbers or len(numbers) != len(found):
            raise NotationError(
                f"the {NAME} file must map numbers of parts to lists of them; give del_order_list.json", code="N101"
            )
        found, where = found.get(str(max(numbers))), f"list {max(numbers)}"
    if not isinstance(found, list):
        raise NotationError(f"{where} is {shown(found)}; expected a list of [part, layer]", code="N101")
    gone: dict[str, list[object]] = {ATTENTION: [], MLP: []}
    for entry in found:
        if not isinstance(entry, list) or len(entry) != 2 or entry[0] not in list(gone):
            what = shown(entry[0]) if isinstance(entry, list) and entry else shown(entry)
            raise NotationError(f"{where} holds {what}; expected [{ATTENTION!r} or {MLP!r}, layer]", code="N101")
        gone[str(entry[0])].append(entry[1])
    attention, mlp = (layer_numbers(layers, f"{part} in {where}", identity.depth()) for part, layers in gone.items())
    return apply_drops(identity, Drops(attention, mlp))


def _write(plan: Plan, spec: Spec | None = None) -> str:
    drops = drops_of(plan, name=NAME)
    gone = [[ATTENTION, layer] for layer in sorted(drops.attention)] + [[MLP, layer] for layer in sorted(drops.mlp)]
    if not gone:
        raise NotationError(f"{NAME} cannot say {plan}: it removes nothing; leave --del-block-num out", code="N104")
    return json.dumps({str(len(gone)): sorted(gone, key=lambda entry: entry[1])}) + "\n"
