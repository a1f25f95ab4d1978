"""shoal doctor: is a checkpoint sound, what would a plan make of it, and a sound copy of a broken one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from shoal.cli import options
from shoal.cli._shared import emit, progress_bars, table
from shoal.errors import tell_unused


def doctor(
    model: Annotated[str, typer.Argument(help="A folder or a hub id; a hub id's weights are not fetched.")],
    plan: options.PlanText = None,
    kept: Annotated[
        str | None, typer.Option("--kept", help="Layers of the base that a broken folder holds, such as 0-5,8-11.")
    ] = None,
    repair: Annotated[Path | None, typer.Option("--repair", help="Write a sound copy to this folder.")] = None,
    overwrite: options.Overwrite = False,
    shard_size: options.ShardSize = "5GB",
    trust_remote_code: options.Trust = False,
    json_: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Say what a checkpoint is, what is wrong with it and what a plan would make of it, without reading a weight."""
    from shoal.api.doctor import doctor as examine

    for name, given in {"--overwrite": overwrite, "--shard-size": shard_size != "5GB"}.items():
        if given and repair is None:
            tell_unused(name, "nothing is written without --repair")
    with progress_bars(quiet) as progress:
        seen = examine(model, plan=plan, kept=kept, trust_remote_code=trust_remote_code)
        made = None
        if repair is not None:
            made = _repaired(
                seen, repair, kept, overwrite=overwrite, shard_size=shard_size, trust_remote_code=trust_remote_code,
                progress=progress,
            )  # fmt: skip
    data = seen.to_dict() | {"repaired": None if made is None else str(made.folder)}
    emit(data, _text(data, seen, made), as_json=json_)
    if made is None:
        seen.require_sound()


def _repaired(seen: Any, output: Path, kept: str | None, **options: Any) -> Any:
    from shoal.api.doctor import layer_list
    from shoal.record import Record, command_line
    from shoal.writing.repair import repair

    command = command_line()
    record = Record("repair", seen.to_dict(), base=seen.spec.fingerprint, command=command)
    return repair(
        seen.source,
        output,
        kept=None if kept is None else layer_list(kept),
        records=[record.to_dict()],
        command=" ".join(command),
        **options,
    )


def _text(data: dict[str, Any], seen: Any, made: Any) -> str:
    depths = ", ".join(f"{depth} {name} layers" for name, depth in data["layers"].items())
    lines = [
        f"{data['family']}: {depths}, {data['parameters']:,} parameters, {data['dtype']}, "
        f"{data['kv_bytes_per_token']:,} bytes of KV per token"
    ]
    if data["sound"]:
        agree = "it loads rightly, all the same" if data["findings"] else "config, index and tensors agree"
        lines.append(f"sound: {agree}")
    if data["findings"]:
        rows = [
            ["" if f["breaks"] else "(loads)", f["what"], f["found"], f["wanted"], f["mend"] or "cannot be mended"]
            for f in data["findings"]
        ]
        lines += ["", table(rows, ["", "wrong", "is", "should be", "repair"])]
    lines += [f"note: {note}" for note in data["notes"]]
    lines += ["", plan_text(data["plan"]) if data["plan"] else engines_text(data["engines"])]
    if made is not None:
        lines += ["", f"proved and written to {made.folder}: {made.params:,} parameters in {made.files} files"]
    return "\n".join(lines)


def plan_text(plan: dict[str, Any]) -> str:
    """An outlook as lines."""
    lines = [f"plan {plan['plan']}"]
    lines += [f"{name}: {strip}   dropped {plan['dropped'][name]}" for name, strip in plan["strips"].items()]
    rows = [[name.replace("_", " "), value, plan["after"][name]] for name, value in plan["before"].items()]
    lines.append(table(rows, ["", "before", "after"]))
    lines += [f"config {name}: {old} -> {new}" for name, (old, new) in plan["changed"].items()]
    if plan["refused"]:
        lines.append(f"cannot be written: {plan['refused']}")
    return "\n".join([*lines, "", engines_text(plan["engines"])])


def engines_text(engines: list[dict[str, Any]]) -> str:
    """The engines' verdicts as a table."""
    said = {True: "loads", False: "does not", None: "no rule"}
    rows = [[e["engine"], said[e["loads"]], e["because"] or "", e["version"]] for e in engines]
    return table(rows, ["engine (by rules, not run)", "", "because", "rules of"])
