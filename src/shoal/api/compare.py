"""compare: every method at every budget under one harness, cell by cell, resumable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shoal._version import __version__
from shoal.api.assess import opened_base
from shoal.api.comparison_file import ComparisonFile
from shoal.api.distribute import distribute
from shoal.api.harness import DENSE, Harness
from shoal.api.study import Cell, ExpectedSeconds, Protocol, cells
from shoal.api.tracked import tell_cell
from shoal.atomic import write_atomically
from shoal.evaluation import Progress
from shoal.evaluation.cluster_resources import Cluster, require_reachable
from shoal.healing.processes import require_one_process
from shoal.models.kinds import require_causal
from shoal.plan import Plan, parse_plan, strip
from shoal.record import command_line, environment
from shoal.report import render_comparison
from shoal.report.summary import advice, columns, entries, markdown
from shoal.report.tracking import require_trackers, tracking


@dataclass(frozen=True)
class Compared:
    """What `compare` found."""

    facts: dict[str, Any]
    rows: tuple[dict[str, Any], ...]
    """The dense model first, then the cells in the order in which they were asked for."""
    folder: Path
    identity: Plan

    def to_dict(self) -> dict[str, Any]:
        """Plain data for --json and the page."""
        return {"facts": self.facts, "rows": list(self.rows), "folder": str(self.folder), "advice": self.advice()}

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Heads and rows, dense first, then by budget and perplexity."""
        return columns(*entries(self.rows))

    def advice(self) -> list[str]:
        """Which method to use here, one sentence for each budget."""
        return advice(*entries(self.rows))


def compare(
    source: Any,
    folder: str | Path,
    *,
    methods: Sequence[str] = (),
    budgets: Sequence[str] = ("params=0.9,0.8,0.7",),
    seeds: Sequence[int] = (0,),
    protocol: Protocol | None = None,
    ray: str | None = None,
    workers: int = 2,
    gpus_per_worker: float = 0.0,
    track: Sequence[str] = (),
    progress: Progress | None = None,
    **options: Any,
) -> Compared:
    """Run every cell that `folder` does not hold yet, keep each when it is done, and answer all of them.

    See `cells` for methods and budgets, `Protocol` for data, `options` go to `shoal.load`. A method that fails is a row
    with an error. `ray`: the address of a Ray cluster, or `local`; cells are its tasks then, the longest first. Each of
    `workers` holds the model, read where it was read here, on GPUs of its own with `gpus_per_worker`; what they find is
    timed afterwards, in this process, one plan after the other. `track`: experiment trackers
    (`shoal.report.tracking`) that are told of every cell. Raises before anything runs `UsageError` (U676 where
    plans are healed in one of several processes, what `machines` raises beside `ray`), `DataError` and `ModelError`.
    """
    require_trackers(track)
    protocol, place = protocol or Protocol(), Path(folder).expanduser()
    if protocol.heal is not None:
        require_one_process("a comparison with healing")
    asked = cells(methods, budgets, seeds)
    loaded = opened_base(source, **options)
    require_causal(loaded.model, "compare")
    cluster = Cluster(ray, workers, gpus_per_worker)
    require_reachable(cluster, loaded)
    harness = Harness.of(loaded, protocol, place)
    for budget in dict.fromkeys(cell.budget for cell in asked):
        harness.budget(budget)
    facts = harness.facts()
    store = ComparisonFile(place, facts)
    wanted: list[Cell | None] = [None, *asked]
    keys = [DENSE if cell is None else cell.key for cell in wanted]
    left = [cell for cell, key in zip(wanted, keys, strict=True) if not _kept(key, store, harness)]
    done = len(wanted) - len(left)
    harness.learn(store.done.values())
    if progress is not None:
        progress(done, len(wanted), "cells")
    with tracking(track, "compare", {"model": loaded.source, "cells": len(asked)}) as told:
        for row in distribute(harness, left, cluster=cluster, expected=ExpectedSeconds(store.done.values())):
            weights = row.pop("weights", {})
            if ray is None:
                store.add(row := harness.timed(row, weights))
            else:
                store.hold(row["key"], weights if harness.untimed(row) else {})
                store.add(row)
            tell_cell(told, row)
            done += 1
            if progress is not None:
                progress(done, len(wanted), "cells")
        for row in _timed(keys, store, harness, progress):
            tell_cell(told, row, times=True)
    return Compared(facts, tuple(store.done[key] for key in keys), place, harness.identity())


def _kept(key: str, store: ComparisonFile, harness: Harness) -> bool:
    """Whether the cell need not run again: it is done, and timed or can be."""
    return key in store.done and not (harness.untimed(store.done[key]) and store.held(key) is None)


def _timed(
    keys: Sequence[str], store: ComparisonFile, harness: Harness, progress: Progress | None
) -> Iterator[dict[str, Any]]:
    """The cells that have no times yet, timed one after the other, when no worker is busy any more."""
    left = [key for key in keys if harness.untimed(store.done[key])]
    for number, key in enumerate(left):
        store.add(row := harness.timed(store.done[key], store.held(key) or {}))
        store.release(key)
        if progress is not None:
            progress(number + 1, len(left), "times")
        yield row


def publish(found: Compared) -> Path:
    """Write `results.md` and `report.html` beside the cells; the path of the page."""
    command, created = " ".join(command_line()), datetime.now(UTC).isoformat(timespec="seconds")
    dense, rows = entries(found.rows)
    said = "\n".join(f"- {line}" for line in advice(dense, rows))
    protocol = {name.replace("_", " "): value for name, value in found.facts["protocol"].items()}
    facts = {name: ", ".join(map(str, v)) if isinstance(v, list | tuple) else v for name, v in protocol.items()}
    machine = environment()
    facts |= {name: machine[name] for name in ("cpus", "torch", "transformers", "python", "system")}
    data = {
        "title": f"Methods compared on {found.facts['source']}",
        "rows": found.rows,
        "strips": {entry.plan: _strip(entry.plan, found) for entry in rows if entry.plan},
        "facts": facts,
        "command": command,
        "created": created,
        "version": __version__,
    }
    text = f"{markdown(dense, rows)}\n{said}\n\nMade on {created} by `{command}`.\n"
    for name, content in (("results.md", text), ("report.html", render_comparison(data))):
        write_atomically(found.folder / name, content)
    return found.folder / "report.html"


def _strip(plan: str, found: Compared) -> str:
    """The strip of the decoder, or of the first stack."""
    return strip(parse_plan(plan, found.identity))
