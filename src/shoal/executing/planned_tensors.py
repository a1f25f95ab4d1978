"""The tensors of a planned checkpoint's files, held to the plan: each is there, once, and read by a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from shoal.errors import ModelError
from shoal.executing.bind import require_legal
from shoal.executing.read_tensors import tensors_read
from shoal.executing.weights import Tensors, used_by
from shoal.models.checkpoint import tensor_files
from shoal.models.opened import OpenedModel
from shoal.plan import Plan

NEW = "shoal."
"""Before the names of the plan's new tensors in a file: shoal.ID.NAME."""


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder by its name. Raises M309 for a file that is missing, damaged or too short, and for a
    tensor that two files hold."""
    found: dict[str, torch.Tensor] = {}
    where: dict[str, str] = {}
    for file in tensor_files(folder):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - it is no dictionary
                if name in found:
                    raise ModelError(
                        f"{folder} holds the tensor {name} twice, in {where[name]} and in {file.name}; remove one of "
                        "them",
                        code="M309",
                    )
                found[name], where[name] = stored.get_tensor(name), file.name
    return found


def as_held(folder: Path, tensors: Tensors, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Those of the base, in the dtypes in which the model has them. Raises M310 for another shape, or for whole numbers
    in the place of others."""
    there = model.state_dict()
    for name, tensor in tensors.items():
        if name not in there:
            continue
        wrong = right = ""
        if there[name].shape != tensor.shape:
            wrong, right = str(list(tensor.shape)), str(list(there[name].shape))
        elif there[name].is_floating_point() != tensor.is_floating_point():
            wrong, right = str(tensor.dtype), str(there[name].dtype)
        if wrong:
            raise ModelError(
                f"the planned checkpoint {folder} holds {name} as {wrong} instead of {right}; write it anew",
                code="M310",
            )
    return {name: t.to(there[name].dtype) for name, t in tensors.items() if name in there}


def require_fit(folder: Path, opened: OpenedModel, plan: Plan, new: Tensors, tensors: Tensors) -> frozenset[str]:
    """The names in the state dict of what the runs of the plan read; `tensors` are those of the folder.

    Raises `PlanError` for a plan that is not legal here, M310 for a tensor that a run reads and the folder does not
    hold, and for one of another model, M400 for one that no run reads, or that is one with another.
    """
    require_legal(opened, plan, new)
    state = opened.model.state_dict()
    read = tensors_read(opened, plan, new)
    stored = [name for name in tensors if name in state]
    given = {_storage(state[name]): name for name in stored}
    missing = sorted(name for name in read if _storage(state[name]) not in given)
    stray = sorted(name for name in tensors if name not in state and not name.startswith(NEW))
    stray += [f"{NEW}{name}" for name in sorted(new.keys() - used_by(plan, new).keys())]
    if missing or stray:
        what = f"lacks the tensor {missing[0]}" if missing else f"holds the tensor {stray[0]}, which is no part of it"
        raise ModelError(f"the planned checkpoint {folder} {what}; write it anew", code="M310")
    if more := _superfluous(state, stored, given, read):
        raise ModelError(f"the planned checkpoint {folder} holds the tensor {more}; write it anew", code="M400")
    return read


def _superfluous(
    state: Mapping[str, torch.Tensor], stored: list[str], given: Mapping[tuple[int, int], str], read: frozenset[str]
) -> str:
    """A tensor that the plan and the files say different things of, and what; empty where they agree."""
    wanted = {_storage(state[name]) for name in read}
    for name in sorted(stored):
        storage = _storage(state[name])
        if storage not in wanted:
            return f"{name}, which no run of its plan reads"
        if given[storage] != name and state[name].numel():
            return f"{name} beside {given[storage]}, and both are one tensor of the model"
    return ""


def _storage(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()
