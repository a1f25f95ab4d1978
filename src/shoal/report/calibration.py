"""The page of `shoal calibrate`: the curve of quality against layers, the promises on it, and the table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from shoal.report.formatting import esc, number
from shoal.report.matplotlib_svg import KEPT, REMOVED, SIZE, TEXT, figure_of, svg_of
from shoal.report.page import document
from shoal.report.sections import facts_list, section
from shoal.report.tables import cell, numeric, table

Data = Mapping[str, Any]


def render_calibration(data: Data) -> str:
    """One self-contained HTML page of `Calibration.to_dict()` with title, command, version (text) and facts ({name:
    text}) added. Every text is escaped."""
    promises = data["promises"]
    kind = _kind(promises[0])
    said = "".join(f'<p class="lede">{esc(_sentence(one))}</p>' for one in promises)
    head = f'<header><p class="eyebrow">Shoal calibration</p><h1>{esc(data["title"])}</h1>{said}</header>'
    caption = (
        "Each point is a setting of thresholds; up and to the left is better. The larger mark is the setting that was "
        "chosen for the promise, whose level is the dashed line; the thin line has one threshold for all exits."
    )
    figure = f'<figure><div class="scroll">{_curve(data, kind)}</div><figcaption>{caption}</figcaption></figure>'
    facts = {esc(name): esc(value) for name, value in data.get("facts", {}).items()}
    parts = [
        section("Quality against layers", figure),
        section("Promises", _promises(promises)),
        section("All settings", _settings(data["table"], kind, "level=setting-N")),
        *(
            [section("Trade-offs", _settings(data["tradeoffs"], kind, "level=tradeoff=W"))]
            if data.get("tradeoffs")
            else []
        ),
        section("What this does not say", "".join(f"<p>{esc(note)}</p>" for note in data.get("notes", ()))),
        section("How this was made", facts_list(facts | {"Command": f"<code>{esc(data.get('command', ''))}</code>"})),
    ]
    return document(str(data["title"]), head, "".join(parts), data.get("version"))


def _kind(one: Data) -> str:
    return str(one["target"]).partition("=")[0]


def _shown(one: Data) -> float:
    """The risk of a promise in the unit of its target."""
    value = float(str(one["target"]).partition("=")[2])
    return 1 - one["risk"] if _kind(one) == "agreement" else one["risk"] * value / one["limit"]


def _sentence(one: Data) -> str:
    if not one["promised"]:
        return f"{one['target']}: no setting passed the test on {one['sequences']} sequences, so nobody leaves."
    how = "on average" if one["confidence"] is None else f"with confidence {one['confidence']:g}"
    return (
        f"{one['target']} is promised {how} at {one['layers']:.2f} layers per token; {number(_shown(one))} was found "
        f"on the {one['sequences']} sequences that tested it."
    )


def _curve(data: Data, kind: str) -> str:
    figure, axes = figure_of(12, 5.2)
    for rows, colour, width, mark in ((data["uniform"], "#808080", 1.2, "."), (data["table"], KEPT, 2.2, "o")):
        own = sorted((row["layers"], row[kind]) for row in rows)
        axes.plot([x for x, _ in own], [y for _, y in own], color=colour, linewidth=width, marker=mark, markersize=5)
    for one in data["promises"]:
        if _kind(one) != kind:
            continue
        level = float(one["target"].partition("=")[2])
        axes.axhline(level, color=REMOVED, linewidth=1.2, linestyle="--")
        axes.annotate(
            f"promised {one['target']}",
            (1, level),
            xycoords=("axes fraction", "data"),
            xytext=(-4, -14),
            textcoords="offset points",
            ha="right",
            color=TEXT,
            fontsize=SIZE,
            annotation_clip=True,  # a level far outside of what was found would leave the curve no room
        )
        axes.plot([one["layers"]], [_shown(one)], "D", color=REMOVED, markersize=11, zorder=5)
    values = [row[kind] for row in data["table"]]
    room = max(max(values) - min(values), 0.01)
    axes.set_ylim(min(values) - 0.15 * room, max(values) + 0.15 * room)
    axes.set_xlabel("mean layers per generated token", color=TEXT, fontsize=SIZE)
    axes.set_ylabel("agreement" if kind == "agreement" else "rise of the loss, nats", color=TEXT, fontsize=SIZE)
    return svg_of(figure, f"{kind} against mean layers")


def _promises(promises: Sequence[Data]) -> str:
    heads = ["target", "", "layers", "found", "p-value", "confidence", "sequences", "settings tested"]
    rows = [
        cell(esc(one["target"]))
        + cell("promised" if one["promised"] else "not promised", kind="good" if one["promised"] else "bad")
        + numeric(one["layers"])
        + numeric(_shown(one))
        + numeric(one["p_value"])
        + numeric(one["confidence"])
        + numeric(one["sequences"])
        + numeric(one["tested"])
        for one in promises
    ]
    return table(heads, rows, right=range(2, len(heads)))


def _settings(found: Sequence[Data], kind: str, level: str) -> str:
    heads = ["setting", "layers", "looks", "layers with looks", kind, "standard error", "thresholds"]
    rows = [
        (numeric(row["setting"]) if isinstance(row["setting"], int) else cell(esc(row["setting"])))
        + "".join(numeric(row[name]) for name in ("layers", "looks", "layers_with_looks", kind, "error"))
        + cell(_thresholds(row["thresholds"]))
        for row in found
    ]
    note = (
        "<p class='soft'>All recorded sequences of the test half; a look is one run of norm and head at an exit. "
        f"<code>{level}</code> runs a row, without a promise. Click a head to sort.</p>"
    )
    return note + table(heads, rows, right=range(6), sortable=True)


def _thresholds(values: Mapping[str, float]) -> str:
    said = ", ".join(f"{layer}: {value:.4g}" for layer, value in values.items() if math.isfinite(value))
    return f"<code>{esc(said)}</code>" if said else "nobody leaves"
