"""The plots of the report: scores of layers, speed ratios; see `canvas` for how they get the page's colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shoal.report.formatting import TIMES, esc, finite
from shoal.report.matplotlib_svg import BACK, KEPT, LINE, REMOVED, SIZE, TEXT, figure_of, plain_label, svg_of
from shoal.report.style import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOG_FROM = 30.0
"""Largest over smallest value from which a linear axis would hide the small ones."""


def scores_svg(
    values: Sequence[float | None],
    errors: Sequence[float | None] | None,
    removed: frozenset[int],
    *,
    span: int,
    title: str,
) -> str:
    """One score for each layer (or for each first layer of `span` layers), removed ones in another colour and shape.

    `errors`: standard errors of the same length, or None. Bars on a linear axis; points on a logarithmic one, whose
    bars would have no honest foot. Values that are not finite are written where they would stand.
    """
    figure, axes = figure_of(12, 4.1)
    known = [value for value in map(finite, values) if value is not None]
    log = bool(known) and min(known) > 0 and max(known) / min(known) >= _LOG_FROM
    spread = [finite(error) or 0.0 for error in errors] if errors and len(errors) == len(values) else None
    for gone, name in ((False, "kept"), (True, "removed")):
        places = [i for i, value in enumerate(values) if finite(value) is not None and (i in removed) == gone]
        if places:
            heights = [finite(values[i]) or 0.0 for i in places]
            _series(axes, places, heights, spread and [spread[i] for i in places], gone=gone, log=log, name=name)
    if log:
        axes.set_yscale("log")
    elif known and max(known) > 0:
        axes.set_ylim(bottom=min(0.0, *known) * 1.08)
    for place, value in enumerate(values):
        if finite(value) is None:
            _absent(axes, place, value)
    _layer_axis(axes, len(values), "layer" if span == 1 else f"first of {span} layers")
    if known and removed:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, frameon=False, labelcolor=TEXT, fontsize=SIZE)
    return svg_of(figure, title)


def scores_file(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """A whole SVG file: one drawing as `scores_svg` makes it for each of the scores (as plain data), by name, one below
    the other, in the page's light colours."""
    width, height, head = 864.0, 295.2, 26
    panels = []
    for place, (name, own) in enumerate(scores.items()):
        top = place * (height + head)
        title = f"{name} ({own['unit']})"
        inner = scores_svg(own["values"], own["errors"], frozenset(), span=own["span"], title=title)
        panels.append(f'<text x="8" y="{top + 18:g}" font-size="14">{esc(title)}</text>')
        panels.append(inner.replace("<svg ", f'<svg y="{top + head:g}" width="{width:g}" height="{height:g}" ', 1))
    total = len(scores) * (height + head)
    style = f"svg{{{LIGHT}color:#1a1f24;font-family:sans-serif}}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {total:g}" width="{width:g}" '
        f'height="{total:g}"><style>{style}</style><rect width="100%" height="100%" fill="#fff"/>'
        f"{''.join(panels)}</svg>\n"
    )


def ratios_svg(rows: Sequence[Mapping[str, Any]], *, title: str) -> str:
    """Speed ratios as dots with their range, one row each, against the line at 1 (no change).

    `rows`: {label, median, low, high, simulated}.
    """
    figure, axes = figure_of(12, 0.95 + 0.55 * len(rows))
    for place, row in enumerate(rows):
        median, low, high = (finite(row.get(name)) for name in ("median", "low", "high"))
        if median is None:
            axes.text(1.0, place, "  NaN", color=REMOVED, va="center", fontsize=SIZE)
            continue
        low, high = median if low is None else low, median if high is None else high
        style = (0, (3, 2)) if row["simulated"] else "solid"
        axes.plot([low, high], [place, place], color=KEPT, linewidth=2.2, linestyle=style, solid_capstyle="butt")
        face = BACK if row["simulated"] else KEPT
        dot: dict[str, Any] = {
            "markersize": 9,
            "markerfacecolor": face,
            "markeredgecolor": KEPT,
            "markeredgewidth": 1.6,
        }
        axes.plot([median], [place], "o", **dot)
        above: dict[str, Any] = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center", "fontsize": SIZE}
        axes.annotate(f"{median:.2f}{TIMES}", (median, place), color=TEXT, **above)
    axes.axvline(1.0, color=TEXT, linewidth=1, linestyle=(0, (1, 2)))
    axes.set_yticks(range(len(rows)), [plain_label(str(row["label"])) for row in rows], parse_math=False)
    axes.set_ylim(len(rows) - 0.45, -0.75)
    low_end, high_end = axes.get_xlim()
    axes.set_xlim(min(low_end, 0.95), max(high_end, 1.05))
    axes.set_xlabel("speed-up over the dense model (1 = no change)", color=TEXT, fontsize=SIZE)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    axes.grid(visible=False, axis="y")
    return svg_of(figure, title)


def _series(
    axes: Axes,
    places: list[int],
    heights: list[float],
    spread: list[float] | None,
    *,
    gone: bool,
    log: bool,
    name: str,
) -> None:
    colour = REMOVED if gone else KEPT
    if log:
        axes.plot(
            places, heights, "D" if gone else "o", color=colour, markersize=6.5, markeredgewidth=1.6,
            markerfacecolor=BACK if gone else colour, label=name, zorder=3,
        )  # fmt: skip
    else:
        face = BACK if gone else colour
        hatch = "////" if gone else ""
        axes.bar(places, heights, 0.72, color=face, edgecolor=colour, linewidth=1.2, hatch=hatch, label=name)
    if spread is not None and any(spread):
        axes.errorbar(places, heights, spread, fmt="none", ecolor=TEXT, elinewidth=1.1, capsize=2.2, zorder=4)


def _absent(axes: Axes, place: int, value: float | None) -> None:
    word = "none" if value is None else "NaN" if math.isnan(value) else "inf" if value > 0 else "-inf"
    across = axes.get_xaxis_transform()
    axes.text(place, 0.03, word, transform=across, rotation=90, color=REMOVED, ha="center", va="bottom", fontsize=SIZE)


def _layer_axis(axes: Axes, depth: int, what: str) -> None:
    every = 1 if depth <= 40 else 5 if depth <= 120 else 10
    axes.set_xticks(range(0, depth, every))
    axes.set_xlim(-0.7, depth - 0.3)
    axes.set_xlabel(f"{what} (base model's number, from 0)", color=TEXT, fontsize=SIZE)
