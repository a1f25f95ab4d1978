"""shoal show: a plan as a picture, with its cost."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from shoal.cli import options
from shoal.cli._shared import emit, progress_bars, read_plan, read_weights, table, unused


def show(
    plan: Annotated[str, typer.Argument(help="A plan.json, a written folder, or depth notation with --model.")],
    model: Annotated[str | None, typer.Option("--model", help="The base model; then the cost is shown too.")] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="In which dtype the bytes of a decode step are counted.")
    ] = "float32",
    trust_remote_code: options.Trust = False,
    json_: options.Json = False,
    quiet: options.Quiet = False,
    config: options.Config = None,
) -> None:
    """Show which layers a plan runs; with --model also whether it is legal there and what it costs; of a written
    folder also which layers of the original base it holds."""
    from shoal.api.inspection import show as facts_of
    from shoal.plan import load_plan
    from shoal.plan.lineage import lineage_of_folder

    spec = None
    if model is not None:
        from shoal.models.load import inspect_source

        with progress_bars(quiet):
            spec = inspect_source(model, trust_remote_code=trust_remote_code)
    else:
        unused("nothing is counted without --model", "dtype")
    chosen = load_plan(plan) if spec is None else read_plan(plan, spec, model or "", legal=False)
    seen = facts_of(chosen, spec, read_weights(plan), dtype=dtype)
    text, known = _text(seen), lineage_of_folder(plan)
    if known is not None:
        seen |= {"lineage": known.to_dict()}
        text += f"\n{known.describe()}"
    emit(seen, text, as_json=json_)


def _text(seen: dict[str, Any]) -> str:
    lines = [seen["plan"], f"{seen['base']['family']}, {seen['hash'][:19]}"]
    lines += [f"{name}: {strip}   dropped {seen['dropped'][name]}" for name, strip in seen["strips"].items()]
    lines += [f"new weights {name} {shape}" for name, shape in seen.get("weights", {}).items()]
    lines += seen.get("problems", [])
    if "cost" in seen:
        before, after = seen["cost"]["dense"], seen["cost"]["plan"]
        names = ("params", "written_params", "prefill_flops", "decode_flops", "kv_per_token")
        rows = [[name, before[name], after[name]] for name in names]
        moved = seen["moved"]
        rows.append([f"decode_bytes ({moved['plan']['dtype']})", moved["dense"]["total"], moved["plan"]["total"]])
        lines.append(table(rows, ["", "dense", "plan"]))
    return "\n".join(lines)
