"""The shapes of the plan diagram as SVG text; colours come from the page's style sheet, by class."""

from __future__ import annotations

import math
from typing import assert_never

from shoal.plan import Exit, Map, Parallel, Run, Step
from shoal.plan.notation import format_source
from shoal.plan.sources import NewTensors, Source, StackLayer, TiedLayer
from shoal.plan.steps import PartName
from shoal.report.formatting import TIMES, esc

WIDE = 30
GAP = 4
PITCH = WIDE + GAP
HIGH = 34
LINE = 15
ARC = 26
_BRANCH = 14
_LETTER: dict[PartName, str] = {"layer": "", "attention": "a", "mlp": "m"}
_WORDS: dict[PartName, str] = {"layer": "runs", "attention": "runs only its attention", "mlp": "runs only its mlp"}


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> str:
    """A line of text, escaped, with its baseline at y."""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" class="{kind}">{esc(words)}</text>'


def rect(x: float, y: float, width: float, height: float, kind: str) -> str:
    """A box with round corners."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" class="{kind}"/>'


def titled(title: str, *pieces: str) -> str:
    """A group with a tooltip."""
    return f"<g><title>{esc(title)}</title>{''.join(pieces)}</g>"


def run_box(x: float, y: float, run: Run) -> str:
    """A run: a filled box, or its upper half for an attention and its lower half for an mlp."""
    if run.part == "layer":
        pieces = [rect(x, y, WIDE, HIGH, "kept"), text(x + WIDE / 2, y + 22, str(run.layer), "on")]
    else:
        top = y if run.part == "attention" else y + HIGH / 2
        pieces = [rect(x, y, WIDE, HIGH, "hollow"), rect(x, top, WIDE, HIGH / 2, "kept")]
        pieces.append(text(x + WIDE / 2, top + 12.5, f"{run.layer}{_LETTER[run.part]}", "on small"))
    return titled(run_title(run), *pieces, *_marks(x, y, WIDE, HIGH, run.gate, run.weights))


def dropped_box(x: float, y: float, layer: int) -> str:
    """A removed layer: hollow and crossed."""
    cross = (
        f'<path class="cross" d="M{x + 1:g} {y + 1:g}L{x + WIDE - 1:g} {y + HIGH - 1:g}'
        f'M{x + WIDE - 1:g} {y + 1:g}L{x + 1:g} {y + HIGH - 1:g}"/>'
    )
    return titled(
        f"layer {layer}: removed", rect(x, y, WIDE, HIGH, "drop"), cross, text(x + WIDE / 2, y + 22, str(layer), "gone")
    )


def map_box(x: float, y: float, width: float, step: Map, label: str) -> str:
    """A fitted map: one bar over the layers for which it stands."""
    title = f"layers {step.first} to {step.last}: replaced by the fitted map {step.weights}"
    bar = rect(x, y + 7, width, HIGH - 14, "map")
    words = text(x + width / 2, y + 21, label, "onmap small")
    return titled(title + _behind(step.gate), bar, words, *_marks(x, y + 7, width, HIGH - 14, step.gate, None))


def group_height(step: Parallel) -> int:
    """Units that a parallel group needs: at least one line of text for each branch."""
    return max(HIGH, _BRANCH * len(step.branches))


def group_box(x: float, y: float, width: float, step: Parallel) -> str:
    """A parallel group: its branches stacked in one column, between the input's and the output's bracket."""
    high = group_height(step)
    each = (high - 2 * (len(step.branches) - 1)) / len(step.branches)
    pieces = [f'<path class="bracket" d="M{x:g} {y:g}V{y + high:g}M{x + width:g} {y:g}V{y + high:g}"/>']
    for place, run in enumerate(step.branches):
        top = y + place * (each + 2)
        label = f"{run.layer}{_LETTER[run.part]}" + (reads(run))
        bar = [rect(x + 3, top, width - 6, each, "kept"), text(x + width / 2, top + each / 2 + 4, label, "on small")]
        pieces.append(titled(run_title(run), *bar, *_marks(x + 3, top, width - 6, each, run.gate, run.weights)))
    names = " and ".join(str(run.layer) for run in step.branches)
    joined = f"joined by their {step.join}" if step.join != "bypass" else "each mlp behind the attentions up to its own"
    return titled(f"layers {names} in parallel, {joined}", *pieces)


def exit_flag(x: float, y: float, step: Exit, anchor: str = "middle") -> str:
    """A place where the pass may end: a line through the gap with a pennant, and its name below."""
    head = "the model's own head" if step.head == "base" else f"the head {step.head}"
    pole = f'<path class="exit" d="M{x:g} {y - 5:g}V{y + HIGH + 3:g}"/>'
    pennant = f'<path class="pennant" d="M{x:g} {y - 5:g}l7 3.5l-7 3.5z"/>'
    name = step.name if len(step.name) <= 12 else step.name[:11] + "\N{HORIZONTAL ELLIPSIS}"
    label = text(x, y + HIGH + LINE, name, "note", anchor)
    return titled(f"exit {step.name} with {head}{_behind(step.gate)}", pole, pennant, label)


def arc(source: float, reader: float, y: float) -> str:
    """A curved arrow above the boxes, from the layer that stores the KV to the one that reads it."""
    lift = min(ARC - 4.0, 10 + abs(reader - source) / 8)
    middle = (source + reader) / 2
    angle = math.degrees(math.atan2(lift * 2, reader - middle))
    return (
        f'<path class="arc" d="M{source:g} {y:g}Q{middle:g} {y - lift * 2:g} {reader:g} {y:g}"/>'
        f'<path class="tip" transform="translate({reader:g} {y:g}) rotate({angle:.1f})" d="M0 0L-7 -3.2L-7 3.2Z"/>'
    )


def count(x: float, y: float, times: int) -> str:
    """How often the layer above runs."""
    return text(x, y, f"{TIMES}{times}", "note")


def run_title(run: Run) -> str:
    """One run in words, for its tooltip."""
    sources = "".join(f", {source}" for source in run.sources)
    fill = "" if run.kv.fill is None else f", KV fill {run.kv.fill}"
    return f"layer {run.layer}: {_WORDS[run.part]}{sources}{_behind(run.gate)}{fill}"


def reads(run: Run) -> str:
    """What the run takes from other layers, in depth notation; of another stack the first letter has to do."""
    return "".join(_short(source) for source in run.sources if not isinstance(source, NewTensors))


def _short(source: Source) -> str:
    if isinstance(source, TiedLayer) and isinstance(source.layer, StackLayer):
        return f"={source.layer.stack[0]}{source.layer.layer}"
    return format_source(source)


def kinds(steps: tuple[Step, ...]) -> set[str]:
    """The names of the kinds of mark that the steps need in a legend, removed layers and repeats apart."""
    found: set[str] = set()
    for step in steps:
        match step:
            case Run():
                found |= {step.part} | _run_kinds(step)
            case Parallel():
                found |= {"parallel"}.union(*map(_run_kinds, step.branches))
            case Map():
                found |= {"map"} | ({"gate"} if step.gate else set())
            case Exit():
                found |= {"exit"}
            case _:
                assert_never(step)
    return found


def _run_kinds(run: Run) -> set[str]:
    marks = {
        "reads": bool(run.layer_sources),
        "tie": run.tie is not None and not isinstance(run.tie, StackLayer),
        "tie across": isinstance(run.tie, StackLayer),
        "weights": run.weights is not None,
        "gate": run.gate is not None,
    }
    return {name for name, present in marks.items() if present}


def _marks(x: float, y: float, width: float, height: float, gate: str | None, weights: str | None) -> list[str]:
    """A dashed frame for a gate, a folded corner for weights that are not the base model's."""
    corner = f'<path class="corner" d="M{x + width - 9:g} {y:g}h9v9z"/>'
    frame = rect(x - 1.5, y - 1.5, width + 3, height + 3, "gate")
    return [corner] * (weights is not None) + [frame] * (gate is not None)


def _behind(gate: str | None) -> str:
    return "" if gate is None else f", behind the gate {gate}"
