"""shoal diff: what two plans do differently."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from shoal.cli import options
from shoal.cli._shared import emit, table


def diff(
    before: Annotated[str, typer.Argument(help="A plan.json or a written folder.", show_default=False)],
    after: Annotated[str, typer.Argument(help="Another one.", show_default=False)],
    json_: options.Json = False,
) -> None:
    """List the base layers that two plans treat differently."""
    from shoal.plan import diff as compare
    from shoal.plan import load_plan

    changes = compare(load_plan(before), load_plan(after))
    rows = [[c.stack, "order" if c.layer < 0 else str(c.layer), c.before, c.after] for c in changes]
    text = table(rows, ["stack", "layer", "before", "after"]) if rows else "the plans do the same"
    emit([asdict(change) for change in changes], text, as_json=json_)
