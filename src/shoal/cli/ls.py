"""shoal ls: what there is to choose from."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal.cli import options
from shoal.cli._shared import emit, table
from shoal.errors import UsageError


def ls(
    kind: Annotated[
        str | None,
        typer.Argument(
            help="measures, search, methods, transforms, recipes, terms, learners, policies, exchange, drafts, ..."
        ),
    ] = None,
    json_: options.Json = False,
) -> None:
    """List what there is of each kind, from measures to graphs, each with one line."""
    from shoal.registry import KINDS, entries

    if kind is not None and kind not in KINDS:
        raise UsageError(f"there is no list of {kind!r}; choose {', '.join(KINDS)}", code="U501")
    found = {k: entries(k) for k in KINDS if kind in (None, k)}
    data = {k: [{"name": e.name, "summary": e.summary} for e in group.values()] for k, group in found.items()}
    text = "\n\n".join(
        f"{k}\n" + table([["", e.name, e.summary] for e in group.values()], ["", "", ""]).lstrip("\n")
        for k, group in found.items()
    )
    emit(data, text, as_json=json_)
