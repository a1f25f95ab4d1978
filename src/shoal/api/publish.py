"""From what `prune` found to a written folder: the model card's table, the page, the records."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from shoal._version import __version__
from shoal.api.pruned import Pruned
from shoal.evaluation import Progress, Spread
from shoal.models.calls import device_of
from shoal.models.placed import is_placed
from shoal.plan import Plan, format_steps
from shoal.plan.price import FIGURES
from shoal.record import Record, command_line, environment
from shoal.report import render
from shoal.writing.folder import Written, write
from shoal.writing.planned_folder import write_planned
from shoal.writing.proof import Proof
from shoal.writing.stream import Streamed, stream


def publish(
    pruned: Pruned,
    output: str | Path,
    *,
    overwrite: bool = False,
    zero_parts: bool = False,
    shard_size: str = "5GB",
    config: str | None = None,
    seed: int | None = None,
    adapter: Path | None = None,
    planned: bool = False,
    progress: Progress | None = None,
) -> Written | Streamed:
    """Write `pruned` to the folder `output` with its records, model card and page, proved first (see `shoal.write`).
    `planned`: as a planned checkpoint, see `shoal.writing.planned_folder`.

    A model whose layers were left in their files, or that a device map spreads, is written from file to file, without
    a page (see `shoal.writing.stream`).
    """
    command = command_line()
    if planned:  # its file holds each storage once, whatever a stock checkpoint of the plan would hold
        pruned = replace(pruned, after=replace(pruned.after, written_params=pruned.after.params))
    record = Record(
        "prune",
        pruned.to_dict(),
        plan=pruned.plan.hash,
        base=pruned.spec.fingerprint,
        seed=seed,
        command=command,
    )
    options: dict[str, Any] = {
        "zero_parts": zero_parts,
        "overwrite": overwrite,
        "shard_size": shard_size,
        "records": [record.to_dict(), *(one.to_dict() for one in pruned.records)],
        "card": [*cost_rows(pruned), *quality_rows(pruned), *flat_speed_rows(pruned), *pruned.card],
        "command": " ".join(command),
        "config": config,
        "progress": progress,
    }
    page = partial(_page, pruned, " ".join(command), record.time)
    if planned:
        del options["zero_parts"]
        return write_planned(pruned.loaded, pruned.plan, output, weights=pruned.found.weights, page=page, **options)
    if is_placed(pruned.loaded.model):
        source = pruned.loaded.folder or pruned.loaded.source
        return stream(source, pruned.plan, output, weights=pruned.found.weights, **options)
    return write(
        pruned.loaded,
        pruned.plan,
        output,
        weights=pruned.found.weights,
        adapter=adapter,
        page=page,
        **options,
    )


def _page(pruned: Pruned, command: str, created: str, proof: Proof) -> str:
    return render(page_data(pruned, proof, command, created))


def page_data(pruned: Pruned, proof: Proof, command: str, created: str) -> dict[str, Any]:
    """What `shoal.report.render` draws."""
    plan, spec, model = pruned.plan, pruned.spec, pruned.loaded.model
    before = Plan.identity(spec)
    machine = environment()
    return {
        "title": f"{pruned.loaded.source}, {_by_how_much(pruned)}",
        "subtitle": f"{sum(depth for _, depth in before.base.depths)} layers before, method {pruned.method}",
        "created": created,
        "version": __version__,
        "command": command,
        "model": {
            "source": pruned.loaded.source,
            "family": spec.family,
            "params": spec.params,
            "layers": {stack.name: stack.depth for stack in spec.stacks},
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(device_of(model)),
        },
        "plan": {
            "notation": str(plan),
            "hash": plan.hash,
            "method": pruned.method,
            "dropped": {name: list(plan.dropped(name)) for name, _ in plan.stacks},
            "stacks": {
                name: {"depth": plan.depth(name), "notation": format_steps(steps)} for name, steps in plan.stacks
            },
        },
        "scores": _scores(pruned),
        "healing": next((one.numbers for one in pruned.records if one.what == "heal"), None),
        "quality": quality_rows(pruned),
        "cost": cost_rows(pruned),
        "speed": speed_rows(pruned),
        "proof": proof.to_dict(),
        "samples": _samples(pruned),
        "twice": _twice(pruned),
        "candidates": [{"notation": c.notation, "score": c.score, "note": c.note} for c in pruned.found.trace],
        "notes": [
            f"Shoal {__version__}, torch {machine['torch']}, transformers {machine['transformers']}, "
            f"Python {machine['python']}, {machine['cpus']} CPUs, {machine['system']}.",
            *(f"By the file {file['path']}, sha256 {file['sha256']}." for file in pruned.files),
        ],
    }


def _by_how_much(pruned: Pruned) -> str:
    """How many layers less or, where none is gone, more run than in the base."""
    gone = sum(len(pruned.plan.dropped(name)) for name, _ in pruned.plan.stacks)
    more = FIGURES["layers"](pruned.after) - FIGURES["layers"](pruned.before)
    many, way = (more, "deeper") if more > 0 and not gone else (gone, "shallower")
    return f"{many:g} layer{'' if many == 1 else 's'} {way}"


def _twice(pruned: Pruned) -> dict[str, Any] | None:
    """What a scan of spans that run twice found: the value as it was, and [first, last, value] of each."""
    trace = pruned.found.trace
    spans = [[*one.twice, one.score] for one in trace if one.twice is not None]
    chosen = next((one.twice for one in trace if one.notation == str(pruned.found.plan)), None)
    return {"before": trace[0].score, "spans": spans, "chosen": chosen} if spans else None


def _scores(pruned: Pruned) -> dict[str, Any] | None:
    scores = pruned.found.scores
    return None if scores is None else {**scores.to_dict(), "meaning": "low = removable", "values": list(scores.values)}


def cost_rows(pruned: Pruned) -> list[dict[str, Any]]:
    """Parameters, FLOPs and KV before and after."""
    size = pruned.loaded.model.dtype.itemsize
    shape = pruned.before.shape
    how = f"prompt {shape.prompt}, context {shape.context}, batch {shape.batch}, counted"

    def row(name: str, dense: float, after: float, unit: str, said: str = how) -> dict[str, Any]:
        return {"name": name, "dense": dense, "pruned": after, "unit": unit, "how": said}

    before, after = pruned.before, pruned.after
    return [
        row("parameters", before.params, FIGURES["params"](after), "", "by unique storage"),
        row("layers run per token", FIGURES["layers"](before), FIGURES["layers"](after), "", "counted"),
        row("prefill FLOPs", before.prefill_flops, after.prefill_flops, "FLOP"),
        row("decode FLOPs per token", before.decode_flops, after.decode_flops, "FLOP"),
        row("KV bytes per token", before.kv_per_token * size, after.kv_per_token * size, "bytes", "one sequence"),
    ]


def quality_rows(pruned: Pruned) -> list[dict[str, Any]]:
    """Perplexity, the generation check and agreement, dense and pruned."""
    found = pruned.evaluation
    if found is None:
        return []
    rows: list[dict[str, Any]] = []
    if found.dense is not None:
        text = found.perplexity.info.describe()
        how = f"{text}; {found.perplexity.tokens:,} tokens predicted, token-weighted"
        rows.append(
            {
                "name": "perplexity",
                "metric": "perplexity",
                "source": found.perplexity.info.source,
                "split": found.perplexity.info.split,
                "unit": "",
                "better": "lower",
                "dense": found.dense.value,
                "pruned": found.perplexity.value,
                "error_dense": None if found.dense.error is None else found.dense.value * found.dense.error,
                "error_pruned": None
                if found.perplexity.error is None
                else found.perplexity.value * found.perplexity.error,
                "how": how,
            }
        )
    if found.generation is not None and found.dense_generation is not None:
        how = f"{len(found.generation.generations)} prompts x {found.generation.new_tokens} greedy tokens"
        rows += [
            {
                "name": name,
                "unit": "share",
                "better": better,
                "dense": getattr(found.dense_generation, field),
                "pruned": getattr(found.generation, field),
                "how": how,
            }
            for name, field, better in (
                ("repeated 4-grams", "repetition", "lower"),
                ("ended by itself", "ended", "higher"),
            )
        ]
    if found.agreement is not None:
        same = found.agreement
        how = f"{same.info.describe()}; {same.tokens:,} tokens"
        rows += [
            {
                "name": name,
                "metric": metric,
                "source": same.info.source,
                "split": same.info.split,
                "unit": unit,
                "better": better,
                "dense": dense,
                "pruned": value,
                "error_pruned": error,
                "how": how,
            }
            for name, metric, unit, better, dense, value, error in (
                ("KL(dense || pruned)", "kl_divergence", "nats per token", "lower", 0.0, same.kl, same.kl_error),
                ("top-1 agreement", "top1_agreement", "share", "higher", 1.0, same.top1, same.top1_error),
            )
        ]
    return rows


def speed_rows(pruned: Pruned) -> list[dict[str, Any]]:
    """Prefill and decode times; the ratio is the speed-up, above 1 the pruned model is faster."""
    if pruned.bench is None:
        return []
    timed = pruned.bench.speed
    sides = {variant.name: variant for variant in timed.variants}
    if "pruned" not in sides:
        return []
    how = (
        f"batch {timed.batch}, prompt {timed.prompt}, {timed.new} tokens decoded, {timed.pairs} pairs, {timed.device} "
        f"{timed.dtype}, {timed.threads} threads; the pruned side is the live plan"
    )
    rows = []
    for phase, unit in (("prefill", "ms"), ("decode", "ms per token")):
        dense, after = getattr(sides["dense"], phase), getattr(sides["pruned"], phase)
        ratio: Spread = getattr(sides["pruned"], f"{phase}_ratio")
        rows.append(
            {
                "phase": phase,
                "unit": unit,
                "dense": _range(dense, 1000),
                "pruned": _range(after, 1000),
                "ratio": {"median": 1 / ratio.median, "low": 1 / ratio.high, "high": 1 / ratio.low},
                "how": how,
                "kind": timed.kind,
            }
        )
    return rows


def flat_speed_rows(pruned: Pruned) -> list[dict[str, Any]]:
    """`speed_rows` as rows of the model card's table: medians."""
    return [
        {
            "name": f"{row['phase']}, {row['unit']}",
            "unit": "",
            "dense": row["dense"]["median"],
            "pruned": row["pruned"]["median"],
            "how": row["how"],
        }
        for row in speed_rows(pruned)
    ]


def _range(spread: Spread, factor: float) -> dict[str, float]:
    return {"median": spread.median * factor, "low": spread.low * factor, "high": spread.high * factor}


def _samples(pruned: Pruned) -> list[dict[str, str]]:
    found = pruned.evaluation
    if found is None or found.generation is None or found.dense_generation is None:
        return []
    pairs = zip(found.dense_generation.generations, found.generation.generations, strict=True)
    return [{"prompt": d.prompt, "dense": d.text, "pruned": p.text} for d, p in list(pairs)[:4]]
