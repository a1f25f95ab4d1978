"""The options of the policy `exit` that stay when its threshold is calibrated."""

from __future__ import annotations

from dataclasses import dataclass, replace

from shoal.errors import UsageError
from shoal.plan import Plan
from shoal.plan.steps import decides, runs
from shoal.registry import get
from shoal.spelling import options_of, read


@dataclass(frozen=True)
class Exits:
    """The options of `exit` that stay when its threshold is calibrated."""

    text: str
    by: str
    head: str
    fill: str
    prefill: bool


def held_to(exits: Exits, plan: Plan) -> Exits:
    """With the fill of a plan that has exits of its own, whatever was typed beside it."""
    fills = {run.kv.fill for run in runs(plan.steps())} - {None}
    if not decides(plan.steps()) or not fills:
        return exits
    return replace(exits, fill="+".join(sorted(str(fill) for fill in fills)))


def exit_options(policy: str) -> Exits:
    """Read `exit:layers=8-20,by=margin`. Raises U603 for a policy that has no thresholds to choose."""
    spelled = read(policy)
    entry = get("policies", spelled.name)
    if entry.name != "exit":
        raise UsageError(
            f"the policy {entry.name} leaves at no threshold of its own that could be calibrated; give exit with its "
            "options, as exit:layers=12-20,by=margin",
            code="U603",
        )
    for key, value in spelled.options:
        if key in ("after", "confidence"):
            raise UsageError(
                f"{f'{key}={value}'!r:.60} fixes what calibrate chooses; give exit without after and confidence",
                code="U603",
            )
    own = {key: parameter.default for key, parameter in entry.options().items()} | options_of(entry, spelled)
    text = str(replace(spelled, options=(("confidence", "1"), *spelled.options)))
    return Exits(text, own["by"], own["head"], own["fill"], own["prefill"])
