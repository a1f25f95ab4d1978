"""The plan diagram: the base model's layers as numbered boxes, and the executed order where that differs."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import groupby
from typing import assert_never

from shoal.plan import Exit, Map, Parallel, Run, Step, format_steps
from shoal.plan.select import groups
from shoal.report import svg_shapes
from shoal.report.facts import PlannedStack, repeated
from shoal.report.formatting import esc
from shoal.report.svg_shapes import ARC, GAP, HIGH, LINE, PITCH, WIDE

_PER_ROW = {"wide": 32, "narrow": 10}
_LEGEND = {
    "layer": "runs",
    "drop": "removed",
    "attention": "attention only",
    "mlp": "mlp only",
    "map": "fitted map",
    "parallel": "in parallel",
    "repeat": "runs several times",
    "reads": "reads another layer's KV",
    "tie": "=0: the matrices of layer 0",
    "tie across": "=e0: the matrices of a layer of another stack, by its first letter",
    "weights": "weights of its own",
    "gate": "behind a gate",
    "exit": "exit",
}


def plan_diagram(stack: PlannedStack) -> str:
    """HTML of one stack's picture: a wide and a narrow drawing (the style sheet shows one of them) and a legend."""
    drawings = "".join(_drawing(stack, size, per_row) for size, per_row in _PER_ROW.items())
    return f'<div class="picture">{drawings}{_legend(stack)}</div>'


def _drawing(stack: PlannedStack, size: str, per_row: int) -> str:
    rows = math.ceil(stack.depth / per_row)
    columns = math.ceil(stack.depth / rows)
    pieces, y, all_in_place = [], 0.0, stack.ascending
    for first in range(0, stack.depth, columns):
        row, height, in_place = _base_row(stack, range(first, min(first + columns, stack.depth)), y)
        pieces += row
        y += height + 6
        all_in_place &= in_place
    title = f"{stack.name}: base layers 0 to {stack.depth - 1}, plan {format_steps(stack.steps)}"
    drawn = [_svg(f"{size} base", title, columns * PITCH - GAP, y, pieces)]
    if not all_in_place:
        width = min(per_row, max(columns, 20)) * PITCH - GAP
        order, height = _executed(stack, width)
        title = f"{stack.name}: executed order {format_steps(stack.steps)}"
        drawn += [f'<p class="label {size}">Executed order</p>', _svg(f"{size} order", title, width, height, order)]
    return "".join(drawn)


def _svg(kind: str, title: str, width: float, height: float, pieces: list[str]) -> str:
    return (
        f'<svg class="plan {kind}" viewBox="-3 0 {width + 6:g} {height:g}" width="{width + 6:g}" height="{height:g}" '
        f'role="img" aria-label="{esc(title)}"><title>{esc(title)}</title>{"".join(pieces)}</svg>'
    )


def _base_row(stack: PlannedStack, layers: range, y: float) -> tuple[list[str], float, bool]:
    """The boxes of some base layers from `y` on, their height, and whether every parallel group of theirs fits here."""
    fitting, fits = _groups(stack, layers)
    own = set(layers) - {run.layer for group in fitting for run in group.branches}
    readers = [run for run in stack.runs if svg_shapes.reads(run) and run.layer in own]
    times = {layer: n for layer, n in repeated(stack).items() if layer in layers}
    exits = _exits(stack, layers)
    near = any(source.layer in layers for run in readers for source in run.layer_sources)
    top = y + (ARC if near else LINE if readers else 5)
    box = max([HIGH, *map(svg_shapes.group_height, fitting)])

    def x(layer: int) -> float:
        return (layer - layers.start) * PITCH

    pieces = [piece for layer in sorted(own) for piece in _layer(stack, layer, x(layer), top)]
    pieces += _map_bars(stack, layers, x, top)
    for group in fitting:
        first = min(run.layer for run in group.branches)
        pieces.append(svg_shapes.group_box(x(first), top, len(group.branches) * PITCH - GAP, group))
    pieces += [_reading(run, layers, x, top) for run in readers]
    pieces += [svg_shapes.count(x(layer) + WIDE / 2, top + box + LINE - 2, n) for layer, n in times.items()]
    flags = top + box - HIGH + (LINE if times else 0)
    for layer, step in exits:
        anchor = "end" if layer == layers[-1] else "middle"
        pieces.append(svg_shapes.exit_flag(x(layer) + WIDE + GAP / 2, flags, step, anchor))
    return pieces, top - y + box + LINE * (bool(times) + bool(exits)) + 2, fits


def _layer(stack: PlannedStack, layer: int, x: float, y: float) -> list[str]:
    """The boxes of one base layer: removed, whole, or each half that runs; none for a layer that a map stands for."""
    here = [run for run in stack.runs if run.layer == layer]
    if not here:
        return [] if layer in stack.mapped else [svg_shapes.dropped_box(x, y, layer)]
    whole = [run for run in here if run.part == "layer"]
    if whole:
        return [svg_shapes.run_box(x, y, whole[0])]
    halves = {run.part: run for run in reversed(here)}
    return [svg_shapes.run_box(x, y, run) for run in halves.values()]


def _groups(stack: PlannedStack, layers: range) -> tuple[list[Parallel], bool]:
    """Parallel groups of neighbours that can be stacked in this row, and whether none was left out."""
    touching = [group for group in groups(stack.steps) if any(run.layer in layers for run in group.branches)]
    fitting, seen = [], set[int]()
    for group in touching:
        own = sorted(run.layer for run in group.branches)
        others = sum(run.layer in own for run in stack.runs) - len(own)
        if own == list(range(own[0], own[0] + len(own))) and own[-1] in layers and own[0] in layers and not others:
            fitting.append(group)
            seen |= set(own)
    return fitting, len(fitting) == len(touching)


def _map_bars(stack: PlannedStack, layers: range, x: Callable[[int], float], y: float) -> list[str]:
    running = {run.layer for run in stack.runs}
    bars = []
    for step in stack.maps:
        free = [i for i in range(step.first, step.last + 1) if i in layers and i not in running]
        for _, neighbours in groupby(enumerate(free), key=lambda pair: pair[1] - pair[0]):
            span = [layer for _, layer in neighbours]
            label = str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}"
            bars.append(svg_shapes.map_box(x(span[0]), y, len(span) * PITCH - GAP, step, label))
    return bars


def _exits(stack: PlannedStack, layers: range) -> list[tuple[int, Exit]]:
    """Exits with the layer after which they stand; only the executed order can show them when it is another one."""
    found, last = [], 0
    for step in stack.steps if stack.ascending else ():
        match step:
            case Run():
                last = step.layer
            case Map():
                last = step.last
            case Parallel():
                last = max(run.layer for run in step.branches)
            case Exit():
                found.append((last, step))
            case _:
                assert_never(step)
    return [(layer, step) for layer, step in found if layer in layers]


def _reading(run: Run, layers: range, x: Callable[[int], float], y: float) -> str:
    near = [source.layer for source in run.layer_sources if source.layer in layers]
    if run.tie is None and len(near) == len(run.layer_sources):
        return "".join(svg_shapes.arc(x(layer) + WIDE / 2, x(run.layer) + WIDE / 2, y - 2) for layer in near)
    return svg_shapes.text(x(run.layer) + WIDE / 2, y - 3, svg_shapes.reads(run), "note")


def _executed(stack: PlannedStack, width: float) -> tuple[list[str], float]:
    """The steps in the order in which they run, equal neighbours folded, wrapped at `width`; and their height."""
    pieces: list[str] = []
    x, y, high = 0.0, 5.0, 0.0
    for step, same in groupby(stack.steps):
        times = len(list(same))
        wide = _step_width(step)
        if x and x + wide > width:
            x, y, high = 0.0, y + high + 9, 0.0
        pieces += _step(step, x, y, times)
        high = max(high, _step_height(step) + LINE * (times > 1 or _has_note(step)))
        x += wide + GAP
    return pieces, y + high + 3


def _step_height(step: Step) -> float:
    match step:
        case Parallel():
            return svg_shapes.group_height(step)
        case Run() | Map() | Exit():
            return HIGH
        case _:
            assert_never(step)


def _has_note(step: Step) -> bool:
    match step:
        case Run():
            return bool(svg_shapes.reads(step))
        case Exit():
            return True
        case Map() | Parallel():
            return False
        case _:
            assert_never(step)


def _step_width(step: Step) -> float:
    match step:
        case Map():
            return PITCH + WIDE
        case Parallel():
            return PITCH + WIDE / 2
        case Run() | Exit():
            return WIDE
        case _:
            assert_never(step)


def _step(step: Step, x: float, y: float, times: int) -> list[str]:
    below = y + _step_height(step) + LINE - 3
    note = svg_shapes.count(x + _step_width(step) / 2, below, times) if times > 1 else ""
    match step:
        case Run():
            reads = svg_shapes.reads(step)
            if reads:
                more = f" \N{MULTIPLICATION SIGN}{times}" if times > 1 else ""
                note = svg_shapes.text(x + WIDE / 2, below, reads + more, "note")
            return [svg_shapes.run_box(x, y, step), note]
        case Map():
            label = str(step.first) if step.first == step.last else f"{step.first}-{step.last}"
            return [svg_shapes.map_box(x, y, _step_width(step), step, label), note]
        case Parallel():
            return [svg_shapes.group_box(x, y, _step_width(step), step), note]
        case Exit():
            return [svg_shapes.exit_flag(x + WIDE / 2, y, step)]
        case _:
            assert_never(step)


def _legend(stack: PlannedStack) -> str:
    present = svg_shapes.kinds(stack.steps)
    present |= {"drop"} if stack.dropped else set()
    present |= {"repeat"} if repeated(stack) else set()
    items = "".join(f"<li>{_swatch(kind)}{words}</li>" for kind, words in _LEGEND.items() if kind in present)
    return f'<ul class="legend">{items}</ul>'


def _swatch(kind: str) -> str:
    shapes = {
        "layer": svg_shapes.rect(1, 1, 14, 14, "kept"),
        "drop": svg_shapes.rect(1, 1, 14, 14, "drop") + '<path class="cross" d="M2 2L14 14M14 2L2 14"/>',
        "attention": svg_shapes.rect(1, 1, 14, 14, "hollow") + svg_shapes.rect(1, 1, 14, 7, "kept"),
        "mlp": svg_shapes.rect(1, 1, 14, 14, "hollow") + svg_shapes.rect(1, 8, 14, 7, "kept"),
        "map": svg_shapes.rect(1, 3, 14, 10, "map"),
        "parallel": svg_shapes.rect(3, 1, 10, 6, "kept")
        + svg_shapes.rect(3, 9, 10, 6, "kept")
        + '<path class="bracket" d="M1 1V15M15 1V15"/>',
        "repeat": svg_shapes.text(8, 13, "\N{MULTIPLICATION SIGN}n", "note"),
        "reads": '<path class="arc" d="M1 13Q7 -3 13 10"/><path class="tip" d="M14.5 14.5L9.5 10L15 8Z"/>',
        "tie": svg_shapes.text(8, 12, "=", "note"),
        "tie across": svg_shapes.text(8, 12, "=e", "note"),
        "weights": svg_shapes.rect(1, 1, 14, 14, "kept") + '<path class="corner" d="M7 1h8v8z"/>',
        "gate": svg_shapes.rect(3, 3, 10, 10, "kept") + svg_shapes.rect(1, 1, 14, 14, "gate"),
        "exit": '<path class="exit" d="M5 1V15"/><path class="pennant" d="M5 1l8 3.5l-8 3.5z"/>',
    }
    size = 'viewBox="0 0 16 16" width="16" height="16"'
    return f'<svg class="plan swatch" {size} aria-hidden="true">{shapes[kind]}</svg>'
