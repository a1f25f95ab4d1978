"""shoal heal: train what a plan left, and write it when it is better."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from shoal.cli import options
from shoal.cli._places import require_plan_place
from shoal.cli._shared import config_text, emit, emit_config, loading, need, open_model, progress_bars, table, unused
from shoal.errors import UsageError


def heal(
    model: options.Model,
    plan: options.PlanText = None,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="NAME or NAME:key=value,key=value; see shoal ls recipes.")
    ] = "logit-kd",
    settings: Annotated[
        list[str] | None, typer.Option("--set", "-o", help="An option of the recipe, as name=value.")
    ] = None,
    term: Annotated[
        list[str] | None,
        typer.Option("--term", help="In place of a recipe: what is minimised (shoal ls terms); again for a sum."),
    ] = None,
    learn: Annotated[
        list[str] | None, typer.Option("--learn", help="And what moves (shoal ls learners); again for more.")
    ] = None,
    tokens: options.Tokens = None,
    minutes: options.Minutes = None,
    data: options.DataSource = "builtin",
    text_key: options.TextKey = None,
    chat_template: options.ChatTemplate = None,
    watch: options.Watch = "builtin",
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens in a window.")] = 256,
    held: Annotated[int, typer.Option("--held", min=1, help="Windows of the text that are never trained on.")] = 8,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Windows in a forward.")] = 2,
    accumulate: Annotated[int, typer.Option("--accumulate", min=1, help="Forwards in a step.")] = 1,
    seed: options.Seed = 0,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="Another model of the same vocabulary (default: MODEL whole).")
    ] = None,
    stack: options.StackName = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder to write; its checkpoints are in OUTPUT.healing meanwhile.")
    ] = None,
    save_plan: options.SavePlan = None,
    overwrite: options.Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped or killed.")] = False,
    anyway: Annotated[bool, typer.Option("--anyway", help="Write a result that is no better than its start, too.")] = (
        False
    ),
    save_every: Annotated[float, typer.Option("--save-every", min=0, help="Seconds between checkpoints.")] = 60.0,
    track: options.Track = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    dtype: options.Dtype = None,
    trust_remote_code: options.Trust = False,
    json_: options.Json = False,
    quiet: options.Quiet = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
) -> None:
    """Train what --plan left of MODEL, by distillation from the whole model or on labels, and write the result, proved,
    when held-out text likes it better."""
    from shoal.api.heal import recipe_of, trains_whole
    from shoal.registry import get
    from shoal.spelling import read

    asked = read(recipe)
    own = get("recipes", asked.name).typed([*(settings or []), *asked.pairs])
    _, stages = recipe_of(asked.name, own, term or [], learn or [])
    if not trains_whole(stages):
        need(plan, "say what is healed: --plan 0-11,14-29 or --plan plan.json")
    amount = None if tokens is None else tokens_of(tokens)
    if term or learn:
        unused("--term and --learn say what is done", "recipe", "settings")
    if output is None:
        unused("nothing is written without --output", "overwrite", "anyway", "resume", "save_every")
    if dry_run:
        emit_config(as_json=json_)
        return
    from shoal.api.heal import heal as run
    from shoal.data.spelled import keyed, templated
    from shoal.healing.processes import Processes
    from shoal.plan import Plan
    from shoal.writing.folder import refuse_output

    require_plan_place(save_plan)
    if output is not None:
        refuse_output(output, overwrite=overwrite)
    text, second = keyed(data, text_key, chat_template), templated(watch, chat_template)

    group = Processes.join(device)
    quiet = quiet or not group.first
    say = saying(quiet)
    with progress_bars(quiet) as progress:
        loaded, chosen, weights = open_model(
            model, plan, **loading(device, dtype, trust_remote_code, device_map=device_map)
        )
        chosen = Plan.identity(loaded.opened.spec, source=loaded.source) if chosen is None else chosen
        folder = None if output is None else _folder(output, loaded, chosen, weights, say, stages)
        with stopping() as stop:
            healed = run(
                loaded, chosen, asked.name, settings=own, weights=weights, terms=term or [], learn=learn or [],
                tokens=amount, minutes=minutes, teacher=teacher, data=text, watch=second, length=length, held=held,
                batch=batch, accumulate=accumulate, seed=seed, stack=stack, folder=folder, resume=resume,
                save_every=save_every, track=track or [], stop=stop, say=say, progress=progress,
            )  # fmt: skip
        Processes.leave()
        if not group.first:
            return
        if healed.stopped:
            tell_stopped(folder, "add --resume")
        written = _kept(
            healed, output, save_plan, overwrite=overwrite, anyway=anyway, config=config_text(), seed=seed,
            progress=progress,
        )  # fmt: skip
    emit(*_said(healed, written), as_json=json_)


def _folder(output: Path, loaded: Any, plan: Any, weights: Any, say: Any, stages: Any) -> Path:
    """Where the checkpoints are; says what the result will be, unless that depends on what gates learn."""
    from shoal.api.heal_publish import why_no_checkpoint
    from shoal.healing.run_folder import RunFolder
    from shoal.writing.output import final_path, require_apart

    require_apart(final_path(output), [] if loaded.folder is None else [loaded.folder])
    if not any(getattr(stage, "policy", "") for stage in stages):
        why = why_no_checkpoint(loaded, plan, weights)
        say("the result will be " + ("a stock checkpoint" if why is None else f"a plan with its tensors ({why})"))
    return RunFolder.beside(final_path(output))


def _kept(healed: Any, output: Path | None, save_plan: Path | None, **how: Any) -> Any:
    """What was written; the checkpoints are not needed any more then."""
    from shoal.api.heal_publish import publish_healed
    from shoal.executing.weights import save_planned

    if save_plan is not None:
        save_planned(healed.plan, save_plan, dict(healed.weights))
    if output is None:
        return None
    try:
        written = publish_healed(healed, output, **how)
    except UsageError as error:
        if error.code == "U640":  # the run is over, and there is nothing to go on to
            forget_checkpoints(output)
        raise
    forget_checkpoints(output)
    return written


def forget_checkpoints(output: Path) -> None:
    """What healing kept beside the output is not needed any more."""
    from shoal.healing.run_folder import RunFolder
    from shoal.writing.output import final_path

    RunFolder(RunFolder.beside(final_path(output))).remove()


def tokens_of(text: str) -> int:
    """200k, 1.5M, 30000 -> a number. Raises U673."""
    factor = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}.get(text.strip()[-1:].lower(), 1)
    number = text.strip()[:-1] if factor != 1 else text.strip()
    try:
        found = float(number) * factor
    except ValueError:
        found = -1.0
    if not 0 <= found < 1e15:
        raise UsageError(f"{text!r:.40} is no number of tokens; write --tokens 200k or --tokens 1.5M", code="U673")
    return round(found)


@contextmanager
def stopping() -> Iterator[Any]:
    """The first Ctrl-C (or SIGTERM) inside ends the run behind the step or evaluation that it is in, and what was
    reached is kept; a second one stops at once."""
    asked: list[int] = []

    def note(number: int, _: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        typer.echo("shoal: stopping behind this step; once more stops at once", err=True)

    before: dict[int, Any] = {}
    for number in map(int, (signal.SIGINT, signal.SIGTERM)):
        try:
            before[number] = signal.signal(number, note)
        except ValueError:  # not in the main thread: whoever runs this stops it otherwise
            break
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def saying(quiet: bool) -> Callable[[str], None]:
    """Says a line on stderr, or nothing."""
    return lambda line: None if quiet else typer.echo(line, err=True)


def tell_stopped(folder: Path | None, how: str) -> None:
    """Say what a stopped run keeps, and stop."""
    kept = "nothing is kept without --output" if folder is None else f"{folder} keeps what was reached; {how}"
    typer.echo(f"shoal: {kept}", err=True)
    raise KeyboardInterrupt


def tell_healed(healed: Any, quiet: bool) -> None:
    """What healing did, on stderr."""
    if not quiet:
        typer.echo("\n".join(healed_lines(healed)), err=True)


def healed_lines(healed: Any) -> list[str]:
    """What healing did, as text."""
    gated = [] if not healed.policy else ["layers a token"]
    rows = [
        [name, text.dense.value, text.before.value, text.after.value, round(text.back, 3)]
        + [round(text.layers, 2) for _ in gated]
        for name, text in healed.texts.items()
    ]
    lines = [f"plan {healed.plan}   ({healed.recipe}, {healed.tokens:,} tokens in {healed.seconds:.0f} s)"]
    if rows:
        lines.append(table(rows, ["perplexity", "dense", "before", "healed", "back", *gated]))
    watched = healed.texts.get("watched")
    if watched is not None and watched.after.nll > watched.before.nll:
        lines.append("the second text got worse: what was learned is the training text")
    return lines


def _said(healed: Any, written: Any) -> tuple[dict[str, Any], str]:
    lines = healed_lines(healed)
    data = healed.to_dict()
    if written is None:
        return data, "\n".join(lines)
    place = getattr(written, "folder", written)
    data["output"] = str(place)
    if hasattr(written, "proof"):
        data["proof"] = written.proof.to_dict()
        policy = f"; run it with --policy {healed.policy}" if healed.policy else ""
        return data, "\n".join([*lines, f"proved and written to {place}: {written.params:,} parameters{policy}"])
    gates = f" --policy {place}/shoal/policy.json" if healed.policy else ""
    return data, "\n".join([*lines, f"written to {place}: a plan with its tensors, for --plan {place}{gates}"])
