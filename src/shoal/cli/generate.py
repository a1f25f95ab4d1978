"""shoal generate: let a model write, with a plan running on it or not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from shoal.cli import options
from shoal.cli._places import require_file_places
from shoal.cli._shared import emit, emit_config, loading, open_model, progress_bars, unused
from shoal.errors import UsageError


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(help="What to answer or to continue.", show_default=False)],
    plan: options.PlanText = None,
    policy: options.PolicyText = None,
    kv_cache: options.KVCache = None,
    trace: Annotated[bool, typer.Option("--trace", help="Colour each token by the layers it took.")] = False,
    trace_page: Annotated[
        Path | None, typer.Option("--trace-page", help="Write a page on which each token is shaded by its depth.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens at most.")] = 128,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of taking the likeliest token.")] = False,
    temperature: Annotated[float, typer.Option("--temperature", min=0.01, help="With --sample.")] = 1.0,
    chat: options.Chat = None,
    speculate: Annotated[
        str | None,
        typer.Option("--speculate", help='Lossless draft: auto, exit:8, skip:"0-11,14-29", lookup (shoal ls drafts).'),
    ] = None,
    draft_length: Annotated[int, typer.Option("--draft-length", min=1, help="Tokens drafted at most.")] = 4,
    graph: options.GraphNames = None,
    fast: Annotated[bool, typer.Option("--fast", help="Compile the layers first; for many tokens.")] = False,
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
    """Print what the model writes, token by token."""
    if not sample:
        unused("the likeliest token is taken without --sample", "temperature")
    if speculate is None:
        unused("no --speculate is given", "draft_length")
    elif speculate == "auto":
        unused("--speculate auto chooses it", "draft_length")
    if dry_run:
        emit_config(as_json=json_)
        return
    if fast and (policy, speculate) != (None, None):
        raise UsageError("--fast is for plans that decide nothing; leave out --policy and --speculate", code="U567")
    if graph and (speculate is not None or policy is not None):
        raise UsageError("--graph is for plans that decide nothing; leave out --policy and --speculate", code="U662")
    if speculate is not None and policy is not None:
        raise UsageError(
            "--policy changes what the model writes and --speculate must not; give one of them", code="U620"
        )
    from shoal.api.generate import generate as run
    from shoal.api.kv_cache import refuse_beside_kv_cache
    from shoal.cli._trace import Painter, require_policy

    refuse_beside_kv_cache(kv_cache, policy=policy is not None, speculate=speculate is not None, fast=fast)
    require_policy(policy, trace or trace_page is not None)
    require_file_places(trace_page)
    painter = Painter() if trace and not json_ else None
    with progress_bars(quiet):
        loaded, chosen, weights = open_model(
            model, plan, **loading(device, dtype, trust_remote_code, adapter=adapter, device_map=device_map)
        )
    if speculate is not None:
        from shoal.cli.tune_draft import speak

        speak(loaded, prompt, chosen, speculate, json_, quiet, length=draft_length, max_new_tokens=max_new_tokens,
              sample=sample, temperature=temperature, chat=chat, seed=seed)  # fmt: skip
        return
    answer = run(
        loaded,
        prompt,
        plan=chosen,
        weights=weights,
        policy=policy,
        kv_cache=kv_cache,
        max_new_tokens=max_new_tokens,
        sample=sample,
        temperature=temperature,
        chat=chat,
        seed=seed,
        fast=fast,
        graphs=graph or (),
        on_text=None if json_ or painter else lambda piece: typer.echo(piece, nl=False),
        on_token=painter,
    )
    if trace_page is not None and answer.trace is not None:
        from shoal.api.depths import publish_depth

        title = f"Depth of each token, {loaded.source}"
        publish_depth(trace_page, answer.trace, prompt=prompt, policy=str(policy), title=title)
    if painter is not None:
        painter.legend()
    said = [_depth(answer.trace)] if answer.trace is not None else []
    said += [answer.graph] if answer.graph is not None else []
    emit(answer.to_dict(), "".join(f"\n{line}" for line in said), as_json=json_)


def _depth(trace: dict[str, Any]) -> str:
    """One line about what the policy did; the prompt's tokens are not in the mean."""
    counts, layers = trace["counts"], [one["layers"] for one in trace["written"]]
    said = f"{sum(layers) / max(1, len(layers)):.1f} of {trace['layers']:g} layers per token written"
    if counts["heads"]:
        said += f", {counts['heads']} looks through the head"
    return said + (f", {counts['simulated']:g} layer runs simulated" if counts["simulated"] else "")
