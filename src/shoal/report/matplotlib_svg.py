"""Drawings as inline SVG whose colours follow the page: matplotlib draws with marker colours that become CSS variables.

Nothing here touches pyplot. Text from outside would be read as mathtext: it stands in the figure's caption and,
escaped, in the drawing's title; only row labels are drawn, as plain ASCII and without mathtext.
"""

from __future__ import annotations

import hashlib
import io
import re
from typing import TYPE_CHECKING

from shoal.report.formatting import esc

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEXT, LINE, KEPT, REMOVED, BACK = "#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04", "#0a0a05"
_COLOURS = {
    TEXT: "currentColor",
    LINE: "var(--line)",
    KEPT: "var(--kept)",
    REMOVED: "var(--removed)",
    BACK: "var(--back)",
}
SIZE = 11
"""Points; the drawings are 864 wide and the page shows them a fifth larger, or narrower but scrolling."""


def figure_of(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure (inches) in the page's manner: hairlines, no frame, nothing behind."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(LINE)
    axes.tick_params(which="both", colors=TEXT, labelsize=SIZE, length=0)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def plain_label(label: str) -> str:
    """Only what matplotlib's own font can measure: printable ASCII."""
    return "".join(char if char.isascii() and char.isprintable() else "?" for char in label)


def svg_of(figure: Figure, title: str) -> str:
    """The figure as an `<svg>` element that may stand beside others in one page and takes no style from matplotlib."""
    import matplotlib as mpl

    buffer = io.StringIO()
    # real text instead of outlines, and ids that do not change from run to run
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "shoal"}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    drawing = buffer.getvalue()
    inner = drawing[drawing.index(">", drawing.index("<svg")) + 1 :]
    inner = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", inner, flags=re.DOTALL)
    inner = inner.replace("xlink:href", "href")
    inner = re.sub(r"font-family: [^;\"]+;? ?", "", inner)
    inner = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font-size: \1", inner)
    for marker, colour in _COLOURS.items():
        inner = inner.replace(marker, colour)
    prefix = "p" + hashlib.sha256((title + inner).encode("utf-8", "replace")).hexdigest()[:8]
    inner = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", inner)
    inner = re.sub(r"\s*\n\s*", "\n", inner)
    width, height = (72 * inches for inches in figure.get_size_inches())
    return (
        f'<svg class="plot" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{esc(title)}">'
        f"<title>{esc(title)}</title>{inner}"
    )
