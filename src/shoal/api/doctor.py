"""What a checkpoint is and what is wrong with it, from its metadata alone; and what a plan would make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.api.outlook import Outlook, outlook_of
from shoal.errors import ModelError, UsageError
from shoal.executing.weights import Tensors, load_weights
from shoal.models.diagnosis import Diagnosis, diagnose, read_metadata
from shoal.models.load import structure
from shoal.models.opened import open_model
from shoal.models.own_code import own_code_known
from shoal.plan import Plan, Spec, is_plan_file, load_plan, parse_plan, parse_steps, require, shapes_of
from shoal.plan.select import plain_layers
from shoal.writing.reference import quiet


@dataclass(frozen=True)
class Examined:
    """What the doctor says."""

    source: str
    diagnosis: Diagnosis
    spec: Spec
    """Of the model of the config, mended where it can be."""
    dtype: str
    outlook: Outlook
    """Of the plan that was asked about, else of the whole model."""
    planned: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        stacks = {stack.name: stack.depth for stack in self.spec.stacks}
        seen = self.outlook.to_dict()
        return {
            "source": self.source,
            "sound": not self.diagnosis.broken,
            "mendable": bool(self.diagnosis.findings) and not self.diagnosis.unrepairable,
            "family": self.spec.family,
            "layers": stacks,
            "dtype": self.dtype,
            "findings": [finding.to_dict() for finding in self.diagnosis.findings],
            "notes": list(self.diagnosis.notes),
            "changed": {name: list(pair) for name, pair in self.diagnosis.changed.items()},
            **seen["before"],
            "engines": seen["engines"],
            "plan": seen if self.planned else None,
        }

    def require_sound(self) -> None:
        """Raise M335 when the checkpoint does not load rightly."""
        broken, unrepairable = self.diagnosis.broken, self.diagnosis.unrepairable
        if broken:
            count = f"{len(broken)} things are wrong, the first" if len(broken) > 1 else "one thing is wrong"
            unknown = any(finding.what in self.diagnosis.changed for finding in unrepairable)
            remedy = "--repair OUT writes a sound copy" if not unrepairable else "copy it again"
            if unknown:
                remedy = 'say which layers of its base it holds with --kept "0-5,8-11"'
            first = (unrepairable or broken)[0]
            raise ModelError(f"{self.source} is broken, {count}: {first}; {remedy}", code="M335")


def doctor(
    source: str | Path, *, plan: str | None = None, kept: str | None = None, trust_remote_code: bool = False
) -> Examined:
    """Examine a folder or a hub id. `plan`: notation, plan.json or its folder, to be judged too. `kept`: the layers of
    the base that a broken folder holds, as notation. `trust_remote_code`: run code that comes with a folder.

    Raises `ModelError` for what cannot be judged at all (M3xx), `PlanError` for a plan that is not legal, U527.
    """
    metadata = read_metadata(source)
    with quiet(), own_code_known(str(source), metadata.folder, metadata.config, trust=trust_remote_code):
        found = diagnose(metadata, None if kept is None else layer_list(kept))
        assert found.config is not None
        model = structure(found.config, source)
        spec = open_model(model).spec
        chosen, weights = _plan(plan, spec, str(source))
        seen = outlook_of(model, spec, require(chosen, spec, shapes_of(weights)), weights=weights)
    return Examined(str(source), found, spec, str(model.dtype).removeprefix("torch."), seen, planned=plan is not None)


def layer_list(text: str) -> Sequence[int]:
    """The layers that notation such as 0-5,8-11 names, in its order. Raises U527 for anything but whole layers."""
    layers = plain_layers(parse_steps(text))
    if layers is None:
        raise UsageError(f"--kept is {text[:60]!r}; name whole layers, as in 0-5,8-11", code="U527")
    return layers


def _plan(text: str | None, spec: Spec, source: str) -> tuple[Plan, Tensors]:
    """The plan that is to be judged, with the tensors that lie beside its file. Raises U550 or U551."""
    if text is None:
        return Plan.identity(spec), {}
    if is_plan_file(text):
        return load_plan(text), load_weights(text)
    return parse_plan(text, Plan.identity(spec, source=source)), {}
