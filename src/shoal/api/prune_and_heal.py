"""prune and heal in one: the plan that a method finds is trained, judged and published as one result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from shoal.api.assess import bench, evaluate
from shoal.api.heal import Healed, heal
from shoal.api.heal_publish import card_rows, require_better
from shoal.api.pruned import Pruned
from shoal.evaluation import Progress
from shoal.healing.processes import require_one_process
from shoal.record import Record, command_line


def prune_and_heal(
    pruned: Pruned,
    recipe: str,
    *,
    anyway: bool = False,
    assess: bool = False,
    test: dict[str, Any] | None = None,
    seed: int = 0,
    folder: Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> tuple[Pruned, Healed]:
    """`pruned` with its plan healed by `recipe`, and what healing said. `options` are those of `heal`.

    `folder` keeps checkpoints, and is gone on with when it holds those of this very run. `assess`: evaluate and time
    the healed plan, on the text that `test` names as `evaluate` takes it. Raises U640 unless `anyway`, and what `heal`
    raises; U676 for one of several processes.
    """
    require_one_process("pruning with healing")
    healed = heal(
        pruned.loaded, pruned.plan, recipe, weights=pruned.found.weights, seed=seed, folder=folder, resume=True,
        progress=progress, **options,
    )  # fmt: skip
    if healed.stopped:
        return pruned, healed
    if not anyway:
        require_better(healed)
    record = Record(
        "heal", healed.to_dict(), plan=healed.plan.hash, base=pruned.spec.fingerprint, seed=seed, command=command_line()
    )
    found = replace(pruned.found, plan=healed.plan, weights=healed.weights)
    made = replace(pruned, plan=healed.plan, found=found, records=(record,), card=tuple(card_rows(healed)))
    if assess:
        ran: dict[str, Any] = {"plan": healed.plan, "weights": healed.weights, "progress": progress}
        worth = evaluate(pruned.loaded, **(test or {}), **ran)
        made = replace(made, evaluation=worth, bench=bench(pruned.loaded, seed=seed, **ran))
    return made, healed
