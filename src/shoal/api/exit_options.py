"""The options of the policy `exit` that stay when its threshold is calibrated."""

from __future__ import annotations

from dataclasses import dataclass, replace

from shoal.deciding.place import decides
from shoal.errors import UsageError
from shoal.plan import Plan
from shoal.plan.steps import runs
from shoal.registry import get


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
    name, _, rest = policy.partition(":")
    entry = get("policies", name.strip())
    if entry.name != "exit":
        raise UsageError(
            f"the policy {entry.name} leaves at no threshold of its own that could be calibrated; give exit with its "
            "options, as exit:layers=12-20,by=margin",
            code="U603",
        )
    pieces = [piece for piece in rest.split(",") if piece]
    for piece in pieces:
        if piece.partition("=")[0].strip() in ("after", "confidence"):
            raise UsageError(
                f"{piece!r:.60} fixes what calibrate chooses; give exit without after and confidence", code="U603"
            )
    text = ",".join([f"{name.strip()}:confidence=1", *pieces])
    pairs: list[str] = []
    for piece in pieces:
        if "=" in piece:
            pairs.append(piece)
        elif pairs:
            pairs[-1] += f",{piece}"
    own = {key: parameter.default for key, parameter in entry.options().items()} | entry.parse(pairs)
    return Exits(text, own["by"], own["head"], own["fill"], own["prefill"])
