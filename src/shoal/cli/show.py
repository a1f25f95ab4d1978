"""shoal show: a plan as a picture, with its cost."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from shoal.cli._shared import Config, Json, Quiet, emit, progress_bars, read_plan, table


def show(
    plan: Annotated[str, typer.Argument(help="A plan.json, a written folder, or depth notation with --model.")],
    model: Annotated[str | None, typer.Option("--model", help="The base model; then the cost is shown too.")] = None,
    json_: Json = False,
    quiet: Quiet = False,
    config: Config = None,
) -> None:
    """Show which layers a plan runs; with --model also whether it is legal there and what it costs."""
    from shoal.plan import Plan, check, cost, load_plan, strip

    spec = None
    if model is not None:
        from shoal.models.load import inspect_source

        with progress_bars(quiet):
            spec = inspect_source(model)
    chosen: Plan = load_plan(plan) if spec is None else read_plan(plan, spec, model or "", legal=False)
    data: dict[str, Any] = {
        "plan": str(chosen),
        "hash": chosen.hash,
        "base": {"family": chosen.base.family, "source": chosen.base.source, "stacks": dict(chosen.base.depths)},
        "dropped": {name: list(chosen.dropped(name)) for name, _ in chosen.stacks},
    }
    lines = [str(chosen), f"{chosen.base.family}, {chosen.hash[:19]}"]
    lines += [f"{n}: {strip(chosen, n)}   dropped {list(chosen.dropped(n))}" for n, _ in chosen.stacks]
    if spec is not None:
        problems = check(chosen, spec)
        data["problems"] = [str(problem) for problem in problems]
        lines += [str(problem) for problem in problems]
        if not problems:
            before, after = cost(Plan.identity(spec), spec), cost(chosen, spec)
            data["cost"] = {"dense": before.to_dict(), "plan": after.to_dict()}
            names = ("params", "written_params", "prefill_flops", "decode_flops", "kv_per_token")
            lines.append(table([[n, getattr(before, n), getattr(after, n)] for n in names], ["", "dense", "plan"]))
    emit(data, "\n".join(lines), as_json=json_)
