"""The findings as a page of docs/."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any

from benchmarks.peers.checkpoints import DROPPED, LAYERS
from benchmarks.peers.environments import Environment
from benchmarks.peers.tools import LIMIT, Verdict

HEAD = """# Side by side with other tools

Written by `python -m benchmarks.peers`; do not edit. {date}, Python {python}, CPU, float32.

Every tool drops the same layers, {dropped} of {layers} (from 0), from the same tiny random checkpoints. What it writes
is then loaded by plain `AutoModelForCausalLM.from_pretrained` of transformers {judge} in a fresh process that knows
nothing of the tool. Its logits, in one pass without a cache and by a prefill with single cached steps, are compared
with those of the stock model whose dropped layers hand on what they are given.

* **right**: loads with no tensor missing or left over, and all logits are within {limit:g}.
* **refused**: the tool says that it cannot, and writes nothing.
* **does not finish**: an error on the way. **does not load**: the folder is written, and loading fails.
* **loads wrong**: loading succeeds, and the model is another one. transformers gives tensors that are missing random
  values and warns; where none is missing, nothing warns, and the table says **silently**.

| checkpoint | {tools} |
|---|{rules}
{rows}

## What was run

| | {tools} |
|---|{rules}
{versions}

{calls}

## The checkpoints

{layers} layers, random weights. Dropping the layers changes the logits by the number in the last column, so a tool that
drops other layers, or none, is not taken for right.

| checkpoint | what its config says of single layers | effect of the layers |
|---|---|---|
{checkpoints}

## What was wrong

| checkpoint | tool | finding |
|---|---|---|
{findings}
"""
CALLS = """* **no tool**: the layers taken out of `model.model.layers`, `num_hidden_layers` set, then `save_pretrained`.
* **mergekit**: `mergekit-yaml slices.yaml OUTPUT --no-copy-tokenizer --quiet`, merge method `passthrough`.
* **optipfair**: `prune_model_depth(model, layer_indices=[1, 4])`, then `save_pretrained`.
* **economize**: `economize.apply(model, DepthPruneConfig(num_blocks=2, layers=(2, 5)))`, which counts from 1, then
  `save_pretrained` of its base model (its own `save_pretrained` writes its settings and no model).
* **Shoal**: `shoal write BASE --plan 0,2,3,5,6,7 --output OUTPUT`."""

Verdicts = Mapping[str, Mapping[str, Verdict]]
"""{checkpoint: {tool: verdict}}."""


def page(
    verdicts: Verdicts, where: Mapping[str, Environment], fields: Mapping[str, Mapping[str, Any]], python: str
) -> str:
    """The whole page."""
    tools = list(where)
    versions = [
        f"| {what} | {' | '.join(_version(where[tool], tool if what == 'version' else what) for tool in tools)} |"
        for what in ("version", "transformers", "torch")
    ]
    wrong = [
        f"| {family} | {_name(tool)} | {found.kind}: {_cell(found.detail)} |"
        for family, row in verdicts.items()
        for tool, found in row.items()
        if found.kind != "right"
    ]
    return HEAD.format(
        date=dt.datetime.now(tz=dt.UTC).date(),
        python=python,
        dropped=" and ".join(map(str, DROPPED)),
        layers=LAYERS,
        judge=where["shoal"].versions["transformers"],
        limit=LIMIT,
        tools=" | ".join(_name(tool) for tool in tools),
        rules="---|" * len(tools),
        rows="\n".join(_row(family, row, tools) for family, row in verdicts.items()),
        versions="\n".join(versions),
        calls=CALLS,
        checkpoints="\n".join(_checkpoint(family, fields[family], row) for family, row in verdicts.items()),
        findings="\n".join(wrong) or "| | | nothing |",
    )


def _row(family: str, row: Mapping[str, Verdict], tools: list[str]) -> str:
    return f"| {family} | {' | '.join(_short(row[tool]) for tool in tools)} |"


def _short(found: Verdict) -> str:
    if found.kind != "loads wrong":
        return found.kind
    quiet = not any(found.facts.get(kind) for kind in ("missing", "unexpected", "mismatched"))
    off = max(found.facts["uncached"], found.facts["cached"])
    return f"**loads wrong{' silently' if quiet else ''}**, logits off by {off:.2g}"


def _checkpoint(family: str, fields: Mapping[str, Any], row: Mapping[str, Verdict]) -> str:
    effect = next((found.facts["effect"] for found in row.values() if "effect" in found.facts), None)
    said = "; ".join(f"`{name}` {_list(value)}" for name, value in fields.items())
    return f"| {family} | {said or 'nothing that differs'} | {'' if effect is None else f'{effect:.2g}'} |"


def _list(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], str):
        return " ".join(word.partition("_")[0] for word in value)
    return str(value)


def _version(where: Environment, what: str) -> str:
    return where.versions.get(what, "not installed" if where.error else "")


def _name(tool: str) -> str:
    return {"shoal": "Shoal"}.get(tool, tool)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
