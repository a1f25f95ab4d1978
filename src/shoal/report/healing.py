"""The page's section about training: both texts before and after, what each stage did, and the curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shoal.report.formatting import esc, finite, number
from shoal.report.matplotlib_svg import KEPT, REMOVED, SIZE, TEXT, figure_of, svg_of
from shoal.report.sections import section
from shoal.report.tables import cell, named, numeric, table

Data = Mapping[str, Any]


def healing(part: Data) -> str:
    """`recipe`, `tokens`, `seconds`; `texts`: {name: {dense, before, after: {perplexity}, back}}; `stages`: [{stage,
    steps, tokens, seconds, moving, curve: [{step, loss, held_loss}]}]."""
    said = f"<p>{esc(part['recipe'])}: {number(part['tokens'])} tokens in {number(round(part['seconds']))} seconds.</p>"
    texts = [
        named(name, own.get("data", {}).get("source"))
        + "".join(numeric(own[side]["perplexity"]) for side in ("dense", "before", "after"))
        + cell("" if finite(own["back"]) is None else f"{100 * own['back']:.0f} %", kind="n")
        for name, own in part["texts"].items()
    ]
    judged = table(["perplexity", "dense", "before", "healed", "lost nats back"], texts, right=(1, 2, 3, 4))
    stages = [
        named(one.get("stage", one.get("transform", "")), one.get("note"))
        + "".join(numeric(one[name]) if name in one else cell("") for name in ("moving", "steps", "tokens"))
        + cell(number(round(one["seconds"])), kind="n")
        for one in part["stages"]
    ]
    listed = table(["stage", "numbers that learn", "steps", "tokens", "seconds"], stages, right=(1, 2, 3, 4))
    drawn = "".join(_figure(one) for one in part["stages"] if one.get("curve"))
    return section("Healing", said + (judged if texts else "") + listed + drawn)


def _figure(stage: Data) -> str:
    title = f"Loss of {stage['stage']} by step"
    caption = f"{esc(title)}. Line: training windows; dots: windows held out, which say what is kept."
    drawing = curve_svg(stage["curve"], title=title)
    return f'<figure><div class="scroll">{drawing}</div><figcaption>{caption}</figcaption></figure>'


def curve_svg(curve: Sequence[Data], *, title: str) -> str:
    """Losses by step: those of training as a line, those of held-out text as dots."""
    figure, axes = figure_of(12, 3.4)
    for key, colour, style in (("loss", KEPT, "-"), ("held_loss", REMOVED, "o--")):
        points = [(one["step"], finite(one[key])) for one in curve if key in one]
        known = [(step, value) for step, value in points if value is not None]
        if known:
            label = "training" if key == "loss" else "held out"
            axes.plot(*zip(*known, strict=True), style, color=colour, linewidth=1.6, markersize=6, label=label)
    axes.set_xlabel("step", color=TEXT, fontsize=SIZE)
    axes.legend(loc="upper right", frameon=False, labelcolor=TEXT, fontsize=SIZE)
    return svg_of(figure, title)
