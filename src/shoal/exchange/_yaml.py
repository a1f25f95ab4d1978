"""YAML from strangers: plain data only, small, shallow, without anchors."""

from __future__ import annotations

from typing import Any

import yaml

from shoal.errors import NotationError, first_line
from shoal.exchange._format import decoded

MAX_BYTES = 250_000
"""PyYAML reads about 50 kB a second; a slice is 70 bytes."""
MAX_NESTING = 20


def from_yaml(text: str | bytes, name: str) -> Any:
    """Parsed YAML. Raises N101 for anything else, and for anchors and deep nesting, which can blow up when loaded."""
    plain = decoded(text, name, limit=MAX_BYTES)
    try:
        _require_harmless(plain, name)
        return yaml.safe_load(plain)
    # PyYAML lets what int(), float() and date() raise for odd scalars through
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as e:
        raise NotationError(f"the {name} file is not YAML ({yaml_problem(e)}); mend it", code="N101") from None


def yaml_problem(error: Exception) -> str:
    """Where a text is no YAML, and why: line 2, column 1: found character '\\t' that cannot start any token."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or first_line(error)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    return f"{where}{str(what)[:120]}"


def to_yaml(data: Any, name: str) -> str:
    """Keys in their order, innermost lists on one line. Raises N104 when `from_yaml` would not take the text."""
    text = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=1000)
    if len(text) > MAX_BYTES:
        raise NotationError(
            f"{name} would need a file of {len(text) // 1000} kB for this plan, more than {MAX_BYTES // 1000}; "
            f"use a plan with fewer slices",
            code="N104",
        )
    return text


def _require_harmless(plain: str, name: str) -> None:
    nesting = 0
    for event in yaml.parse(plain, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise NotationError(f"the {name} file has the alias *{event.anchor!s:.40}; write it out", code="N101")
        nesting += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if nesting > MAX_NESTING:
            raise NotationError(
                f"the {name} file nests deeper than {MAX_NESTING} levels; give the right file", code="N101"
            )
