"""shoal inspect: what a model is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from shoal.cli import options
from shoal.cli._places import require_file_places
from shoal.cli._shared import emit, loading, progress_bars, table, unused


def inspect(
    model: options.Model,
    redundancy: Annotated[
        bool, typer.Option("--redundancy", help="Compare every two layers: weights, states, KV, attention maps.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="With --redundancy: the page with a heat map for each.")
    ] = None,
    data: options.DataSource = "builtin",
    length: options.Length = 128,
    limit: options.Limit = 8,
    batch: options.Batch = 1,
    stack: options.StackName = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    dtype: options.Dtype = None,
    trust_remote_code: options.Trust = False,
    json_: options.Json = False,
    quiet: options.Quiet = False,
    config: options.Config = None,
) -> None:
    """Show a model's stacks, layers, parts and KV, and where they come from if Shoal wrote it; no weight is loaded.

    With --redundancy it is loaded, and every two layers are compared on text.
    """
    if redundancy:
        _redundancy(
            model, output, json_, quiet, data=data, length=length, limit=limit, batch=batch, stack=stack,
            **loading(device, dtype, trust_remote_code, device_map=device_map),
        )  # fmt: skip
        return
    need_redundancy = ("output", "data", "length", "limit", "batch", "stack", "device", "device_map", "dtype")
    unused("layers are compared with --redundancy alone", *need_redundancy)
    from shoal.models.load import check_source
    from shoal.models.opened import open_model
    from shoal.models.quantised import described_quantisation, quantisation_settings
    from shoal.plan.lineage import KEY, read_lineages

    with progress_bars(quiet):
        checked = check_source(model, trust_remote_code=trust_remote_code)
        spec = open_model(checked.structure).spec
    depths = {stack.name: stack.depth for stack in spec.stacks}
    known = read_lineages(getattr(checked.config, KEY, None), depths)
    described, text = spec.to_dict(), _text(spec)
    if (settings := quantisation_settings(checked.config)) is not None:
        described |= {"quantised": described_quantisation(settings)}
        first, _, rest = text.partition("\n")
        text = f"{first}, quantised ({described['quantised']}), counted as it was before\n{rest}"
    if known is not None:
        described |= {"lineage": known.to_dict()}
        text += f"\n{known.describe()}"
    emit(described, text, as_json=json_)


def _redundancy(model: str, output: Path | None, as_json: bool, quiet: bool, **options_: Any) -> None:
    from shoal.api.redundancy import publish
    from shoal.api.redundancy import redundancy as run

    require_file_places(output)
    with progress_bars(quiet) as progress:
        found = run(model, progress=progress, **options_)
    if output is not None:
        publish(found, output)
    said = [f"{found.source}, {found.stack}, on {found.data.info.describe()}; the nearest pairs of layers:"]
    for one in found.maps:
        pairs = [[f"{i} and {j}", value] for i, j, value in one.nearest()]
        said.append(f"\n{one.name}: {one.why_not}" if one.why_not else "\n" + table(pairs, [one.name, one.unit]))
    said += [f"\nthe page: {output}"] if output is not None else []
    emit(found.to_dict(), "\n".join(said), as_json=as_json)


def _text(spec: Any) -> str:
    lines = [f"{spec.family}: {spec.params:,} parameters, vocabulary {spec.vocab:,}, {spec.fingerprint[:19]}"]
    for stack in spec.stacks:
        lines.append(f"\n{stack.name}: {stack.depth} layers of width {stack.hidden} at {stack.path}")
        rows = []
        for first, last in _runs(stack.layers):
            layer = stack.layers[first]
            rows.append(
                [
                    f"{first}-{last}" if last > first else str(first),
                    layer.kind,
                    layer.params,
                    layer.attention.params if layer.attention else None,
                    layer.mlp.params if layer.mlp else None,
                    _kv(layer.kv),
                ]
            )
        lines.append(table(rows, ["layers", "kind", "parameters each", "attention", "mlp", "KV"]))
    if spec.parts_note:
        lines.append(f"no parts: {spec.parts_note}")
    return "\n".join(lines)


def _runs(layers: Any) -> list[tuple[int, int]]:
    """Neighbouring layers that differ in nothing but their index."""
    groups: list[tuple[int, int]] = []
    for layer in layers:
        facts = (layer.kind, layer.params, layer.kv, layer.attention, layer.mlp)
        if groups:
            before = layers[groups[-1][0]]
            if (before.kind, before.params, before.kv, before.attention, before.mlp) == facts:
                groups[-1] = (groups[-1][0], layer.index)
                continue
        groups.append((layer.index, layer.index))
    return groups


def _kv(kv: Any) -> str:
    if kv.kind in ("none", "shared", "recurrent"):
        return str(kv.kind) if kv.kind != "recurrent" else f"recurrent, {kv.state:,} elements"
    window = f", window {kv.window}" if kv.window is not None else ""
    return f"{kv.kind}{window}: {kv.heads} x ({kv.key_dim} + {kv.value_dim}) per token"
