"""The header of the page: what was done, how much smaller, how much faster, how much worse, and is it proven."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shoal.report.facts import PlannedStack, changed, sentences
from shoal.report.formatting import amount, esc, finite, interval, pair, percent, plural, ratio
from shoal.report.tables import from_to, verdict

Data = Mapping[str, Any]


def header(data: Data, found: list[PlannedStack]) -> str:
    """The page's head: title, one paragraph of what was done, and a tile for each question that the data answers."""
    made = " · ".join(esc(part) for part in ("Shoal report", data.get("created")) if part)
    subtitle = f'<p class="subtitle">{esc(data["subtitle"])}</p>' if data.get("subtitle") else ""
    tiles = f'<dl class="tiles">{"".join(_tiles(data, found))}</dl>{_absent(data)}'
    return (
        f'<header><p class="eyebrow">{made}</p><h1>{esc(data["title"])}</h1>{subtitle}'
        f'<p class="lede">{_lede(data, found)}</p>{tiles}</header>'
    )


def _lede(data: Data, found: list[PlannedStack]) -> str:
    source, method = data["model"].get("source"), data["plan"].get("method")
    said = [f"<strong>{esc(source)}</strong>:"] if source else []
    said += [sentence for stack in changed(found) for sentence in sentences(stack)]
    return " ".join([*said, f"Chosen by <strong>{esc(method)}</strong>." if method else ""])


def _tiles(data: Data, found: list[PlannedStack]) -> list[str]:
    tiles = [_depth(stack) for stack in changed(found)]
    if costs := data.get("cost"):
        tiles.append(_size(costs))
    if speeds := data.get("speed"):
        tiles.append(_speed(speeds))
    if qualities := data.get("quality"):
        tiles.append(_quality(qualities))
    if proof := data.get("proof"):
        tiles.append(_proof(proof))
    return tiles


def _tile(label: str, big: str, lines: Sequence[str], kind: str = "") -> str:
    """All texts are HTML-safe."""
    rest = "".join(f"<dd>{line}</dd>" for line in lines if line)
    return f'<div class="tile {kind}"><dt>{label}</dt><dd class="big">{big}</dd>{rest}</div>'


def _depth(stack: PlannedStack) -> str:
    parts = {
        "removed": len(stack.dropped),
        "replaced by a map": len(stack.mapped - {run.layer for run in stack.runs}),
    }
    lines = [f"{n} of {stack.depth} layers {what}" for what, n in parts.items() if n]
    if not lines:
        lines = ["no layer removed"]
    gated = any(run.gate is not None for run in stack.runs)
    return _tile(
        f"Depth, {esc(stack.name)} layer runs",
        from_to(str(stack.depth), f"{stack.layer_runs:g}"),
        [*lines, "at most: gates may skip more" if gated else ""],
    )


def _size(costs: Sequence[Data]) -> str:
    row = next((row for row in costs if str(row["name"]).lower().startswith("param")), costs[0])
    name = str(row["name"])
    unit = "" if row.get("unit") == name else row.get("unit", "")
    before, after = amount(row["dense"], unit), amount(row["pruned"], unit)
    return _tile(f"Size, {esc(name)}", percent(row["dense"], row["pruned"]), [from_to(before, after)])


def _speed(speeds: Sequence[Data]) -> str:
    measured = [row for row in speeds if row.get("kind", "measured") == "measured"]
    shown = measured or list(speeds)
    best = {row["phase"]: row for row in reversed(shown)}
    order = sorted(best.values(), key=lambda row: row["phase"] != "decode")[:2]
    lines = [_speed_line(row) for row in order]
    if len(order) > 1:
        lines[1] = f"{ratio(order[1]['ratio'].get('median'))} {lines[1]}"
    first = order[0]["ratio"]
    kind = "bad" if (finite(first.get("high")) or 1.0) < 1 else ""
    if not measured:
        lines.append("no wall clock saw this")
    return _tile("Speed, measured" if measured else "Speed, simulated only", ratio(first.get("median")), lines, kind)


def _speed_line(row: Data) -> str:
    low, high = finite(row["ratio"].get("low")), finite(row["ratio"].get("high"))
    unclear = low is not None and high is not None and low <= 1 <= high
    spread = interval(row["ratio"], of_ratios=True)
    note = f' (<span class="nb">{spread}</span>{"; no clear change" if unclear else ""})' if spread else ""
    return f"{esc(row['phase'])}{note}"


def _quality(rows: Sequence[Data]) -> str:
    row, word = rows[0], verdict(rows[0])
    lines = [f"{from_to(*pair(row['dense'], row['pruned']))}{f', {word[0]}' if word[0] else ''}"]
    lines += [f"{esc(other['name'])} {percent(other['dense'], other['pruned'])}" for other in rows[1:2]]
    return _tile(f"Quality, {esc(row['name'])}", percent(row["dense"], row["pruned"]), lines, word[1])


def _proof(proof: Data) -> str:
    checks = proof.get("checks", [])
    good = sum(bool(check["passed"]) for check in checks)
    done = f"{good} of {plural(len(checks), 'check')} passed"
    if proof["passed"]:
        return _tile("Proof of the written model", "✓ proven", [done], "good")
    return _tile("Proof of the written model", "✗ failed", [done], "bad")


def _absent(data: Data) -> str:
    """What the first screen leaves unanswered, so that silence is not taken for good news."""
    asked = {"cost": "size", "speed": "speed", "quality": "quality", "proof": "proof"}
    missing = [name for key, name in asked.items() if not data.get(key)]
    return f'<p class="soft">Not in this report: {", ".join(missing)}.</p>' if missing else ""
