"""The page of `shoal compare`: which method to use, the frontier, the plans under each other, all figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shoal.report.formatting import esc, number
from shoal.report.frontier import frontier_svg
from shoal.report.page import document
from shoal.report.sections import facts_list, section
from shoal.report.summary import Entry, advice, columns, entries
from shoal.report.tables import cell, numeric, table

_AXES = (("decode", "measured decode time"), ("prefill", "measured prefill time"), ("layers", "layers that run"))
_HEIGHT, _PITCH = 16, 9


def render_comparison(data: Mapping[str, Any]) -> str:
    """The comparison as one self-contained HTML page.

    title, command, created, version: text. rows: those of `compare`. strips: {plan: one character for each layer, as
    `shoal.plan.strip` draws them}. facts: {name: text}, the protocol. Every text is escaped.
    """
    dense, found = entries(data["rows"])
    said = "".join(f"<p class='lede'>{esc(line)}</p>" for line in advice(dense, found))
    head = (
        f'<header><p class="eyebrow">Shoal comparison · {esc(data.get("created", ""))}</p>'
        f"<h1>{esc(data['title'])}</h1>{said}</header>"
    )
    axis = next(((name, label) for name, label in _AXES if any(name in e.numbers for e in found)), None)
    parts = [] if axis is None else [_frontier(dense, found, *axis)]
    parts += [_plans(found, data.get("strips", {})), _figures(dense, found)]
    parts.append(
        section(
            "How this was made",
            facts_list(
                {esc(k): esc(v) for k, v in data.get("facts", {}).items()}
                | {"Command": f"<code>{esc(data.get('command', ''))}</code>"}
            ),
        )
    )
    return document(str(data["title"]), head, "".join(parts), data.get("version"))


def _frontier(dense: Entry, found: Sequence[Entry], of: str, label: str) -> str:
    drawing = frontier_svg(dense, found, of, label)
    caption = (
        "Lower left is better. In colour: methods that no other beats in both; a triangle at the upper edge is a model "
        "too bad to draw. Lines join one method's budgets."
    )
    return section(
        "Quality against cost",
        f'<figure><div class="scroll">{drawing}</div><figcaption>{caption}</figcaption></figure>',
    )


def _plans(found: Sequence[Entry], strips: Mapping[str, str]) -> str:
    """A strip for each plan, best first, one budget after the other."""
    shown = []
    for budget in dict.fromkeys(entry.budget for entry in found):
        rows = [
            cell(esc(e.method)) + cell(_strip(strips[e.plan], e.plan)) + numeric(e.first)
            for e in found
            if e.budget == budget and e.plan in strips
        ]
        if rows:
            shown.append(
                f"<h3>{esc(budget)}</h3>" + table(["method", "layers, from 0", "perplexity"], rows, right=(2,))
            )
    legend = (
        "Full: runs whole; upper half: attention only; lower half: mlp only; outlined: removed; violet: a fitted map."
    )
    return section("The plans", "".join(shown) + f'<p class="soft">{legend}</p>') if shown else ""


def _strip(marks: str, plan: str) -> str:
    pieces = [_mark(mark, place * _PITCH) for place, mark in enumerate(marks)]
    width = len(marks) * _PITCH
    return (
        f'<svg class="plan" viewBox="0 0 {width} {_HEIGHT}" width="{width}" height="{_HEIGHT}" role="img" '
        f'aria-label="{esc(plan)}"><title>{esc(plan)}</title>{"".join(pieces)}</svg>'
    )


def _mark(mark: str, x: int) -> str:
    wide, half = _PITCH - 2, _HEIGHT / 2
    outline = f'<rect class="hollow" x="{x + 0.5}" y=".5" width="{wide - 1}" height="{_HEIGHT - 1}"/>'
    if mark == "·":
        return outline
    if mark in "▀▄":
        y = 0 if mark == "▀" else half
        return outline + f'<rect class="kept" x="{x}" y="{y:g}" width="{wide}" height="{half:g}"/>'
    kind = "map" if mark == "≡" else "kept"
    return f'<rect class="{kind}" x="{x}" y="0" width="{wide}" height="{_HEIGHT}"/>'


def _figures(dense: Entry, found: Sequence[Entry]) -> str:
    heads, rows = columns(dense, found)
    cells = [
        "".join(cell(esc(v or "")) if i < 2 or isinstance(v, str) else numeric(v) for i, v in enumerate(row))
        for row in rows
    ]
    note = (
        "<p class='soft'>Times are measured, paired with the dense model, and like sizes shares of its own; "
        f"{number(len(found))} methods and budgets. Click a head to sort.</p>"
    )
    return section("All figures", note + table(heads, cells, right=range(2, len(heads)), sortable=True))
