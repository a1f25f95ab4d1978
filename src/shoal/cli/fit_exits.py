"""shoal fit-exits: lenses with probes, decisions by cost, or a classifier for exits, fitted on text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from shoal.cli import options
from shoal.cli._places import require_plan_place
from shoal.cli._shared import emit, emit_config, loading, open_model, progress_bars, table
from shoal.errors import UsageError


def fit_exits(
    model: options.Model,
    policy: Annotated[
        str, typer.Option("--policy", help="exit with its places and fill: exit:layers=12-28,fill=defer.")
    ] = "exit",
    what: Annotated[
        Literal["lens", "leave-or-stay", "adainfer"],
        typer.Option(
            "--what",
            help="A lens in front of the head and a probe for each exit; a lens and a decision by cost; or one "
            "classifier.",
        ),
    ] = "lens",
    tradeoff: Annotated[
        float | None,
        typer.Option("--tradeoff", help="Leave-or-stay: weight of the agreement against layers, from 0 to 1 (0.5)."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Write the plan with its exits and lenses into this folder.")
    ] = None,
    plan: options.PlanText = None,
    data: options.DataSource = "builtin",
    text_key: options.TextKey = None,
    chat_template: options.ChatTemplate = None,
    length: options.Length = 128,
    limit: options.Limit = 256,
    batch: options.Batch = 1,
    seed: options.Seed = 0,
    adapter: options.AdapterFolder = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    dtype: options.Dtype = None,
    trust_remote_code: options.Trust = False,
    json_: options.Json = False,
    quiet: options.Quiet = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
) -> None:
    """Fit what exits need: lenses in front of the head, probes or a decision by cost, or the classifier of adainfer."""
    if dry_run:
        emit_config(as_json=json_)
        return
    if what == "adainfer" and output is not None:
        raise UsageError(
            "the classifier of adainfer is one line, which is printed and given to --policy; leave out --output",
            code="U626",
        )
    require_plan_place(output)
    from shoal.api.fit_exits import FittedExits
    from shoal.api.fit_exits import fit_exits as run
    from shoal.data.spelled import keyed
    from shoal.executing.weights import save_planned

    text = keyed(data, text_key, chat_template)
    with progress_bars(quiet) as progress:
        loaded, chosen, weights = open_model(
            model, plan, **loading(device, dtype, trust_remote_code, adapter=adapter, device_map=device_map)
        )
        found = run(
            loaded,
            policy,
            what=what,
            tradeoff=tradeoff,
            plan=chosen,
            weights=weights,
            data=text,
            length=length,
            limit=limit,
            batch=batch,
            seed=seed,
            progress=progress,
        )
    if not isinstance(found, FittedExits):
        emit(found.to_dict(), _classifier(found), as_json=json_)
        return
    if output is not None:
        save_planned(found.plan, output, found.weights)
    emit(found.to_dict() | {"output": None if output is None else str(output)}, _lenses(found, output), as_json=json_)


def _lenses(found: Any, output: Path | None) -> str:
    head = [
        "exit behind", "agreement, own head", "with lens", "loss rise, own head", "with lens", "ranked by probability",
        "by probe",
    ]  # fmt: skip
    names = (
        "layer", "agreement_own", "agreement_lens", "rise_own", "rise_lens", "ranked_probability", "ranked_probe",
    )  # fmt: skip
    better = sum(row["agreement_lens"] > row["agreement_own"] for row in found.rows)
    said = [
        table([[row[name] for name in names] for row in found.rows], head),
        f"on {found.sequences} sequences held out, the lens agrees more often with the whole plan at {better} of "
        f"{len(found.rows)} exits",
    ]
    decided = found.decided
    if decided is not None:
        said.append(
            f"leaving as it decides: agreement {decided['agreement']:.3f} at {decided['layers']:.2f} layers, cost "
            f"{decided['cost']:.4f} at a tradeoff of {decided['tradeoff']:g}"
        )
    if output is not None:
        sure = 0.9 if decided is None else 0.5
        said.append(f"the plan: {output} (--plan {output} --policy exit:confidence={sure:g},by=probe)")
    return "\n".join(said)


def _classifier(found: Any) -> str:
    return (
        f"--policy {found.policy}\n{found.accuracy:.1%} of {found.exits} exits told right; {found.share:.1%} of them "
        "agree with the whole model"
    )
