"""shoal calibrate: thresholds of exits that keep a promise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from shoal.cli import options
from shoal.cli._places import require_file_places
from shoal.cli._shared import emit, emit_config, loading, open_model, progress_bars, table, unused


def calibrate(
    model: options.Model,
    policy: Annotated[
        str, typer.Option("--policy", help="exit with its options, without a threshold: exit:layers=12-20,by=margin.")
    ] = "exit",
    target: Annotated[
        list[str] | None,
        typer.Option("--target", help="agreement=0.95, or loss=0.1 (nats); once for each level. The first is used."),
    ] = None,
    tradeoff: Annotated[
        list[float] | None,
        typer.Option(
            "--tradeoff",
            help="And a level without a promise: thresholds that weigh disagreement by this share of 1, layers by the "
            "rest; again for more.",
        ),
    ] = None,
    confidence: Annotated[float, typer.Option("--confidence", help="Probability with which each promise holds.")] = 0.9,
    output: Annotated[Path | None, typer.Option("--output", help="Write policy.json here; --policy takes it.")] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Write a page with the curve and the table.")] = None,
    plan: options.PlanText = None,
    guarantee: Annotated[
        Literal["fixed-sequence", "conformal"],
        typer.Option("--guarantee", help="Learn then Test with confidence, or an average by conformal risk control."),
    ] = "fixed-sequence",
    bound: Annotated[
        Literal["hoeffding-bentkus", "betting"], typer.Option("--bound", help="betting: tighter for alike sequences.")
    ] = "hoeffding-bentkus",
    check: Annotated[
        Literal["auto", "recorded", "live"],
        typer.Option("--check", help="Test on recorded exits or by running; auto: runs for every fill but defer."),
    ] = "auto",
    cap: Annotated[float, typer.Option("--cap", min=0.001, help="Nats at which a sequence's rise is cut off.")] = 1.0,
    count_heads: Annotated[
        bool, typer.Option("--count-heads", help="Count looks through the head as layers when choosing.")
    ] = False,
    features: Annotated[
        Path | None, typer.Option("--features", help="Recorded exits: read if there, else written (safetensors).")
    ] = None,
    data: options.DataSource = "builtin",
    text_key: options.TextKey = None,
    chat_template: options.ChatTemplate = None,
    length: options.Length = 128,
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Tokens in front that count as prompt.")] = 32,
    limit: options.Limit = 200,
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
    """Choose exit thresholds that keep a promised agreement or loss, and print what others would cost."""
    if guarantee == "conformal":
        unused("--guarantee conformal promises an average", "bound", "confidence")
    if not any(one.startswith("loss") for one in target or []):
        unused("no --target is a loss", "cap")
    if dry_run:
        emit_config(as_json=json_)
        return
    require_file_places(output, report, features)
    from shoal.api.calibrate import calibrate as run
    from shoal.api.calibrate import publish
    from shoal.data.spelled import keyed

    text = keyed(data, text_key, chat_template)
    with progress_bars(quiet) as progress:
        loaded, chosen, weights = open_model(
            model, plan, **loading(device, dtype, trust_remote_code, adapter=adapter, device_map=device_map)
        )
        found = run(
            loaded,
            policy,
            plan=chosen,
            weights=weights,
            targets=target or ["agreement=0.95"],
            tradeoffs=tradeoff or (),
            confidence=confidence,
            guarantee=guarantee,
            bound=bound,
            check=check,
            cap=cap,
            count_heads=count_heads,
            features=features,
            data=text,
            length=length,
            prompt=prompt,
            limit=limit,
            batch=batch,
            seed=seed,
            progress=progress,
        )
    if report is not None:
        publish(found, report, title=f"Calibrated exits of {loaded.source}")
    if output is not None:
        found.file.save(output)
    emit(found.to_dict(), _text(found, output, report), as_json=json_)


def _text(found: Any, output: Path | None, report: Path | None) -> str:
    kind = found.promises[0].target.partition("=")[0]
    head = ["setting", "layers", "with looks", kind, "+-", "thresholds"]
    rows = [
        [r["setting"], r["layers"], r["layers_with_looks"], r[kind], r["error"], _typed(r["thresholds"])]
        for r in (*found.table, *found.tradeoffs)
    ]
    said = [one.sentence() for one in found.promises]
    places = [f"the policy: {output}"] if output else []
    places += [f"the page: {report}"] if report else []
    return "\n".join([table(rows, head), "", *said, "", *found.notes, *places])


def _typed(thresholds: dict[str, float]) -> str:
    return "+".join(f"{layer}:{value:.4g}" for layer, value in thresholds.items()) or "nobody leaves"
