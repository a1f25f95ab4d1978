"""shoal bench: wall clock of prefill and decode, dense and pruned in turn."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from shoal.cli import options
from shoal.cli._shared import emit, emit_config, loading, open_model, progress_bars, table, unused
from shoal.errors import UsageError


def bench(
    model: options.Model,
    plan: options.PlanText = None,
    against: Annotated[
        str | None, typer.Option("--against", help="The dense model, when MODEL is a pruned one.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option("--policy", help="Time a policy on prompts: exit:confidence=0.9 (shoal ls policies), or a file."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="With --policy: a prompt in each line, or .jsonl (default: six built in)."),
    ] = None,
    graph: options.GraphNames = None,
    predict: Annotated[
        bool, typer.Option("--predict", help="Say beside it what the bytes that the plan moves predict here.")
    ] = False,
    prompt: Annotated[
        int, typer.Option("--prompt", min=1, help="Tokens of the prompt (random ones, without --policy).")
    ] = 512,
    new: Annotated[int, typer.Option("--new", min=1, help="Tokens to decode.")] = 32,
    pairs: Annotated[int, typer.Option("--pairs", min=1, help="Rounds; in each both sides run once.")] = 5,
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
    """Time prefill and decode apart, paired in one run, with the memory that weights and KV hold."""
    if policy is not None:
        unused("a policy is timed on texts, greedily", "prompt", "seed")
    if plan is None or policy is not None:
        unused("bytes predict the time of a plan that decides nothing", "predict")
    if dry_run:
        emit_config(as_json=json_)
        return
    from shoal.api.assess import bench as run

    if policy is not None or prompts is not None:
        if graph:
            raise UsageError("--graph is for plans that decide nothing; leave out --policy", code="U662")
        _with_policy(model, plan, policy, prompts, against, batch, new, pairs, json_, quiet,
                     loading(device, dtype, trust_remote_code, adapter=adapter, device_map=device_map))  # fmt: skip
        return
    how = loading(device, dtype, trust_remote_code, device_map=device_map)
    with progress_bars(quiet) as progress:
        loaded, chosen, weights = open_model(
            model, plan, **loading(device, dtype, trust_remote_code, adapter=adapter, device_map=device_map)
        )
        found = run(
            loaded,
            plan=chosen,
            weights=weights,
            against=against,
            graphs=graph or (),
            predict=predict,
            prompt=prompt,
            new=new,
            batch=batch,
            pairs=pairs,
            seed=seed,
            progress=progress,
            **(how if against is not None else {}),
        )
    emit(found.to_dict(), _text(found), as_json=json_)


def _with_policy(
    model: str,
    plan: str | None,
    policy: str | None,
    prompts: Path | None,
    against: str | None,
    batch: int,
    new: int,
    pairs: int,
    as_json: bool,
    quiet: bool,
    how: dict[str, Any],
) -> None:
    from shoal.api.bench_policy import bench_policy
    from shoal.api.prompts import read_prompts

    if policy is None or against is not None or batch != 1:
        raise UsageError(
            "a policy is timed against its own plan, one prompt after the other; give --policy for --prompts, and "
            "leave out --against and --batch",
            code="U624",
        )
    texts = None if prompts is None else read_prompts(prompts)
    with progress_bars(quiet) as progress:
        loaded, chosen, weights = open_model(model, plan, **how)
        found = bench_policy(
            loaded, policy, plan=chosen, weights=weights, prompts=texts, new=new, pairs=pairs, progress=progress
        )
    emit(found.to_dict(), _decided(found), as_json=as_json)


def _decided(found: Any) -> str:
    rows = [
        ["whole plan", 1000 * found.whole.median, found.layers, 0.0, 1.0, 1.0],
        [found.policy, 1000 * found.decided.median, found.depth, found.looks, found.ratio.median,
         found.ratio_cpu.median],
    ]  # fmt: skip
    head = ["", "ms/token", "layers", "looks", "time / whole", "CPU time / whole"]
    said = [
        f"{found.device}, {found.dtype}, {found.threads} threads, {found.prompts} prompts x {found.new} tokens, "
        f"{found.pairs} rounds, batch 1",
        table(rows, head),
        f"time / whole over rounds: {found.ratio.low:.3f} to {found.ratio.high:.3f}; {found.same} of {found.prompts} "
        "texts are those of the whole plan",
    ]
    if found.simulated:
        said.append(f"{found.simulated:.1f} layer runs a token are simulated: they ran for other tokens")
    return "\n".join(said)


def _text(found: Any) -> str:
    s = found.speed
    rows = []
    for v in s.variants:
        held = found.memory[v.name]
        rows.append(
            [
                v.name,
                1000 * v.prefill.median,
                1000 * v.decode.median,
                v.prefill_ratio.median,
                v.decode_ratio.median,
                held.weight_bytes / 2**20,
                held.kv_bytes / 2**20,
            ]
        )
    work = f"batch {s.batch}, prompt {s.prompt}, {s.new} decoded, {s.pairs} rounds"
    head = f"{s.device}, {s.dtype}, {s.threads} threads, {work}\n"
    head += "" if found.graph is None else f"{found.graph.describe()}\n"
    if found.predicted is not None:
        far, near = found.predicted["share"], found.predicted["share_if_cached"]
        head += f"by the bytes that it moves the plan should take {far:.3f} of the dense decode time"
        head += f", {near:.3f} if the processor's cache is all its own\n"
    return head + table(
        rows, ["", "prefill ms", "ms/token", "prefill / dense", "decode / dense", "weights MiB", "KV MiB"]
    )
