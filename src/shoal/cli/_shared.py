"""What all verbs share: errors as one sentence, progress with time left, results as text or JSON."""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from shoal.cli._errors import in_words, refuse_nul, shortened
from shoal.cli.options import running
from shoal.errors import ShoalNote, ShoalWarning, UsageError, tell_unused
from shoal.user_files import forget_used, used_files

Progress = Callable[[int, int, str], None]


def guarded(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Run a verb so that a user's mistake is one sentence on stderr and exit code 1, and Ctrl-C is exit code 130."""

    @functools.wraps(verb)
    def run(*args: Any, **kwargs: Any) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        forget_used()
        try:
            refuse_nul(kwargs)
            with _notes_in_words():
                verb(*args, **kwargs)
        except BrokenPipeError:  # the reader of a pipe left; nothing to say
            sys.stderr.close()
            raise typer.Exit(0) from None
        except KeyboardInterrupt:
            typer.echo("shoal: stopped; nothing unfinished was left behind", err=True)
            raise typer.Exit(130) from None
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:
            said = in_words(error)
            if said is None:
                raise
            typer.echo(f"shoal: {shortened(str(said))}", err=True)
            raise typer.Exit(1) from None

    return run


@contextmanager
def _notes_in_words() -> Iterator[None]:
    """Each `ShoalNote` is a line on stderr, once; one of what had no effect when the verb has done its work, and none
    beside an error. Other warnings are as they were."""
    with warnings.catch_warnings():
        show = warnings.showwarning
        said: set[str] = set()
        later: list[str] = []

        def say(message: Any, category: Any, *rest: Any, **more: Any) -> None:
            if not issubclass(category, ShoalNote):
                show(message, category, *rest, **more)
            elif str(message) not in said:
                said.add(str(message))
                if isinstance(message, ShoalWarning):
                    later.append(str(message))
                else:
                    typer.echo(f"shoal: note: {message}", err=True)

        warnings.simplefilter("always", ShoalNote)
        warnings.showwarning = say
        yield
    for text in later:
        typer.echo(f"shoal: note: {text}", err=True)


def is_typed(name: str) -> bool:
    """Whether that option of the running verb, which must have --config, was typed or stands in a config file."""
    source = running.get().get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def unused(why: str, *names: str) -> None:
    """Say of those options of the running verb, which must have --config, that were typed or stand in a config file
    that they have no effect."""
    for name in names:
        if is_typed(name):
            tell_unused(f"--{name.rstrip('_').replace('_', '-')}", why)


def resolved() -> dict[str, Any]:
    """The options of the running verb as a config file would hold them."""
    context = running.get()
    plain = {}
    for parameter in context.command.params:  # in the order of --help, whatever order was typed
        key, value = str(parameter.name), context.params.get(str(parameter.name))
        if key in ("config", "dry_run", "json_", "quiet") or value in (None, [], ()):
            continue
        plain[key] = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
    return {"verb": context.info_name, **plain}


def config_text() -> str:
    """`resolved()` as YAML."""
    import yaml

    return yaml.safe_dump(resolved(), sort_keys=False, allow_unicode=True)


def emit_config(*, as_json: bool) -> None:
    """The answer to --dry-run of a verb that can only say what it was asked."""
    emit({"config": config_text()}, config_text(), as_json=as_json)


def emit(data: Any, text: str, *, as_json: bool) -> None:
    """Print the result: one JSON object (NaN and infinity as null, which JSON can say), or the text.

    The object names the user's own Python files that took part.
    """
    if isinstance(data, dict) and (files := used_files()):
        data = {**data, "files": list(files)}
    typer.echo(json.dumps(_finite(data), ensure_ascii=False, indent=1) if as_json else text.rstrip("\n"))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


@contextmanager
def progress_bars(quiet: bool) -> Iterator[Progress | None]:
    """A bar for each stage with rate and time left on stderr; silent with -q and when stderr is no terminal."""
    from shoal.models.compat import hide_own_bars

    hide_own_bars()
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def progress(done: int, total: int, stage: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield progress


def table(rows: list[list[Any]], head: list[str]) -> str:
    """Plain columns: text left, numbers right."""
    cells = [head, *[[_cell(value) for value in row] for row in rows]]
    numeric = [all(isinstance(row[i], int | float) or row[i] is None for row in rows) for i in range(len(head))]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(row, widths, numeric, strict=True)
        )
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def loading(
    device: str | None,
    dtype: str | None,
    trust_remote_code: bool = False,
    stream: bool = False,
    adapter: Path | None = None,
    device_map: str | None = None,
) -> dict[str, Any]:
    """Options for `shoal.load`."""
    asked = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    others = {"stream": stream or None, "adapter": adapter, "device_map": device_map}
    return asked | {name: value for name, value in others.items() if value is not None}


def read_plan(text: str | None, spec: Any, source: str, *, legal: bool = True) -> Any:
    """A Plan from notation, a plan.json or a folder; None for None. With `legal` it must be so for `spec` (P1xx)."""
    from shoal.plan import Plan, given_plan, is_plan_file, require

    if text is None:
        return None
    plan = given_plan(Path(text) if is_plan_file(text) else text, Plan.identity(spec, source=source))
    shapes = {name: tuple(tensor.shape) for name, tensor in read_weights(text).items()} if legal else {}
    return require(plan, spec, shapes) if legal else plan


def read_weights(text: str | None) -> dict[str, Any]:
    """The tensors that lie beside the plan of a file or folder; none for notation. Raises U550 or U551."""
    from shoal.plan import is_plan_file

    if text is None or not is_plan_file(text):
        return {}
    from shoal.executing.weights import load_weights

    return load_weights(text)


def open_model(model: str, plan: str | None, **options: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The loaded model, the plan, read and checked for it (None when there is none), and the plan's own weights."""
    from shoal.models.load import load

    loaded = load(model, **options)
    chosen = None if plan is None else read_plan(plan, loaded.opened.spec, loaded.source)
    return loaded, chosen, read_weights(plan)


def tell_fits(then: tuple[dict[str, Any], ...], quiet: bool) -> None:
    """How well each stand-in fits, on stderr, before anything is written."""
    for made in then if not quiet else ():
        rows = [
            [f["site"], f["drop"], f["stand_in"], f["held_drop"], f["held_stand_in"], f["note"]] for f in made["fits"]
        ]
        head = ["", "error dropped", "with stand-in", "dropped, held out", "with stand-in", ""]
        typer.echo("\n".join([made["transform"], *([table(rows, head)] if rows else []), *made["notes"]]), err=True)


def need(value: Any, message: str) -> Any:
    """`value`, or U523 with the message when it is missing."""
    if value is None:
        raise UsageError(message, code="U523")
    return value
