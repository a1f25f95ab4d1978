"""Heat maps of layer by layer as inline SVG: colours from the page's style sheet by class, strength by opacity, so that
they follow the light and the dark page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shoal.report.formatting import esc, finite, number

_SIZE, _CELL = 360, 12
"""Units of a whole map, and of a cell at least."""
_LEFT, _TOP, _BOTTOM = 40, 8, 62
_TOLD = 64
"""Larger maps have no tooltip for each cell: they would be megabytes."""


@dataclass(frozen=True)
class Shade:
    """How values become colours: the style sheet's class, and the opacity from 0 to 1."""

    of: Callable[[float], tuple[str, float]]
    ends: tuple[tuple[str, float, str], ...]
    """For the legend, from left to right: class, opacity and words."""


def alike(largest: float) -> Shade:
    """Distances: the nearer to 0, the stronger the colour; none at `largest` and beyond."""
    top = largest or 1.0
    steps = 5
    words = {0: "0", steps: number(top, 3)}
    ends = tuple(("alike", 1 - at / steps, words.get(at, "")) for at in range(steps + 1))
    return Shade(lambda value: ("alike", 1 - min(1.0, max(0.0, value) / top)), ends)


def change(most: float) -> Shade:
    """Changes of what should be low: below 0 in the colour for better, above 0 for worse, strongest from `most` on."""
    top = most or 1.0

    def of(value: float) -> tuple[str, float]:
        return ("better" if value < 0 else "worse"), min(1.0, abs(value) / top)

    signed = number(top, 3)
    ends = (
        ("better", 1.0, f"\N{MINUS SIGN}{signed}"), ("better", 0.5, ""), ("worse", 0.0, "0"), ("worse", 0.5, ""),
        ("worse", 1.0, f"+{signed}"),
    )  # fmt: skip
    return Shade(of, ends)


def heat_map(
    values: Sequence[Sequence[float | None]],
    shade: Shade,
    *,
    title: str,
    rows: str = "layer",
    columns: str = "layer",
    unit: str = "",
    numbers: tuple[Sequence[int], Sequence[int]] | None = None,
    chosen: tuple[int, int] | None = None,
) -> str:
    """An `<svg>` of `values` [rows][columns], row 0 at the top; None or NaN is an empty cell.

    `rows`, `columns`: what the numbers at the axes count, those of `numbers` (rows, columns), or from 0 on.
    `chosen`: a cell that is framed, as (row, column). Texts are escaped.
    """
    down, across = len(values), max((len(row) for row in values), default=0)
    of_rows, of_columns = numbers or (range(down), range(across))
    cell = max(_CELL, _SIZE // max(down, across, 1))
    told = max(down, across) <= _TOLD
    cells = []
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            known = finite(value)
            if known is None:
                continue
            kind, strength = shade.of(known)
            place = f'x="{_LEFT + x * cell}" y="{_TOP + y * cell}" width="{cell}" height="{cell}"'
            drawn = f'<rect class="{kind}" {place} fill-opacity="{strength:.2f}"'
            said = f"{rows} {of_rows[y]}, {columns} {of_columns[x]}: {number(known, 3)}"
            cells.append(f"{drawn}><title>{esc(said)}</title></rect>" if told else f"{drawn}/>")
    width, height = _LEFT + across * cell + 12, _TOP + down * cell + _BOTTOM
    frame = f'<rect class="frame" x="{_LEFT}" y="{_TOP}" width="{across * cell}" height="{down * cell}"/>'
    frame += _framed(chosen, cell)
    axes = _axis(of_rows, cell, vertical=True) + _axis(of_columns, cell, vertical=False, at=_TOP + down * cell)
    foot = _TOP + down * cell
    names = (
        f'<text x="{_LEFT + across * cell / 2:g}" y="{foot + 27}" text-anchor="middle">{esc(columns)}</text>'
        f'<text transform="translate(11 {_TOP + down * cell / 2:g}) rotate(-90)" text-anchor="middle">'
        f"{esc(rows)}</text>"
    )
    return (
        f'<svg class="heat" viewBox="0 0 {width} {height}" role="img" aria-label="{esc(title)}">'
        f"<title>{esc(title)}</title>{''.join(cells)}{frame}{axes}{names}{_legend(shade, foot + 36, unit)}</svg>"
    )


def _framed(chosen: tuple[int, int] | None, cell: int) -> str:
    if chosen is None:
        return ""
    y, x = chosen
    return f'<rect class="chosen" x="{_LEFT + x * cell}" y="{_TOP + y * cell}" width="{cell}" height="{cell}"/>'


def _axis(numbers: Sequence[int], cell: int, *, vertical: bool, at: float = 0) -> str:
    """Few numbers in full, of more every fifth, tenth or twentieth."""
    count = len(numbers)
    every = 1 if count <= 16 else 5 if count <= 64 else 10 if count <= 128 else 20
    said = []
    for place, number_of in enumerate(numbers):
        if number_of % every:
            continue
        middle = place * cell + cell / 2
        if vertical:
            said.append(f'<text x="{_LEFT - 5}" y="{_TOP + middle + 4:g}" text-anchor="end">{number_of}</text>')
        else:
            said.append(f'<text x="{_LEFT + middle:g}" y="{at + 13:g}" text-anchor="middle">{number_of}</text>')
    return "".join(said)


def _legend(shade: Shade, y: float, unit: str) -> str:
    """The scale, in the colours of the cells, with its unit behind it."""
    pieces, wide = [], 190 // len(shade.ends)
    for place, (kind, strength, words) in enumerate(shade.ends):
        x = _LEFT + place * wide
        pieces.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{wide}" height="9" fill-opacity="{strength:.2f}"/>')
        if words:
            anchor = "start" if place == 0 else "end" if place == len(shade.ends) - 1 else "middle"
            spot = x + {"start": 0, "middle": wide / 2, "end": wide}[anchor]
            pieces.append(f'<text x="{spot:g}" y="{y + 21}" text-anchor="{anchor}">{esc(words)}</text>')
    wide *= len(shade.ends)
    pieces.append(f'<rect class="frame" x="{_LEFT}" y="{y}" width="{wide}" height="9"/>')
    if unit:
        pieces.append(f'<text x="{_LEFT + wide + 8}" y="{y + 9}">{esc(unit)}</text>')
    return "".join(pieces)
