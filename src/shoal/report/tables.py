"""Tables and small bars as HTML text. Cells are HTML-safe already; see `shoal.report.formatting`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from shoal.report.formatting import ARROW, esc, finite, number, percent


def cell(content: str, *, kind: str = "", value: object = None) -> str:
    """One `<td>`; `value` is what a sortable table sorts by."""
    sort = "" if value is None else f' data-value="{esc(value)}"'
    return f"<td{f' class={kind!r}' if kind else ''}{sort}>{content}</td>"


def numeric(value: object) -> str:
    """A right-aligned number; one that is not finite stands out."""
    broken = isinstance(value, Real) and finite(value) is None
    return cell(number(value), kind="n bad" if broken else "n", value=value)


def table(heads: Sequence[str], rows: Iterable[str], *, right: Iterable[int] = (), sortable: bool = False) -> str:
    """A table of `rows` (each the cells of one `<tr>`, or a whole `<tr>`); columns in `right` hold numbers."""
    numbers = frozenset(right)
    top = "".join(
        f'<th scope="col"{" class=n" if place in numbers else ""}>{esc(head)}</th>' for place, head in enumerate(heads)
    )
    body = "".join(row if row.startswith("<tr") else f"<tr>{row}</tr>" for row in rows)
    kind = ' class="sortable"' if sortable else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def named(name: object, how: object = None) -> str:
    """A cell with a name and, below it, how the figure was made."""
    return cell(esc(name) + (f'<span class="sub">{esc(how)}</span>' if how else ""), kind="name")


def verdict(row: Mapping[str, Any]) -> tuple[str, str]:
    """(word, class) for the change of a quality figure; a change below two standard errors is not called one."""
    dense, pruned = finite(row.get("dense")), finite(row.get("pruned"))
    if pruned is None and row.get("pruned") is not None:
        return "not a finite number", "bad"
    if dense is None or pruned is None:
        return "", ""
    if dense == pruned:
        return "unchanged", ""
    one, two = finite(row.get("error_dense")), finite(row.get("error_pruned"))
    if one is not None and two is not None and abs(pruned - dense) <= 2 * math.hypot(one, two):
        return "within 2 standard errors", ""
    improved = (pruned < dense) == (row.get("better", "lower") == "lower")
    return ("better", "good") if improved else ("worse", "bad")


def bars(dense: object, pruned: object) -> str:
    """Two bars from 0, dense above pruned, to the same scale; empty when one cannot be drawn."""
    one, two = finite(dense), finite(pruned)
    if one is None or two is None or min(one, two) < 0 or max(one, two) == 0:
        return ""
    scale = 100 / max(one, two)
    label = f"dense {number(dense)}, pruned {number(pruned)} ({percent(dense, pruned)})"
    return (
        f'<svg class="bars" viewBox="0 0 100 22" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f"<title>{label}</title>"
        f'<rect y="2" width="{one * scale:.2f}" height="8" fill="currentColor" fill-opacity=".32"/>'
        f'<rect y="12" width="{two * scale:.2f}" height="8" style="fill:var(--kept)"/></svg>'
    )


def from_to(first: str, second: str) -> str:
    """`a -> b` with a real arrow."""
    return f"{first} {ARROW} {second}"
