"""plan.json: one line a step, dense runs folded, base layer numbers that never shift."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal.atomic import replacing
from shoal.errors import NotationError, UsageError, WriteError
from shoal.plan.notation import format_steps, parse_steps
from shoal.plan.plan import Base, Plan
from shoal.plan.select import maps
from shoal.plan.sources import STACK_NAME
from shoal.plan.steps import Step, runs

FORMAT = "shoal-plan/1"
MAX_BYTES = 4_000_000
PLANNED = "shoal"
"""The model type of a planned checkpoint: `shoal.planned` knows how it is loaded."""


def plan_to_json(plan: Plan, *, weights: str | None = None) -> str:
    """The text of plan.json; `weights` is the hash of the file of new tensors that lies beside it."""
    base: dict[str, Any] = {
        "family": plan.base.family,
        "fingerprint": plan.base.fingerprint,
        "stacks": dict(plan.base.depths),
    }
    if plan.base.source is not None:
        base["source"] = plan.base.source
    stacks = {name: format_steps(steps).split(",") for name, steps in plan.stacks}
    lines = [
        f'{{"format": "{FORMAT}",',
        f' "base": {json.dumps(base)},',
        f' "hash": "{plan.hash}",',
        *([f' "weights": "{weights}",'] if weights is not None else []),
        ' "stacks": {',
    ]
    for number, (name, pieces) in enumerate(stacks.items()):
        comma = "," if number < len(stacks) - 1 else ""
        body = ",\n".join(f"   {json.dumps(piece)}" for piece in pieces)
        lines.append(f"  {json.dumps(name)}: [\n{body}]{comma}")
    return "\n".join([*lines, " }}"]) + "\n"


def plan_from_json(text: str | bytes, *, where: str = "the plan") -> Plan:
    """Read the text of plan.json; any bytes at all give a plan or a `NotationError`, never another exception."""
    data = _read(text, where)
    base = _base(data.get("base"), where)
    stacks = data.get("stacks")
    if not isinstance(stacks, dict) or set(stacks) != {name for name, _ in base.depths}:
        raise NotationError(f"{where} must give steps for the stacks {', '.join(n for n, _ in base.depths)}")
    plan = Plan(base, tuple((name, _steps(stacks[name], name, depth, where)) for name, depth in base.depths))
    if data.get("hash") not in (None, plan.hash):
        raise NotationError(
            f"{where} was edited by hand: its steps do not match its hash; remove the hash to accept them"
        )
    return plan


def in_order(data: object, stacks: Sequence[str]) -> object:
    """The content of a plan.json that a file with sorted fields held: with the stacks in the model's order again."""
    base = data.get("base") if isinstance(data, dict) else None
    depths = base.get("stacks") if isinstance(base, dict) else None
    if not isinstance(data, dict) or not isinstance(base, dict) or not isinstance(depths, dict):
        return data
    ordered = {name: depths[name] for name in stacks} if set(depths) == set(stacks) else depths
    return data | {"base": base | {"stacks": ordered}}


def save_plan(plan: Plan, path: str | Path, *, weights: str | None = None) -> None:
    """Write plan.json so that a kill leaves the old file or the new one.

    Raises W215 when the folder does not exist or cannot be written, U656 for notation, which names no model.
    """
    if not isinstance(plan, Plan):
        raise UsageError(
            f"{str(plan)[:60]!r} names no model, which plan.json must; give shoal.parse_plan(text, "
            "Plan.identity(shoal.inspect(model)))",
            code="U656",
        )
    try:
        with replacing(path) as draft:
            draft.write_bytes(plan_to_json(plan, weights=weights).encode())
    except OSError as error:
        raise WriteError(f"cannot write the plan {path}: {error.strerror}; choose another place", code="W215") from None


def is_plan_file(text: str) -> bool:
    """Does `text` name a plan.json or a folder with one, rather than being depth notation?"""
    try:
        return text.endswith(".json") or (text != "" and Path(text).is_dir())
    except (OSError, ValueError):  # notation may be longer than a name, or hold what no name does
        return False


def load_plan(path: str | Path) -> Plan:
    """Read plan.json from a file, or from a folder that `shoal write` made. Raises `NotationError`."""
    text, where = _bytes(path)
    return plan_from_json(text, where=where)


def weights_hash(path: str | Path) -> str | None:
    """The hash of the new tensors that the plan of this file or folder was saved with, or None. Raises
    `NotationError`."""
    text, where = _bytes(path)
    found = _read(text, where).get("weights")
    if not isinstance(found, str | None):
        raise NotationError(f"{where}: weights is {found!r:.40}; expected a hash such as sha256:0a1b")
    return found


def _bytes(path: str | Path) -> tuple[bytes, str]:
    """The bytes of a plan.json, or of that of a folder, and the file's name."""
    path = Path(path)
    if path.is_dir():
        path = path / "shoal" / "plan.json"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise NotationError(f"{path} is larger than {MAX_BYTES // 1_000_000} MB; this is not a plan.json")
        return path.read_bytes(), str(path)
    except OSError as error:
        if is_planned(path.parent.parent):
            raise NotationError(
                f"{path.parent.parent} is a planned checkpoint, which holds its plan in its config; give it as the "
                "model, or the plan that it was written with"
            ) from None
        raise NotationError(
            f"cannot read the plan {path}: {error.strerror}; give a plan.json or a folder that shoal wrote"
        ) from None


def is_planned(folder: Path) -> bool:
    """Whether a folder is a planned checkpoint, by its config."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get("model_type") == PLANNED


def _read(text: str | bytes, where: str) -> dict[str, Any]:
    if len(text) > MAX_BYTES:
        raise NotationError(f"{where} is larger than {MAX_BYTES // 1_000_000} MB; this is not a plan.json")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NotationError(f"{where} is not JSON ({type(error).__name__}); expected a plan.json") from None
    found = data.get("format") if isinstance(data, dict) else None
    if not isinstance(data, dict) or found != FORMAT:
        shown = repr(found[:40]) if isinstance(found, str) else "none"
        newer = isinstance(found, str) and re.fullmatch(r"shoal-plan/[1-9][0-9]{0,5}", found)
        if newer:
            raise NotationError(
                f"{where} has the format {shown}, and this Shoal reads {FORMAT!r}; install a newer Shoal"
            )
        raise NotationError(f"{where} is not a plan of the format {FORMAT!r} (its format: {shown}); give a plan.json")
    return data


def _base(data: object, where: str) -> Base:
    if not isinstance(data, dict):
        raise NotationError(f"{where} names no base model; expected base: {{family, fingerprint, stacks}}")
    family, fingerprint, source = data.get("family"), data.get("fingerprint"), data.get("source")
    depths = data.get("stacks")
    if not isinstance(family, str) or not isinstance(fingerprint, str) or not isinstance(source, str | None):
        raise NotationError(f"{where}: base.family, base.fingerprint and base.source must be text")
    if not isinstance(depths, dict) or not depths:
        raise NotationError(f"{where}: base.stacks must give each stack's depth, as in {{'decoder': 30}}")
    for name, depth in depths.items():
        if not STACK_NAME.fullmatch(name):
            raise NotationError(f"{where}: base.stacks has the name {name[:40]!r}; expected letters, digits and _")
        if type(depth) is not int or not 0 < depth < 1_000_000:
            raise NotationError(f"{where}: base.stacks[{name!r}] is {depth!r:.40}; expected a number of layers")
    return Base(family, fingerprint, tuple(depths.items()), source)


def _steps(pieces: object, stack: str, depth: int, where: str) -> tuple[Step, ...]:
    if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
        raise NotationError(f"{where}: stack {stack!r} must be a list of pieces such as '0-11'")
    steps = parse_steps(",".join(pieces))
    named = [layer for run in runs(steps) for layer in run.layers_named]
    named += [one.last for one in maps(steps)]
    if max(named, default=0) >= depth:
        raise NotationError(f"{where}: stack {stack!r} names layer {max(named)}; its layers are 0 to {depth - 1}")
    return steps
