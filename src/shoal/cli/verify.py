"""shoal verify: is a written folder what its plan says?"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from shoal.cli import options
from shoal.cli._shared import emit, loading, progress_bars, table


def verify(
    folder: Annotated[str, typer.Argument(help="A folder that shoal wrote.", show_default=False)],
    base: Annotated[
        str | None, typer.Option("--base", help="The base model (default: the one the plan names).")
    ] = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    dtype: options.Dtype = None,
    trust_remote_code: options.Trust = False,
    json_: options.Json = False,
    quiet: options.Quiet = False,
    config: options.Config = None,
) -> None:
    """Load the folder in a fresh process without Shoal and compare it with the live plan; exit code 1 if it differs."""
    from shoal.models.load import load
    from shoal.writing.folder import verify as run

    with progress_bars(quiet) as progress:
        how = loading(device, dtype, trust_remote_code, device_map=device_map)
        loaded = None if base is None else load(base, **how)
        proof = run(folder, base=loaded, progress=progress, **how)
    emit(proof.to_dict(), _text(proof), as_json=json_)
    if not proof.passed:
        raise typer.Exit(1)


def _text(proof: Any) -> str:
    rows = [["ok" if c.passed else "FAILED", c.name, str(c.value), str(c.limit), c.how] for c in proof.checks]
    return table(rows, ["", "check", "found", "limit", "how"]) + f"\n{'proved' if proof.passed else 'NOT proved'}"
