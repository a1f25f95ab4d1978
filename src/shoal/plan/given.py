"""A plan as people give it: a `Plan`, depth notation, or the place of a plan.json."""

from __future__ import annotations

from pathlib import Path

from shoal.errors import NotationError, UsageError
from shoal.plan.file import is_plan_file, load_plan
from shoal.plan.notation import parse_steps
from shoal.plan.plan import Plan, parse_plan

Given = Plan | str | Path


def place_of(given: Given) -> Path | None:
    """The file or folder that `given` names; None for a plan or for notation. A text that can be read as notation is
    notation, whatever lies in the working directory."""
    if isinstance(given, Path):
        return given
    if not isinstance(given, str):
        return None
    return Path(given) if is_plan_file(given) and not _is_notation(given) else None


def given_plan(given: Given, base: Plan | None) -> Plan:
    """`given` as a plan of the model of `base`, which is usually `Plan.identity(spec)`.

    A plan.json, or a folder that Shoal wrote, says itself what its base is; whether that is this one is the question of
    `check`. Raises `NotationError` for what cannot be read, `UsageError` U656 for something else, and for notation
    without a `base`.
    """
    if isinstance(given, Plan):
        return given
    if not isinstance(given, str | Path):
        raise UsageError(
            f"a plan cannot be a {type(given).__name__}; give a Plan, depth notation such as '0-11,14-29', or the "
            "place of a plan.json or of a folder that Shoal wrote",
            code="U656",
        )
    if (place := place_of(given)) is not None:
        return load_plan(place)
    if base is None:
        raise UsageError(
            f"{str(given)[:60]!r} says layers and no model; give a Plan (shoal.parse_plan) or the place of a plan.json",
            code="U656",
        )
    return parse_plan(str(given), base)


def _is_notation(text: str) -> bool:
    try:
        for piece in text.split(";"):
            parse_steps(piece.rpartition(":")[2] if piece.strip()[:1].isalpha() else piece)
    except NotationError:
        return False
    return True
