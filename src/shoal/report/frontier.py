"""The plot of a comparison: quality against cost, a line for each method, the frontier in colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from shoal.report.matplotlib_svg import BACK, KEPT, LINE, REMOVED, SIZE, TEXT, figure_of, plain_label, svg_of
from shoal.report.summary import Entry, frontier

_WORST = 60.0
"""Times the dense perplexity beyond which a point is only marked at the edge: ruined models are not worth the space."""


def frontier_svg(dense: Entry, found: Sequence[Entry], of: str, label: str) -> str:
    """Perplexity (logarithmic) over the number `of`, a share of the dense model's; each method's budgets are joined.

    Methods on the frontier are drawn in colour and named; the others are grey and named where there is room. What is
    far worse than the dense model is an arrow at the upper edge.
    """
    figure, axes = figure_of(12, 6.2)
    best = {(e.method, e.budget) for e in frontier(found, of)}
    usable = [e for e in found if of in e.numbers and e.perplexity]
    ceiling = dense.first * _WORST if math.isfinite(dense.first) else math.inf
    top = max([e.first for e in usable if e.first <= ceiling], default=10.0) * 1.35
    methods = list(dict.fromkeys(e.method for e in usable))
    leading = [m for m in methods if any(name == m for name, _ in best)]
    for method in sorted(methods, key=lambda m: m in leading):
        own = sorted((e for e in usable if e.method == method), key=lambda e: e.numbers[of])
        _line(axes, own, of, top, leads=method in leading)
    if math.isfinite(dense.first):
        axes.plot([1.0], [dense.first], "s", color=TEXT, markersize=8, zorder=4)
        axes.annotate("dense", (1.0, dense.first), **_above(TEXT))
    axes.set_yscale("log")
    axes.set_ylim(top=top * 1.15)
    axes.set_xlabel(f"{label}, share of the dense model", color=TEXT, fontsize=SIZE)
    axes.set_ylabel("perplexity", color=TEXT, fontsize=SIZE)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y", which="both", color=LINE, linewidth=0.5)
    return svg_of(figure, f"Perplexity against {label}")


def _line(axes: Any, own: Sequence[Entry], of: str, top: float, *, leads: bool) -> None:
    colour = KEPT if leads else LINE
    places, heights = [e.numbers[of] for e in own], [min(e.first, top) for e in own]
    axes.plot(places, heights, color=colour, linewidth=2.2 if leads else 1.1, zorder=3 if leads else 1)
    for entry, x, y in zip(own, places, heights, strict=True):
        gone = entry.first > top
        mark, face = ("^", BACK) if gone else ("o", colour)
        edge = REMOVED if gone else colour
        axes.plot([x], [y], mark, markerfacecolor=face, markeredgecolor=edge, markersize=7 if leads else 5, zorder=4)
    if leads or heights[0] < top:
        name = plain_label(own[0].method)
        axes.annotate(name, (places[0], heights[0]), **_left(TEXT if leads else "#808080"))


def _above(colour: str) -> dict[str, Any]:
    return {"xytext": (0, 9), "textcoords": "offset points", "ha": "center", "color": colour, "fontsize": SIZE}


def _left(colour: str) -> dict[str, Any]:
    size = SIZE if colour == TEXT else SIZE - 2.5
    return {"xytext": (-7, 0), "textcoords": "offset points", "ha": "right", "va": "center", "color": colour,
            "fontsize": size}  # fmt: skip
