"""From what `heal` made to a folder: a stock checkpoint where a class can hold it, else a plan with its tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shoal.api.heal import Healed
from shoal.api.judged import HELD, WATCHED
from shoal.api.pruned import Pruned
from shoal.api.publish import page_data
from shoal.atomic import publish, staged
from shoal.deciding.gating import ungated
from shoal.deciding.policy_file import LearnedPolicy
from shoal.deciding.policy_text import make_policy
from shoal.errors import UsageError, WriteError
from shoal.evaluation import Progress
from shoal.executing.weights import Tensors, load_weights, save_planned
from shoal.models.load import Loaded
from shoal.models.placed import is_placed
from shoal.models.stacks import unwrap
from shoal.plan import Plan, Shape, cost, shapes_of
from shoal.record import Record, command_line
from shoal.report import render
from shoal.scores import Found
from shoal.writing.folder import Written, write
from shoal.writing.output import disk_errors, final_path, refuse_output
from shoal.writing.proof import Proof
from shoal.writing.surgery import blueprint, require_writable


def why_no_checkpoint(loaded: Loaded, plan: Plan, weights: Tensors) -> str | None:
    """Why the result of healing will be a plan and no checkpoint; None where it will be one."""
    try:
        # what a device map spreads is written from its files
        model = unwrap(loaded.model) if is_placed(loaded.model) else require_writable(loaded.model)
        blueprint(model, plan, weights=dict(weights))
    except WriteError as error:
        return str(error)
    return None


def publish_healed(
    healed: Healed,
    output: str | Path,
    *,
    overwrite: bool = False,
    anyway: bool = False,
    config: str | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
) -> Written | Path:
    """Write the result to the folder `output`: a proved stock checkpoint, or where no stock class can hold the plan,
    the plan with its tensors, which `--plan` takes.

    Raises U640 for a result that held-out text does not like better than its start, unless `anyway`, and what
    `shoal.write` raises.
    """
    if not anyway:
        require_better(healed)
    command = command_line()
    plan = without_own_gates(healed)
    record = Record(
        "heal", healed.to_dict(), plan=plan.hash, base=healed.plan.base.fingerprint, seed=seed, command=command
    )
    if why_no_checkpoint(healed.loaded, plan, healed.weights) is not None:
        made = {"recipe": healed.recipe, "tokens": healed.tokens, "command": " ".join(command), "time": record.time}
        policy = LearnedPolicy.of(healed.policy, healed.plan, healed.weights, made) if healed.policy else None
        return publish_plan(healed.plan, healed.weights, output, record, overwrite=overwrite, policy=policy)
    return write(
        healed.loaded,
        plan,
        output,
        weights=healed.weights,
        overwrite=overwrite,
        records=[record.to_dict()],
        card=card_rows(healed),
        command=" ".join(command),
        config=config,
        page=lambda proof: render(_page(healed, plan, proof, " ".join(command), record.time)),
        progress=progress,
    )


def without_own_gates(healed: Healed) -> Plan:
    """The plan as a checkpoint may hold it: without gates that the policy's text puts into any plan, having learned
    nothing for them."""
    spec = healed.loaded.opened.spec
    if not healed.policy or make_policy(healed.policy, healed.plan, spec).start(spec):
        return healed.plan
    bare = ungated(healed.plan)
    return bare if make_policy(healed.policy, bare, spec).plan == healed.plan else healed.plan


def require_better(healed: Healed) -> None:
    """Raise U640 for a result that held-out text does not like better than its start."""
    if healed.better:
        return
    judged = healed.texts.get(HELD)
    found = "" if judged is None else f" (perplexity {judged.before.value:.2f}, then {judged.after.value:.2f})"
    raise UsageError(
        f"held-out text does not like the healed plan better than its start{found}, so nothing is written; use a lower "
        "rate (--set rate=1e-4) or more tokens, or write it all the same (--anyway)",
        code="U640",
    )


def card_rows(healed: Healed) -> list[dict[str, Any]]:
    """Rows of the model card: both texts, and what the healing read."""
    rows = []
    for name in (HELD, WATCHED):
        judged = healed.texts.get(name)
        if judged is not None:
            rows.append(
                {
                    "name": f"perplexity, {'held-out training' if name == HELD else 'second'} text",
                    "metric": "perplexity",
                    "source": judged.dense.info.source,
                    "split": judged.dense.info.split,
                    "unit": "",
                    "dense": judged.dense.value,
                    "pruned": judged.after.value,
                    "how": f"{judged.before.value:.4g} before healing; {judged.dense.info.describe()}",
                }
            )
    read = healed.data["train"]["source"]
    said = f"recipe {healed.recipe}, {healed.seconds:.0f} s; {read}"
    learned = {"name": "healed on tokens", "unit": "", "dense": None, "pruned": healed.tokens, "how": said}
    return [*rows, learned | {"read": read}]


def _page(healed: Healed, plan: Plan, proof: Proof, command: str, created: str) -> dict[str, Any]:
    """What `shoal.report.render` draws: the page of the plan, with what healing did."""
    spec = healed.loaded.opened.spec
    shape = Shape()
    before = cost(Plan.identity(spec), spec, shape)
    after = cost(plan, spec, shape, shapes_of(healed.weights))
    plain = Pruned(healed.loaded, spec, plan, "listed", Found(plan), before, after, None)
    rows = [{**row, "unit": "", "better": "lower"} for row in card_rows(healed) if row["name"].startswith("perplexity")]
    title = f"{healed.loaded.source}, healed by {healed.recipe}"
    return page_data(plain, proof, command, created) | {"title": title, "quality": rows, "healing": healed.to_dict()}


def publish_plan(
    plan: Plan, weights: Tensors, output: str | Path, record: Record, *, overwrite: bool = False,
    policy: LearnedPolicy | None = None,
) -> Path:  # fmt: skip
    """Write `plan` with the tensors that it names, the record of how it was made and the `policy` to the folder
    `output`, which `--plan` takes; the folder. Raises what `shoal.write` raises for a folder that cannot be written."""
    final = final_path(Path(output))
    refuse_output(final, overwrite=overwrite)
    with disk_errors(final), staged(final) as staging:
        save_planned(plan, staging, dict(weights))
        if policy is not None:
            policy.save(staging / "shoal" / "policy.json")
        text = json.dumps(record.to_dict(), ensure_ascii=False, allow_nan=False) + "\n"
        (staging / "shoal" / "records.jsonl").write_text(text, encoding="utf-8")
        load_weights(staging)  # reads what was written, and compares the hash
        publish(staging, final, overwrite=overwrite)
    return final
