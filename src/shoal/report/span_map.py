"""The map of a scan of spans that run twice: first layer down, last layer across, the change of the objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.report.formatting import esc, finite, number
from shoal.report.heat_map import change, heat_map
from shoal.report.sections import section


def span_map(part: Mapping[str, Any]) -> str:
    """The section with the map, from {before, spans: [[first, last, value]], chosen: [first, last]}."""
    before = finite(part["before"]) or 0.0
    deltas = {(int(i), int(j)): known - before for i, j, v in part["spans"] if (known := finite(v)) is not None}
    starts, ends = (sorted({span[side] for span in deltas}) for side in (0, 1))
    values = [[deltas.get((i, j)) for j in ends] for i in starts]
    most, better = _strongest(list(deltas.values())), sum(value < 0 for value in deltas.values())
    chosen = part.get("chosen")
    drawn = heat_map(
        values,
        change(most),
        title="Change of the objective when a span runs twice",
        rows="first of the span",
        columns="last of the span",
        unit="change",
        numbers=(starts, ends),
        chosen=None if chosen is None else (starts.index(chosen[0]), ends.index(chosen[1])),
    )
    best = min(deltas, key=lambda span: deltas[span], default=None)
    said = ""
    if best is not None:
        change_of = f"{number(before + deltas[best])} with the span {best[0]} to {best[1]} twice"
        said = f" Lowest: {change_of}, {number(before)} as it was."
    caption = (
        f"Each cell is a span that runs twice. Green: the objective is lower than without ({better} of {len(deltas)}); "
        f"vermilion: higher; full colour from the end of the scale on. The framed span was taken; empty cells were not "
        f"tried.{esc(said)}"
    )
    return section("Spans that run twice", f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>")


def _strongest(deltas: list[float]) -> float:
    """From which change on the colour is full: the largest gain or the median loss, whichever is more, since some spans
    ruin the model and would leave everything else pale."""
    losses = sorted(value for value in deltas if value > 0)
    gains = [-value for value in deltas if value < 0]
    return max([*gains, losses[len(losses) // 2] if losses else 0.0], default=1.0)
