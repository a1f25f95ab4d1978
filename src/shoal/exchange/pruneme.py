"""PruneMe's table of spans, of which the one with the smallest distance goes, and its way of counting: from 1."""

from __future__ import annotations

import csv
import json
import math
from typing import Any

from shoal.errors import NotationError
from shoal.examples import FormatExamples
from shoal.exchange._drops import Drops, apply_drops, drops_of
from shoal.exchange._format import Format, decoded, from_json, layer_numbers, shown
from shoal.plan import Plan, Spec

NAME = "pruneme"
FIRST = 1
START, END, DISTANCE = "block_start", "block_end", "average_distance"
EXAMPLES = FormatExamples(says="removed layers")


def pruneme() -> Format:
    """A layer_distances.csv of PruneMe, or a JSON list of the layers to remove, in any order, counted from 1.

    Source: compute_block_similarity/layer_similarity.py of github.com/arcee-ai/PruneMe at 279c6b1 (after Gromov et al.
    2024, arXiv 2403.17887).

    A row compares what goes out of its block_start with what goes out of its block_end, both
    counted from 1, so the layers behind block_start up to block_end are removed; its own slice.yaml does the same. The
    row with the smallest distance is read, the first of equals. Says: whole layers removed, written as the list.
    """
    return Format(_read, _write)


def _read(text: str | bytes, identity: Plan) -> Plan:
    plain = decoded(text, NAME)
    if plain.lstrip().startswith(START):
        gone = _span(plain, identity.depth())
    else:
        what = f"the {NAME} list (counted from 1)"
        gone = layer_numbers(from_json(text, NAME), what, identity.depth(), first=FIRST)
    return apply_drops(identity, Drops(gone, gone))


def _span(plain: str, depth: int) -> frozenset[int]:
    """0-based layers of the best row."""
    best: tuple[float, int, int] | None = None
    try:
        for number, row in enumerate(csv.DictReader(plain.strip().splitlines()), 2):
            _require_columns(number, row)
            found = float(row[DISTANCE]), int(row[START]), int(row[END])
            if not math.isfinite(found[0]) or not FIRST <= found[1] < found[2] <= depth:
                raise NotationError(
                    f"the {NAME} file has the span {shown(row[START])} to {shown(row[END])} with distance "
                    f"{shown(row[DISTANCE])}; the model has the layers 1 to {depth}, give its own file",
                    code="N102",
                )
            best = found if best is None or found[0] < best[0] else best
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise NotationError(
            f"cannot read the {NAME} file ({type(error).__name__}); it has the columns {START}, {END} and {DISTANCE}",
            code="N101",
        ) from None
    if best is None:
        raise NotationError(f"the {NAME} file has no span; give one with a row for each", code="N101")
    return frozenset(range(best[1], best[2]))


def _require_columns(line: int, row: dict[str | None, Any]) -> None:
    """Raise N101 for a row with more or fewer values than the first line names."""
    more, names = len(row.get(None) or ()), [name for name in row if name is not None]
    values = len(names) - sum(row[name] is None for name in names) + more
    if values != len(names):
        raise NotationError(
            f"line {line} of the {NAME} file has {values} values and its first line names {len(names)} columns; mend "
            "the line",
            code="N101",
        )


def _write(plan: Plan, spec: Spec | None = None) -> str:
    return json.dumps([layer + FIRST for layer in sorted(drops_of(plan, name=NAME, whole=True).mlp)]) + "\n"
