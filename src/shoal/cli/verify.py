"""shoal verify: is a written folder what its plan says?"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from shoal.cli import options
from shoal.cli._shared import emit, loading, progress_bars, table
from shoal.errors import UsageError


def verify(
    folder: Annotated[str, typer.Argument(help="A folder that shoal wrote.", show_default=False)],
    base: Annotated[
        str | None, typer.Option("--base", help="The base model (default: the one the plan names).")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option("--engine", help="Run the folder under this engine (vllm) and compare it with transformers."),
    ] = None,
    engine_python: Annotated[
        str | None,
        typer.Option("--engine-python", help="The Python in whose environment the engine is (default: this one)."),
    ] = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    dtype: options.Dtype = None,
    trust_remote_code: options.Trust = False,
    json_: options.Json = False,
    quiet: options.Quiet = False,
    config: options.Config = None,
) -> None:
    """Load the folder in a fresh process without Shoal and compare it with the live plan; exit code 1 if it differs.
    With --engine vllm, compare what vLLM writes from the folder with what transformers does."""
    from shoal.models.load import load
    from shoal.writing.engine import verify_engine
    from shoal.writing.folder import verify as run

    if engine is None and engine_python is not None:
        raise UsageError("--engine-python is for --engine; give --engine vllm", code="U734")
    if engine is not None and (base or device or device_map or dtype or trust_remote_code):
        raise UsageError(
            "--engine compares the folder with itself under transformers, in float32; leave --base, --device, "
            "--device-map, --dtype and --trust-remote-code out",
            code="U735",
        )
    with progress_bars(quiet) as progress:
        how = loading(device, dtype, trust_remote_code, device_map=device_map)
        if engine is None:
            loaded = None if base is None else load(base, **how)
            proof = run(folder, base=loaded, progress=progress, **how)
        else:
            proof = verify_engine(folder, engine, python=engine_python, progress=progress)
    emit(proof.to_dict(), _text(proof), as_json=json_)
    if not proof.passed:
        raise typer.Exit(1)


def _text(proof: Any) -> str:
    rows = [["ok" if c.passed else "FAILED", c.name, str(c.value), str(c.limit), c.how] for c in proof.checks]
    return table(rows, ["", "check", "found", "limit", "how"]) + f"\n{'proved' if proof.passed else 'NOT proved'}"
