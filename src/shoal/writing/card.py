"""README.md of a written folder: the model card, with the plan, what it cost and how to load the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shoal._version import __version__
from shoal.models.kinds import CAUSAL, DECODERS
from shoal.plan import Plan, format_plan, strip
from shoal.writing.card_data import front_matter, pipeline_tag
from shoal.writing.left_out import listed
from shoal.writing.local_paths import without_folders
from shoal.writing.proof import Proof

BUILTIN = {"smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}
"""Hub id and license of the built-in model, whose folder carries no card."""
_MAX_CARD = 1_000_000
Layers = Sequence[int] | Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Origin:
    """What is known of the base model for the card."""

    name: str
    """How the base is called in the text; never a path of this machine."""
    hub_id: str | None = None
    license: dict[str, str] | None = None
    """Front matter of the license: license, and for "other" its name and link."""
    task: str | None = None
    """The base's `pipeline_tag`, from its card."""


def origin(source: str, folder: Path | None) -> Origin:
    """What the source's name, its card and its LICENSE say about the base."""
    if source in BUILTIN:
        hub_id, license_id = BUILTIN[source]
        return Origin(hub_id, hub_id, {"license": license_id})
    if folder is not None:
        tag = card_data(folder / "README.md").get("pipeline_tag")
        return Origin(folder.resolve().name, None, _license(folder), tag if isinstance(tag, str) else None)
    path = Path(source)
    if source.count("/") == 1 and not path.is_absolute() and not path.exists():
        return Origin(source, source)
    return Origin(path.name or source)


def model_card(
    plan: Plan,
    base: Origin,
    *,
    title: str,
    base_layers: Layers,
    chain: Sequence[str] = (),
    auto: str = CAUSAL,
    rows: Sequence[Mapping[str, Any]] = (),
    changed: Mapping[str, tuple[Any, Any]] | None = None,
    left_out: tuple[str, ...] = (),
    command: str | None = None,
    proof: Proof | None = None,
    planned: bool = False,
    inputs: str | None = None,
) -> str:
    """The text of README.md; `planned`: of a planned checkpoint. `inputs`: the name of the model's main input.

    `rows`: the before-and-after table, {name, unit, dense, pruned, how} each; those with `metric`, `source`, `split` or
    `read` stand in the front matter, too (see `shoal.writing.card_data`). `base_layers`: for every layer of the new
    model (by stack, where it has several) the layer of the first base that it is; `chain`: all prunings, the first
    one first. `auto`: the Auto class that loads it. `changed`: config fields, (old, new). `left_out`: tensors of the
    base that are no part of its model.
    """
    task = base.task or pipeline_tag(auto, inputs)
    data = front_matter(base=base.hub_id, license_of=base.license, task=task, rows=rows, title=_line(title))
    front = f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---"
    parts = [front, f"# {_line(title)}", _summary(plan, base, planned)]
    if rows:
        parts.append(_table(rows))
    parts += [_plan(plan, base_layers, chain), _loading(title, auto, planned)]
    if changed:
        fields = "\n".join(f"* `{name}`: {_short(old)} → {_short(new)}" for name, (old, new) in changed.items())
        parts.append(f"## Changed config fields\n\n{fields}")
    if left_out:
        parts.append(
            f"## Left out\n\nTensors of the base that are no part of its model in transformers: {listed(left_out)}."
        )
    parts.append(_making(command, proof))
    return "\n\n".join(parts) + "\n"


def _summary(plan: Plan, base: Origin, planned: bool) -> str:
    name = f"[{base.hub_id}](https://huggingface.co/{base.hub_id})" if base.hub_id else f"`{_line(base.name)}`"
    counts = {stack: f"{len(plan.layers(stack))} layers in place of {plan.depth(stack)}" for stack, _ in plan.stacks}
    several = ", ".join(f"{stack} {count}" for stack, count in counts.items())
    depth = several if len(counts) > 1 else next(iter(counts.values()))
    kind = (
        "It is a planned checkpoint: the tensors that its plan reads, each once. `transformers` loads it where Shoal "
        "is installed."
        if planned
        else "It is a stock `transformers` model: no code of its own is needed to load it."
    )
    return f"{name} with {depth}, made by Shoal {__version__}. {kind}"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = "| | before | after | unit | how |\n|---|---:|---:|---|---|"
    lines = [
        "| " + " | ".join(_cell(row.get(key)) for key in ("name", "dense", "pruned", "unit", "how")) + " |"
        for row in rows
    ]
    return "\n".join(["## Before and after", "", head, *lines])


def _plan(plan: Plan, base_layers: Layers, chain: Sequence[str]) -> str:
    names = [name for name, _ in plan.stacks]
    strips, left_out, before = [], [], []
    for name in names:
        mark, whose = ("", "") if len(names) == 1 else (f"{name}: ", f" of {name}")
        strips.append(f"{mark}{strip(plan, name)}")
        numbers = ", ".join(map(str, plan.dropped(name)))
        left_out.append(f"Left out{whose}: {numbers}." if numbers else f"No layer{whose} is left out.")
        own = base_layers[name] if isinstance(base_layers, Mapping) else base_layers
        if tuple(own) != plan.layers(name):
            before.append(f"{mark}{', '.join(map(str, own))}")
    drawn = "\n".join(strips)
    text = (
        f"## Plan\n\n```\n{format_plan(plan)}\n{drawn}\n```\n\n"
        "One mark for each layer of the base, layer 0 first: █ runs, ▀ attention only, ▄ mlp only, "
        f"↻ runs more than once, · left out. {' '.join(left_out)} Layers are counted from 0."
    )
    if before:
        numbers = "; ".join(before)
        text += f"\n\nThe base was pruned before; in the numbers of its own base, the layers are {numbers}."
    if len(chain) > 1:
        steps = ", then ".join(f"`{_line(text)}`" for text in chain)
        text += f"\n\nPruned {len(chain)} times, each plan in the numbers of the model before it: {steps}."
    return text


def _loading(title: str, auto: str, planned: bool) -> str:
    first = "import shoal.auto\n" if planned else ""
    if auto in DECODERS[1:]:
        code = (
            f"from transformers import {auto}, AutoProcessor\n\n"
            f"model = {auto}.from_pretrained({_line(title)!r})\n"
            f"processor = AutoProcessor.from_pretrained({_line(title)!r})"
        )
    elif auto != CAUSAL:
        code = f"{first}from transformers import {auto}\n\nmodel = {auto}.from_pretrained({_line(title)!r})"
    else:
        code = (
            f"{first}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({_line(title)!r})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({_line(title)!r})"
        )
    return f"## How to load it\n\nWith the path or the hub id of this folder:\n\n```python\n{code}\n```"


def _making(command: str | None, proof: Proof | None) -> str:
    text = "## How it was made"
    if command:
        text += f"\n\n```\n{without_folders(command).replace('```', '')}\n```"
    if proof is None:
        return f"{text}\n\nThe folder was not proven; `shoal verify` can do it."
    lines = "\n".join(
        f"* {'passed' if c.passed else 'FAILED'}: {c.name} = {_short(c.value)} (limit {_short(c.limit)})"
        for c in proof.checks
    )
    how = "Its files were compared with"
    if "device" in proof.environment:
        how = "The folder was loaded in a fresh process and compared with"
    where = ", ".join(str(proof.environment[key]) for key in ("dtype", "device") if key in proof.environment)
    return (
        f"{text}\n\n{how} {proof.against}{f' ({where})' if where else ''}:\n\n{lines}\n\n"
        "`shoal/plan.json` holds the plan, `shoal/proof.json` the proof, `shoal/records.jsonl` the measurements."
    )


def _license(folder: Path) -> dict[str, str] | None:
    """From the front matter of the base's card, else recognised in its LICENSE, else "other" with a link to it."""
    known = card_data(folder / "README.md")
    if isinstance(known.get("license"), str):
        names = ("license", "license_name", "license_link")
        return {name: known[name] for name in names if isinstance(known.get(name), str)}
    file = next((f for f in sorted(folder.glob("LICEN[SC]E*")) if f.is_file() and not f.is_symlink()), None)
    if file is None or file.stat().st_size > _MAX_CARD:
        return None
    return _recognised(file.read_text(encoding="utf-8", errors="replace")) or {
        "license": "other",
        "license_link": file.name,
    }


def _recognised(text: str) -> dict[str, str] | None:
    """Apache 2.0 and MIT by their title and length: a longer text holds terms of its own."""
    words = " ".join(text.lower().split())
    if words.startswith("apache license version 2.0") and len(words) < 12_000:
        return {"license": "apache-2.0"}
    if "mit license" in words[:40] and "modified" not in words[:40] and len(words) < 1_300:
        return {"license": "mit"}
    return None


def card_data(file: Path) -> dict[str, Any]:
    """The front matter of a card; empty where there is none that can be read."""
    if not file.is_file() or file.stat().st_size > _MAX_CARD:
        return {}
    pieces = file.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(pieces) < 3 or pieces[0].strip("\ufeff\n "):
        return {}
    try:
        data = yaml.safe_load(pieces[1])
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError):
        return {}
    return data if isinstance(data, dict) else {}


def _cell(value: Any) -> str:
    return "" if value is None else _short(value).replace("|", "\\|")


def _short(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else _line(str(value))
    return text if len(text) <= 200 else text[:197] + "..."


def _line(text: str) -> str:
    """One line without markup: names come from other people's files."""
    return " ".join(text.replace("<", "&lt;").replace("`", "'").split())
