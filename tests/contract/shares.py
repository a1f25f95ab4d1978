"""Which part of a large product of tests runs by default: the rest runs with `-m slow`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterable
from typing import Any

import pytest
from _pytest.mark import ParameterSet


def every(n: int, values: Iterable[Any]) -> list[Any]:
    """`values` as parameters, of which the first and then every n-th run by default."""
    return [_parameter(at % n == 0, value) for at, value in enumerate(values)]


def only(kept: Container[Any], values: Iterable[Any]) -> list[Any]:
    """`values` as parameters, of which those in `kept` run by default."""
    return [_parameter(value in kept, value) for value in values]


def pairs(n: int, rows: Iterable[Any], columns: Iterable[Any], *, step: int = 1) -> list[Any]:
    """Each row with each column as two parameters, of which one in `n` runs by default.

    With `step` and `n` without a common divisor every row is among them that has at least `n` columns, and every
    column that has at least `n` rows.
    """
    numbered = itertools.product(enumerate(rows), enumerate(columns))
    return [_parameter((i + step * j) % n == 0, row, column) for (i, row), (j, column) in numbered]


def pairs_where(by_default: Callable[[Any, Any], bool], rows: Iterable[Any], columns: Iterable[Any]) -> list[Any]:
    """Each row with each column as two parameters, of which those run by default for which `by_default` is true."""
    return [_parameter(by_default(row, column), row, column) for row, column in itertools.product(rows, columns)]


def _parameter(by_default: bool, *values: Any) -> Any:
    """A value may be a parameter with an id of its own."""
    ids = [value.id if isinstance(value, ParameterSet) else None for value in values]
    plain = [value.values[0] if isinstance(value, ParameterSet) else value for value in values]
    name = "-".join(own or str(value) for own, value in zip(ids, plain, strict=True)) if any(ids) else None
    return pytest.param(*plain, marks=[] if by_default else pytest.mark.slow, id=name)
