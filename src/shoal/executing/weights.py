"""The new tensors that a plan names, kept beside its plan.json, and held to it by a hash."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import assert_never

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from shoal.atomic import replacing
from shoal.errors import PlanError, UsageError, WriteError
from shoal.models.linear import is_linear
from shoal.models.stacks import Stack
from shoal.plan import Exit, Given, Map, Parallel, Plan, Run, given_plan, place_of, save_plan, weights_hash
from shoal.plan.around import affine_of
from shoal.plan.low_rank import factors_of
from shoal.plan.steps import Step, gate_of, runs
from shoal.plan.tensors import tensors_of

FILE = "weights.safetensors"
Tensors = Mapping[str, torch.Tensor]


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors that belong to the plan at `path`, a plan.json or a folder that Shoal wrote; none when it has none.

    Raises `NotationError` for a plan that cannot be read, `UsageError` U550 when its weights are missing and U551 when
    they are not the ones it was saved with.
    """
    path = Path(path)
    place = path / "shoal" / "plan.json" if path.is_dir() else path
    expected = weights_hash(place)
    if expected is None:
        return {}
    file = place.with_name(FILE)
    if not file.is_file():
        raise UsageError(f"the plan {place} needs the file {file}, which is not there; copy it there", code="U550")
    if hash_of(file) != expected:
        raise UsageError(f"{file} is not the file that {place} was saved with; restore it", code="U551")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise UsageError(f"{file} cannot be read as safetensors: {error}; restore it", code="U551") from None


def plan_and_weights(given: Given, base: Plan, weights: Tensors | None = None) -> tuple[Plan, Tensors]:
    """A plan as people give it (`given_plan`), and the tensors that it names: `weights` itself, or without them those
    beside a plan.json. Raises what `given_plan` and `load_weights` raise."""
    place = place_of(given) if weights is None else None
    plan = given_plan(given, base)
    if place is not None:
        return plan, load_weights(place)
    return plan, {} if weights is None else weights


def save_weights(folder: Path, plan: Plan, weights: Tensors) -> str | None:
    """Write those of `weights` that `plan` names into `folder`; the hash for its plan.json, or None for no tensor."""
    content = _content(plan, weights)
    if content is None:
        return None
    with replacing(folder / FILE) as draft:
        draft.write_bytes(content)
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def hash_of_used(plan: Plan, weights: Tensors | None) -> str | None:
    """What `save_weights` would return."""
    content = _content(plan, weights or {})
    return None if content is None else f"sha256:{hashlib.sha256(content).hexdigest()}"


def _content(plan: Plan, weights: Tensors) -> bytes | None:
    used = used_by(plan, weights)
    # tensors that share storage are refused by the format, and a view would be written whole
    return save({name: t.detach().cpu().contiguous().clone() for name, t in sorted(used.items())}) if used else None


def save_planned(plan: Plan, folder: str | Path, weights: Tensors | None = None) -> Path:
    """Write `folder`/shoal/plan.json with its weights beside it; `--plan folder` runs it. Raises W280.

    Whatever else the folder holds stays; weights are written first, so that a plan never waits for its tensors.
    """
    place = Path(folder) / "shoal"
    try:
        place.mkdir(parents=True, exist_ok=True)
        digest = save_weights(place, plan, weights or {})
        save_plan(plan, place / "plan.json", weights=digest)
    except OSError as error:
        raise WriteError(
            f"cannot write the plan to {folder}: {error.strerror}; choose another folder", code="W280"
        ) from None
    return Path(folder)


def used_by(plan: Plan, weights: Tensors) -> dict[str, torch.Tensor]:
    """Those of `weights` that a step of `plan` names: as its own, or as those of the gate that it stands behind."""
    ids = {name for _, steps in plan.stacks for name in (*ids_of(steps), *map(gate_of, steps)) if name is not None}
    return {name: tensor for name, tensor in weights.items() if _owned(name, ids)}


def as_stored(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, and no view of a part of something larger, which a file does not hold."""
    found = tensor.detach().cpu().contiguous()
    return found if found.untyped_storage().nbytes() == found.nbytes else found.clone()


def ids_of(steps: Iterable[Step]) -> set[str]:
    """The ids of new tensors that steps name."""
    return {name for step in steps for name in _ids(step)}


def shapes_in(stacks: Iterable[Stack]) -> Callable[[str, int], dict[str, tuple[int, ...]]]:
    """What `check` asks of a model's layers: by stack and layer the shape of each parameter and buffer there."""
    by_name = {stack.name: stack for stack in stacks}
    return lambda name, index: {n: tuple(t.shape) for n, t in _held(by_name[name].layer(index)).items()}


def refuse_unlike(stack: Stack, steps: tuple[Step, ...], weights: Tensors) -> None:
    """Raise `PlanError` P129 for own tensors that fit by name and shape and still cannot stand in a layer: numbers of
    another kind than it holds (integers for floating-point numbers), or two values for one tensor with two names."""
    for run in runs(steps):
        for weights_id in run.ids:
            _refuse_unlike(run.layer, weights_id, stack, weights)


def _refuse_unlike(index: int, weights_id: str, stack: Stack, weights: Tensors) -> None:
    layer, here = stack.layer(index), f"{stack.name} layer {index}"
    held, places = _held(layer), dict[int, str]()
    own = tensors_of(weights_id, weights)
    for module in (*factors_of(own, held), *affine_of(own, held)):
        if not is_linear(layer.get_submodule(module)):
            raise PlanError(
                f"{weights_id}.{module} has factors or a scale, and {module} in {here} is no linear module; give those "
                "of matrices that multiply what their module is given",
                code="P129",
            )
    for name, old in held.items():
        new, given = weights.get(f"{weights_id}.{name}"), f"{weights_id}.{name}"
        if new is None:
            continue
        if (new.is_floating_point(), new.is_complex()) != (old.is_floating_point(), old.is_complex()):
            raise PlanError(f"{given} is {new.dtype} and {here} holds {old.dtype} there; convert it", code="P129")
        other = places.setdefault(id(old), given)
        if other != given and not torch.equal(weights[other], new):
            raise PlanError(
                f"{other} and {given} differ, and {here} holds one tensor under both names; give one of them",
                code="P129",
            )


def _held(layer: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False)])


def hash_of(file: Path) -> str:
    """sha256 of a file's bytes."""
    with file.open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


def _owned(name: str, ids: set[str]) -> bool:
    return any(name.startswith(f"{one}.") for one in ids)


def _ids(step: Step) -> set[str]:
    match step:
        case Map():
            return {step.weights}
        case Exit():
            return set() if step.head == "base" else {step.head}
        case Run() | Parallel():
            return {weights_id for run in runs((step,)) for weights_id in run.ids}
        case _:
            assert_never(step)
