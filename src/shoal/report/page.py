"""One self-contained HTML page from plain data: no external resource, readable without its few lines of script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from shoal.errors import UsageError
from shoal.report import sections
from shoal.report.facts import stacks
from shoal.report.formatting import esc
from shoal.report.header import header
from shoal.report.healing import healing
from shoal.report.span_map import span_map
from shoal.report.style import CSS, SCRIPT

_NEEDED = ("title", "command", "model", "plan")


def render(data: Mapping[str, Any]) -> str:
    """The report as HTML. A section whose key is absent or empty is left out; the first screen then says so.

    title, command: text. subtitle, created (ISO time), version: text, optional.
    model: {source, family, params, layers: {stack: depth}, dtype, device}.
    plan: {notation, hash, method, stacks: {name: {depth, notation, steps}}}; the picture is drawn from the notation.
    scores: {measure, stack, unit, meaning, span, values, errors, sequences, tokens, data, notes}; values[i] belongs to
        layer i, or to the layers i..i+span-1; errors are standard errors.
    quality: [{name, unit, better: lower | higher, dense, pruned, error_dense, error_pruned, how}].
    healing: {recipe, tokens, seconds, texts, stages}, see `shoal.report.healing`.
    cost: [{name, dense, pruned, unit, how}].
    speed: [{phase, unit, dense, pruned, ratio, how, kind: measured | simulated}] with {median, low, high} each; ratio
        is the speed-up: above 1 the pruned model is faster, whatever the unit.
    proof: {passed, checks: [{name, passed, value, limit, how}]}.
    twice: {before, spans: [[first, last, value]], chosen: [first, last]}, of a scan of spans that run twice.
    samples: [{prompt, dense, pruned}]. candidates: [{notation, score, note}]. notes: [text].

    Every text may come from an untrusted source; it is escaped. Raises `UsageError` when a needed key is missing,
    `NotationError` and `PlanError` for a plan that cannot be drawn.
    """
    if missing := [key for key in _NEEDED if not data.get(key)]:
        raise UsageError(f"the report's data has no {missing[0]!r}; give {', '.join(_NEEDED)}")
    if not data["plan"].get("stacks"):
        raise UsageError("the report's plan has no stacks; give plan['stacks'] as {name: {depth, notation}}")
    found = stacks(data["plan"])
    parts = [sections.plan(data["plan"], found)]
    if data.get("scores"):
        parts.append(sections.scores(data["scores"], found))
    for key, make in _SECTIONS.items():
        if data.get(key):
            parts.append(make(data[key]))
    if data.get("twice"):
        parts.append(span_map(data["twice"]))
    if data.get("candidates"):
        parts.append(sections.candidates(data["candidates"], data["plan"].get("notation")))
    parts.append(sections.making(data))
    if data.get("notes"):
        parts.append(sections.notes(data["notes"]))
    return document(str(data["title"]), header(data, found), "".join(parts), data.get("version"))


_SECTIONS: dict[str, Callable[[Any], str]] = {
    "quality": sections.quality,
    "healing": healing,
    "speed": sections.speed,
    "cost": sections.cost,
    "proof": sections.proof,
    "samples": sections.samples,
}


def document(title: str, head: str, body: str, version: object) -> str:
    """The whole page around its HTML-safe head and body."""
    made = f"Made by Shoal {esc(version)}." if version else "Made by Shoal."
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy()}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{esc(title)}</title><style>{CSS}</style></head>\n<body>{head}<main>{body}</main>"
        f"<footer><p>{made} Layers are named by the base model's numbers, from 0.</p></footer>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _policy() -> str:
    """The browser runs no script but this page's own and loads nothing, whatever the inserted texts contain."""
    own = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{own}'; base-uri 'none'"
