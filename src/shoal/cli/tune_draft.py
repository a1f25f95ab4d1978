"""shoal tune-draft: is there a draft that makes this model write faster on these prompts?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from shoal.cli import options
from shoal.cli._shared import emit, emit_config, loading, open_model, progress_bars, table
from shoal.errors import UsageError


def tune_draft(
    model: options.Model,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="A prompt in each line, or a .jsonl file (default: six built in).")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=4, help="Tokens to write for each.")] = 64,
    finalists: Annotated[int, typer.Option("--finalists", min=1, help="Drafts to generate with, best first.")] = 3,
    pairs: Annotated[int, typer.Option("--pairs", min=1, help="Rounds; in each both sides write every text.")] = 3,
    also: Annotated[
        list[str] | None,
        typer.Option("--also", help="A draft to generate with whatever is foreseen: swift, clasp, ..."),
    ] = None,
    chat: options.Chat = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    dtype: options.Dtype = None,
    trust_remote_code: options.Trust = False,
    json_: options.Json = False,
    quiet: options.Quiet = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
) -> None:
    """Find the fastest lossless draft on your prompts, or learn that plain decoding is faster."""
    if dry_run:
        emit_config(as_json=json_)
        return
    from shoal.api.prompts import read_prompts
    from shoal.api.speculate import tune_draft as run

    texts = None if prompts is None else read_prompts(prompts)
    with progress_bars(quiet) as progress:
        loaded, _, _ = open_model(model, None, **loading(device, dtype, trust_remote_code, device_map=device_map))
        found = run(
            loaded,
            texts,
            new=max_new_tokens,
            finalists=finalists,
            pairs=pairs,
            also=tuple(also or ()),
            chat=chat,
            progress=progress,
        )
    emit(found.to_dict(), _text(found), as_json=json_)


def _text(found: Any) -> str:
    head = (
        f"{found.device}, {found.dtype}, {found.threads} threads, {found.prompts} prompts x {found.new} tokens; "
        f"plain decoding: {found.plain_tokens_per_second:.2f} tokens/s\n"
    )
    verified = [
        [v.draft, v.length, v.foreseen, v.speedup, v.worst, v.acceptance, v.tokens_per_round, v.layers_per_token]
        for v in found.verified
    ]
    columns = ["draft", "length", "foreseen", "speed-up", "worst", "accepted", "tokens/round", "layers/token"]
    return "\n".join([head + table(verified, columns), *found.notes, found.verdict])


def speak(loaded: Any, prompt: str, plan: Any, draft: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """`shoal generate --speculate`: the text, and on stderr what drafting did for it. Raises U620 beside a plan."""
    from shoal.api.drafted import generate_drafted

    if plan is not None:
        raise UsageError(
            "--plan changes what the model writes and --speculate must not; give one of them, or write the pruned "
            "model and speculate with that",
            code="U620",
        )
    answer = generate_drafted(
        loaded,
        prompt,
        draft,
        on_text=None if as_json else lambda piece: typer.echo(piece, nl=False),
        on_advice=None if quiet else lambda advice: typer.echo(advice, err=True),
        **options,
    )
    emit(answer.to_dict(), "", as_json=as_json)
    if answer.stats is not None and not quiet:
        typer.echo(f"{answer.draft}: {_told(answer.stats)}", err=True)


def _told(stats: dict[str, Any]) -> str:
    accepted = "nothing was drafted" if stats["acceptance"] is None else f"{stats['acceptance']:.0%} accepted"
    speed = "" if stats["tokens_per_second"] is None else f", {stats['tokens_per_second']:.2f} tokens/s"
    rounds = "" if stats["tokens_per_round"] is None else f", {stats['tokens_per_round']:.2f} tokens a verification"
    return f"{accepted}{rounds}{speed}"
