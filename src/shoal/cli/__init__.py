"""The command line: one file a verb; heavy imports happen inside the verb that needs them."""

from __future__ import annotations

import typer

from shoal import __version__
from shoal.cli._shared import guarded
from shoal.cli.bench import bench
from shoal.cli.calibrate import calibrate
from shoal.cli.compare import compare
from shoal.cli.convert import convert
from shoal.cli.diff import diff
from shoal.cli.doctor import doctor
from shoal.cli.evaluate import evaluate
from shoal.cli.fit_exits import fit_exits
from shoal.cli.fuse import fuse
from shoal.cli.generate import generate
from shoal.cli.heal import heal
from shoal.cli.inspect import inspect
from shoal.cli.ls import ls
from shoal.cli.measure import measure
from shoal.cli.prune import prune
from shoal.cli.push import push
from shoal.cli.serve import serve
from shoal.cli.show import show
from shoal.cli.tune_draft import tune_draft
from shoal.cli.verify import verify
from shoal.cli.write import write

VERBS = (
    inspect, measure, prune, fuse, heal, compare, evaluate, bench, generate, fit_exits, calibrate, tune_draft, serve,
    write, verify, push, doctor, show, diff, convert, ls,
)  # fmt: skip

app = typer.Typer(
    name="shoal",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Shoal makes Transformers shallower: measure layers, remove them, prove and write the result.",
    epilog="MODEL is a hub id, a folder, a .gguf file or smollm2 (built in). Layers are 0-based base layers, always.",
)
for verb in VERBS:
    app.command(verb.__name__.replace("_", "-"))(guarded(verb))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"shoal {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Options of shoal itself."""


def main() -> None:
    """The console script."""
    app(prog_name="shoal")
