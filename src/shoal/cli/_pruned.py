"""What prune and fuse found, as text."""

from __future__ import annotations

from typing import Any

from shoal.cli._shared import table


def pruned_text(pruned: Any, written: Any) -> str:
    """What was found, as text."""
    from shoal.api.publish import quality_rows, speed_rows
    from shoal.plan import strip

    before, after = pruned.before, pruned.after
    lines = [f"plan {pruned.plan}   ({pruned.method})"]
    for name, _ in pruned.plan.stacks:
        lines.append(f"{name}: {strip(pruned.plan, name)}   dropped {list(pruned.plan.dropped(name))}")
    rows = [
        ["parameters", before.params, after.written_params if written is None else written.params],
        ["KV elements per token", before.kv_per_token, after.kv_per_token],
        ["prefill FLOPs", before.prefill_flops, after.prefill_flops],
    ]
    rows += [[row["name"], row["dense"], row["pruned"]] for row in quality_rows(pruned)]
    rows += [
        [f"{row['phase']} {row['unit']}", row["dense"]["median"], row["pruned"]["median"]] for row in speed_rows(pruned)
    ]
    lines.append(table(rows, ["", "dense", "pruned"]))
    if pruned.price is not None:
        lines.append(_price(pruned.price))
    if written is not None:
        page = written.folder / "report.html"
        lines.append(f"proved and written to {written.folder}" + (f"; the page: {page}" if page.exists() else ""))
    return "\n".join(lines)


def _price(price: dict[str, Any]) -> str:
    text = f"{price['unit']}: {price['price']:.3f} of dense, {price['asked']:g} was asked for"
    if "measured" in price:
        text += f" (predicted, the fit is right to {price['error']:.3f}; measured {price['measured']:.3f})"
    return text
