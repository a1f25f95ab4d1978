"""The page's sections: one function each, from its part of the data to HTML; `page.py` puts them in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from shoal.report.facts import PlannedStack, sentences
from shoal.report.formatting import amount, esc, finite, interval, number, pair, percent, ratio
from shoal.report.plan_diagram import plan_diagram
from shoal.report.plots import ratios_svg, scores_svg
from shoal.report.tables import bars, cell, named, numeric, table, verdict

Data = Mapping[str, Any]
_LONG = 10
"""Longer tables are folded."""


def plan(part: Data, found: list[PlannedStack]) -> str:
    """The picture of every stack, the notation and the hash."""
    shown = []
    for stack in found:
        head = f"<h3>{esc(stack.name)}</h3><p>{' '.join(sentences(stack))}</p>" if len(found) > 1 else ""
        shown.append(head + plan_diagram(stack))
    rows = {"Depth notation": part.get("notation"), "Hash": part.get("hash"), "Method": part.get("method")}
    return section("The plan", "".join(shown) + facts_list({k: f"<code>{esc(v)}</code>" for k, v in rows.items() if v}))


def scores(part: Data, found: list[PlannedStack]) -> str:
    """The score of each layer as a plot, with all values in a folded table."""
    values, errors, span = part["values"], part.get("errors"), int(part.get("span") or 1)
    name = str(part.get("stack") or found[0].name)
    gone = next((frozenset(stack.dropped) for stack in found if stack.name == name), frozenset[int]())
    removed = frozenset(i for i in range(len(values)) if gone.issuperset(range(i, i + span)))
    unit = f" ({part['unit']})" if part.get("unit") else ""
    title = f"{part['measure']}{unit} of each {name} layer"
    if span > 1:
        title = f"{part['measure']}{unit} of each span of {span} {name} layers"
    drawing = scores_svg(values, errors, removed, span=span, title=title)
    meaning = f"; {esc(part['meaning'])}" if part.get("meaning") else ""
    bar = " Error bars: one standard error." if errors and any(finite(error) for error in errors) else ""
    amounts = {"sequences": part.get("sequences"), "tokens": part.get("tokens")}
    data = ", ".join([f"{number(n)} {what}" for what, n in amounts.items() if n is not None] + _given(part.get("data")))
    caption = f"{esc(title)}{meaning}.{bar}{f' Data: {data}.' if data else ''}"
    rows = [_score_row(i, value, errors, removed, span) for i, value in enumerate(values)]
    heads = ["layer" if span == 1 else "layers", "score", "standard error", "in the plan"]
    listed = table(heads, rows, right=(1, 2), sortable=True)
    figure = f'<figure><div class="scroll">{drawing}</div><figcaption>{caption}</figcaption></figure>'
    return section("Layer scores", figure + _list(part.get("notes")) + _folded(f"All {len(values)} scores", listed))


def quality(part: Sequence[Data]) -> str:
    """Before and after, with the change and what it means."""
    rows = []
    for row in part:
        word, kind = verdict(row)
        unit = f" ({row['unit']})" if row.get("unit") else ""
        before, after = pair(row["dense"], row["pruned"])
        change = f"{percent(row['dense'], row['pruned'])}<span class='sub'>{word}</span>"
        rows.append(
            named(f"{row['name']}{unit}, {row.get('better', 'lower')} is better", row.get("how"))
            + cell(before + _error(row.get("error_dense")), kind="n")
            + cell(after + _error(row.get("error_pruned")), kind=f"n {'bad' if finite(row['pruned']) is None else ''}")
            + cell(change, kind=f"n {kind}")
            + cell(bars(row["dense"], row["pruned"]), kind="bar")
        )
    return section("Quality", _compared(rows))


def cost(part: Sequence[Data]) -> str:
    """Sizes and FLOPs before and after; the exact figures are in the tooltips."""
    rows = []
    for row in part:
        unit = "" if row.get("unit") == row["name"] else row.get("unit", "")
        figures = "".join(
            cell(f'<span title="{number(row[side])}">{amount(row[side], unit)}</span>', kind="n")
            for side in ("dense", "pruned")
        )
        change = cell(percent(row["dense"], row["pruned"]), kind="n")
        drawn = cell(bars(row["dense"], row["pruned"]), kind="bar")
        rows.append(named(row["name"], row.get("how")) + figures + change + drawn)
    return section("Size and work", _compared(rows))


def speed(part: Sequence[Data]) -> str:
    """Wall-clock figures with their spread; what was simulated says so."""
    phases = Counter(str(row["phase"]) for row in part)
    rows, dots = [], []
    for place, row in enumerate(part, 1):
        simulated = row.get("kind", "measured") != "measured"
        label = str(row["phase"]) if phases[str(row["phase"])] == 1 else f"{place}. {row['phase']}"
        dots.append({**row["ratio"], "label": label, "simulated": simulated})
        rows.append(
            named(label, row.get("how"))
            + _spread(row["dense"], row.get("unit", ""))
            + _spread(row["pruned"], row.get("unit", ""))
            + cell(
                f"{ratio(row['ratio'].get('median'))}<span class='sub'>{interval(row['ratio'], of_ratios=True)}</span>",
                kind="n",
            )
            + cell("<strong>simulated</strong>: saves no time as run" if simulated else "measured")
        )
    listed = table(["", "dense", "pruned", "speed-up", "kind"], rows, right=(1, 2, 3))
    hollow = " Hollow and dashed: simulated." if any(dot["simulated"] for dot in dots) else ""
    caption = f"Dot: median speed-up; line: from lowest to highest.{hollow}"
    drawing = ratios_svg(dots, title="Speed-up of the pruned over the dense model")
    return section(
        "Speed", f'{listed}<figure><div class="scroll">{drawing}</div><figcaption>{caption}</figcaption></figure>'
    )


def proof(part: Data) -> str:
    """Every check of the written model with its figure and its limit."""
    said = "All checks passed." if part["passed"] else "The proof failed: do not use this model."
    rows = []
    for check in part.get("checks", []):
        mark = "✓ passed" if check["passed"] else "✗ failed"
        rows.append(
            cell(mark, kind="good" if check["passed"] else "bad")
            + named(check["name"], check.get("how"))
            + numeric(check.get("value"))
            + numeric(check.get("limit"))
        )
    listed = table(["", "check", "value", "limit"], rows, right=(2, 3)) if rows else ""
    return section("Proof", f'<p class="{"good" if part["passed"] else "bad"}">{said}</p>{listed}')


def samples(part: Sequence[Data]) -> str:
    """Prompts with what both models say."""
    shown = []
    for sample in part:
        sides = "".join(
            f'<div><p class="label">{side}</p><pre dir="auto">{esc(sample.get(side, ""))}</pre></div>'
            for side in ("dense", "pruned")
        )
        shown.append(f'<h3>Prompt</h3><pre dir="auto">{esc(sample["prompt"])}</pre><div class="pairs">{sides}</div>')
    return section("Samples", "".join(shown))


def candidates(part: Sequence[Data], chosen: object) -> str:
    """What the search tried."""
    rows = []
    for place, row in enumerate(part, 1):
        kind = ' class="chosen"' if row["notation"] == chosen else ""
        note = esc(row.get("note") or "") + (" (chosen)" if kind else "")
        cells = cell(str(place), kind="n", value=place) + cell(f"<code>{esc(row['notation'])}</code>", kind="name")
        rows.append(f"<tr{kind}>{cells}{numeric(row.get('score'))}{cell(note)}</tr>")
    listed = table(["#", "plan", "score", "note"], rows, right=(0, 2), sortable=True)
    return section("Search", _folded(f"All {len(part)} candidates", listed) if len(part) > _LONG else listed)


def making(data: Data) -> str:
    """The command line and the model: what one needs to do it again."""
    model = data["model"]
    depths = ", ".join(f"{number(depth)} {name}" for name, depth in (model.get("layers") or {}).items())
    rows = {
        "Model": model.get("source"),
        "Family": model.get("family"),
        "Parameters": None if model.get("params") is None else number(model["params"]),
        "Layers": depths,
        "Dtype": model.get("dtype"),
        "Device": model.get("device"),
        "Made": data.get("created"),
        "Shoal": data.get("version"),
    }
    command = f'<p class="label">Command (a click selects all of it)</p><pre class="copy">{esc(data["command"])}</pre>'
    return section("How it was made", command + facts_list({name: esc(value) for name, value in rows.items() if value}))


def notes(part: Sequence[object]) -> str:
    """What else the reader should know."""
    return section("Notes", _list(part))


def _compared(rows: Sequence[str]) -> str:
    return table(["", "dense", "pruned", "change", "dense above pruned"], rows, right=(1, 2, 3))


def section(title: str, content: str) -> str:
    """One section of a page; both texts are HTML-safe."""
    return f"<section><h2>{title}</h2>{content}</section>"


def facts_list(rows: Mapping[str, str]) -> str:
    """Names with HTML-safe values."""
    return f'<dl class="facts">{"".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows.items())}</dl>'


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>{content}</details>"


def _list(items: Sequence[object] | None) -> str:
    return f"<ul>{''.join(f'<li>{esc(item)}</li>' for item in items)}</ul>" if items else ""


def _given(value: object) -> list[str]:
    return [esc(value)] if value else []


def _error(value: object) -> str:
    return "" if value is None else f'<span class="sub">± {number(value, 2)}</span>'


def _spread(value: Data, unit: str) -> str:
    """A median with its unit, and the range below it."""
    return cell(f"{number(value.get('median'))} {esc(unit)}<span class='sub'>{interval(value)}</span>", kind="n")


def _score_row(place: int, value: object, errors: Sequence[object] | None, removed: frozenset[int], span: int) -> str:
    name = str(place) if span == 1 else f"{place}-{place + span - 1}"
    error = errors[place] if errors and place < len(errors) else None
    fate = "<strong>removed</strong>" if place in removed else "kept"
    return cell(name, value=place) + numeric(value) + cell(number(error, 2), kind="n", value=error) + cell(fate)
