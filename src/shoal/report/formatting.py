"""Numbers and names as HTML-safe text. Every function here returns text that may be put into the page as it is."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

MINUS = "\N{MINUS SIGN}"
TO = "\N{EN DASH}"
NONE = "\N{EM DASH}"
ARROW = "\N{RIGHTWARDS ARROW}"
TIMES = "\N{MULTIPLICATION SIGN}"
_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))
_JOINED_UNITS = ("B", "FLOP", "FLOPs", "FLOPS")


def esc(value: object) -> str:
    """`value` as text, escaped for element content and attributes; what UTF-8 or HTML cannot hold is replaced."""
    text = str(value).encode("utf-8", "replace").decode("utf-8").replace("\0", "\N{REPLACEMENT CHARACTER}")
    return html.escape(text, quote=True)


def finite(value: object) -> float | None:
    """`value` as a float when it is a finite number, else None."""
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


def number(value: object, digits: int = 4) -> str:
    """A number to `digits` significant figures, whole numbers in full; NaN and infinity are written as such."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, Real):
        return esc(value)
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinity" if float(value) > 0 else f"{MINUS}infinity"
    if isinstance(value, Integral):
        return f"{int(value):,}".replace("-", MINUS)
    size = abs(float(value))
    if size and (size < 1e-3 or size >= 1e7):
        return f"{MINUS if float(value) < 0 else ''}{size:.{digits - 1}g}"
    return _fixed(float(value), _decimals(size, digits))


def pair(first: object, second: object) -> tuple[str, str]:
    """Two numbers with the same number of decimals, where that leaves both readable."""
    one, two = finite(first), finite(second)
    both_whole = isinstance(first, Integral) and isinstance(second, Integral)
    if one is None or two is None or both_whole:
        return number(first), number(second)
    sizes = sorted((abs(one), abs(two)))
    decimals = _decimals(sizes[1], 4)
    if sizes[1] >= 1e7 or sizes[1] < 1e-3 or (sizes[0] and sizes[0] < 10 ** (1 - decimals)):
        return number(first), number(second)
    return _fixed(one, decimals), _fixed(two, decimals)


def amount(value: object, unit: str = "") -> str:
    """A large number with an SI prefix and its unit: 134.5 M, 21.6 GFLOPs, 23,040 bytes."""
    exact = finite(value)
    if exact is not None:
        for scale, prefix in _PREFIXES:
            if abs(exact) >= scale:
                return _with_unit(f"{_fixed(exact / scale, 1)} {prefix}", unit, prefixed=True)
    return _with_unit(number(value), unit, prefixed=False)


def percent(dense: object, pruned: object) -> str:
    """The change from dense to pruned in per cent; NaN when one is not finite, a dash when dense is 0."""
    one, two = finite(dense), finite(pruned)
    if dense is None or pruned is None or one == 0:
        return NONE
    if one is None or two is None:
        return "NaN"
    change = 100 * (two - one) / abs(one)
    text = _fixed(change, 0 if abs(change) >= 1000 else 1 if abs(change) >= 0.1 or change == 0 else 2)
    return f"{'+' if change > 0 else ''}{text} %"


def ratio(value: object) -> str:
    """1.24x; NaN as such."""
    known = finite(value)
    return number(value) if known is None else f"{_fixed(known, 2)}{TIMES}"


def interval(value: Mapping[str, Any], *, of_ratios: bool = False) -> str:
    """`low to high` of a {median, low, high}; empty when there is no spread."""
    low, high = value.get("low"), value.get("high")
    if low is None or high is None:
        return ""
    return f"{ratio(low).removesuffix(TIMES)}{TO}{ratio(high)}" if of_ratios else " to ".join(pair(low, high))


def ranges(layers: Iterable[int]) -> str:
    """Layer numbers as the notation writes them: 12-14, 17, 25-26."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def plural(count: int | float, word: str) -> str:
    """1 layer, 2 layers, 2.5 layers."""
    return f"{count:g} {word}{'' if count == 1 else 's'}"


def _decimals(size: float, digits: int) -> int:
    return max(0, digits - 1 - math.floor(math.log10(size))) if size else 0


def _fixed(value: float, decimals: int) -> str:
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def _with_unit(text: str, unit: str, *, prefixed: bool) -> str:
    if not unit:
        return text
    return f"{text}{'' if prefixed and unit in _JOINED_UNITS else ' '}{esc(unit)}"
