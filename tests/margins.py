"""A pytest plugin that lists how much of its tolerance each numeric assertion uses, the thinnest margin first.

A share of 0.5 means that half of a tolerance is used here; the kernels of another processor may use the rest. Counted
are `pytest.approx`, `torch.allclose`, `torch.testing.assert_close`, and `assert seen < bound` with a bound below 0.1.
Not counted are comparisons inside `all(...)` and those of helpers that pytest does not rewrite.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.assertion import rewrite
from torch.testing._comparison import default_tolerances

TESTS = Path(__file__).parent
THIN = 0.1
LARGEST_BOUND = 0.1
"""A larger bound compares quantities, and is no tolerance."""
SUM = r"[\d.eE+\-*/() ]+?"
BOUND = re.compile(rf"^\(*(?:np\.float\d+\(|tensor\()?({SUM})(?:, [^<\n]*)?\)? <=? ({SUM})(?:$| and )", re.MULTILINE)

seen: dict[str, tuple[float, str, str]] = {}
"""By "file:line", the largest share, the kind of comparison and the test."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--margins", metavar="FILE", help="append every share to FILE, as JSON lines")


def pytest_configure(config: pytest.Config) -> None:
    rewrite.PYC_TAIL = f".margins{rewrite.PYC_TAIL}"  # what was compiled without the hook does not report
    scalar: Any = inspect.getmodule(pytest.approx).ApproxScalar  # type: ignore[union-attr]
    scalar.__eq__ = _approx(scalar.__eq__)
    torch.allclose = _allclose(torch.allclose)
    torch.testing.assert_close = _assert_close(torch.testing.assert_close)


def pytest_assertion_pass(item: pytest.Item, lineno: int, expl: str) -> None:
    for found, bound in BOUND.findall(expl):
        try:
            value, limit = _number(found), _number(bound)
        except (SyntaxError, TypeError, ZeroDivisionError):
            continue
        if 0 < limit < LARGEST_BOUND:
            _note("<", abs(value) / limit, f"{item.path.relative_to(TESTS)}:{lineno}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Here and not in the summary, which workers of pytest-xdist do not write."""
    if file := session.config.getoption("--margins"):
        with Path(file).open("a") as out:
            out.writelines(json.dumps(row) + "\n" for row in _rows())


def pytest_terminal_summary(terminalreporter: Any) -> None:
    rows = _rows()
    terminalreporter.section(f"tolerances of which more than {THIN:g} is used, of {len(rows)}")
    for share, place, kind, test in rows:
        if share > THIN:
            terminalreporter.write_line(f"{share:6.3f}  {kind:12}  {place}  {test}")


def _rows() -> list[tuple[float, str, str, str]]:
    return sorted(((share, place, kind, test) for place, (share, kind, test) in seen.items()), reverse=True)


def _number(text: str) -> float:
    """What a sum of literals comes to; SUM lets nothing else through, but may miss or catch a closing bracket."""
    text = text.rstrip(" )")
    return float(eval(text + ")" * (text.count("(") - text.count(")")), {"__builtins__": {}}))  # noqa: S307


def _note(kind: str, share: float, place: str | None = None) -> None:
    place = place or _place()
    if place is not None and share > seen.get(place, (-1.0,))[0]:
        seen[place] = (share, kind, os.environ.get("PYTEST_CURRENT_TEST", "").split("::")[-1].split(" ")[0])


def _place() -> str | None:
    """The innermost line of a test or its helpers."""
    frame = sys._getframe(1)
    while frame := frame.f_back:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(TESTS) and path != Path(__file__):
            return f"{path.relative_to(TESTS)}:{frame.f_lineno}"
    return None


def _share(a: Any, b: Any, rtol: float, atol: float) -> float:
    a, b = (torch.as_tensor(x).detach().double() for x in (a, b))
    used = torch.where(a == b, 0.0, (a - b).abs() / (atol + rtol * b.abs()))
    return float(used.nan_to_num(0.0).max()) if used.numel() else 0.0


def _approx(real: Callable[..., bool]) -> Callable[..., bool]:
    def equal(self: Any, actual: Any) -> bool:
        result = real(self, actual)
        if result and isinstance(actual, float | int) and isinstance(self.expected, float | int):
            apart = abs(actual - self.expected)
            _note("approx", apart / float(self.tolerance) if apart else 0.0)
        return result

    return equal


def _allclose(real: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(real)
    def allclose(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-8, **rest: Any) -> bool:
        result = real(a, b, rtol=rtol, atol=atol, **rest)
        if result:
            _note("allclose", _share(a, b, rtol, atol))
        return result

    return allclose


def _assert_close(real: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(real)
    def assert_close(a: Any, b: Any, *, rtol: float | None = None, atol: float | None = None, **rest: Any) -> None:
        real(a, b, rtol=rtol, atol=atol, **rest)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            rtol, atol = default_tolerances(a, b) if rtol is None or atol is None else (rtol, atol)
            _note("assert_close", _share(a, b, rtol, atol))

    return assert_close
