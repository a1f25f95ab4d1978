"""Low-rank additions to the matrices of the plan's layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from shoal.errors import UsageError, first_line
from shoal.healing.blocks import beside_gaps
from shoal.healing.fused_modules import FUSED
from shoal.healing.moving import (
    LearnJob,
    Moving,
    Tensors,
    healed_id,
    nothing_moves,
    tensors_in,
    whole_runs,
    with_weights,
)
from shoal.models.adapter import Adapter, require_peft
from shoal.plan import Plan, Run
from shoal.plan.tensors import tensors_of, tensors_of_run

NAME = "shoal-heal"
COMES_LAST = True
"""It adds to what else learns, so it is put on top of that."""


def lora(
    job: LearnJob,
    *,
    rank: int = 16,
    alpha: float | None = None,
    where: Literal["all", "near"] = "all",
    width: int = 1,
    part: Literal["layer", "attention", "mlp"] = "layer",
    dropout: float = 0.0,
) -> Moving:
    """LoRA: W + (alpha / rank) B A in the place of each matrix W of the plan's layers.

    W is [out, in]; A [rank, in] and B [out, rank] learn, and B is 0 at first.
    So the start is the plan itself, bit for bit, and the whole model without its adapters is the teacher. `alpha` None:
    twice the rank. Matrices that fused kernels read by themselves (`out_proj` of Mamba) get none, nor do those in whose
    place a run has narrower or wider ones (`--learn plan` moves these). `where` near: only the `width` layers before
    and behind each removed span. At the end W + (alpha / rank) B A is computed in float32 and cast once: the result is
    a stock checkpoint of the plan's size.

    Source: Hu et al. 2021 (LoRA, arXiv 2106.09685), by peft; as healing: Gromov et al. 2024 (arXiv 2403.17887).
    """
    if rank < 1 or width < 1 or not 0 <= dropout < 1:
        raise UsageError(
            f"lora: rank={rank} and width={width} must be 1 or more and dropout={dropout:g} at least 0 and below "
            "1; write lora:rank=16",
            code="U502",
        )
    runs = whole_runs(job, beside_gaps(job.plan, job.stack, width) if where == "near" else None)
    scale = 2 * rank if alpha is None else alpha
    targets = _targets(job, runs, part)
    if not targets:
        raise nothing_moves("lora")
    adapter = _injected(job, targets, rank, scale, dropout)
    return _moving(job, runs, adapter)


def _targets(job: LearnJob, runs: list[Run], part: str) -> list[str]:
    """Full names in the model of the matrices that get an adapter."""
    names = {id(module): name for name, module in job.opened.model.named_modules()}
    facts = job.opened.facts(job.stack).layers
    found: dict[str, None] = {}
    for run in runs:
        layer = job.layer(run.layer)
        own = facts[run.layer].parts
        asked = part if run.part == "layer" else run.part
        roots = (
            [layer] if asked == "layer" or own is None else [layer.get_submodule(name) for name in getattr(own, asked)]
        )
        for root in roots:
            found |= {names[id(m)]: None for m in root.modules() if _is_matrix(m)}
    fused = FUSED.get(getattr(job.opened.model.config, "model_type", ""), frozenset())
    other = {f"{names[id(job.layer(run.layer))]}.{module}" for run in runs for module in _of_another_shape(job, run)}
    return [name for name in found if name.rpartition(".")[2] not in fused and name not in other]


def _of_another_shape(job: LearnJob, run: Run) -> Iterator[str]:
    """The modules of a run's layer for which it has a matrix of another shape, beside which the layer's cannot have an
    adapter."""
    for name, tensor in tensors_of_run(run, job.weights).items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and job.layer(run.layer).get_parameter(name).shape != tensor.shape:
            yield module


def _is_matrix(module: nn.Module) -> bool:
    """A Linear, or the Conv1D of the GPT-2 family, which is one with its matrix turned."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _injected(job: LearnJob, targets: list[str], rank: int, alpha: float, dropout: float) -> Adapter:
    model = job.opened.model
    peft = require_peft(Path("lora"))
    before = dict(model.named_modules(remove_duplicate=False))
    trained = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias="none")
    found = Adapter(Path(), None, before, trained)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layers that store [in, out]: peft turns them itself
            peft.inject_adapter_in_model(config, model, adapter_name=NAME)
    except Exception as error:  # peft knows modules that are read past their call, and says so in several classes
        found.detach()
        raise UsageError(
            f"peft cannot put LoRA into this model: {first_line(error)}; let whole layers learn (--learn near, or "
            "--set learn=near)",
            code="U677",
        ) from None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{NAME}." in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return found


def _moving(job: LearnJob, runs: list[Run], adapter: Adapter) -> Moving:
    model = job.opened.model
    parameters = {name: p for name, p in model.named_parameters() if f".{NAME}." in name}
    renamed = {_inside(job, name): tensor for name, tensor in job.weights.items()}

    def finish(others: Tensors) -> tuple[Plan, dict[str, torch.Tensor]]:
        ids = {(run.layer, run.weights): healed_id(job, run) for run in runs}
        made = dict(others)
        for run in runs:
            new = ids[run.layer, run.weights]
            own = {} if run.weights is None else tensors_of(run.weights, others)
            merged = _merged(replace(job, weights=others), run)
            made |= {f"{new}.{name}": tensor for name, tensor in {**own, **merged}.items()}
        return with_weights(job.plan, job.stack, ids), made

    return Moving(job.plan, renamed, parameters, finish, adapter.detach, lambda: _switched_off(model))


def _inside(job: LearnJob, name: str) -> str:
    """Where a tensor of the plan lies now that peft's modules stand around the base's: ID.mlp.up.base_layer.weight."""
    for run in whole_runs(job):
        if run.weights is not None and name.startswith(f"{run.weights}."):
            path, _, leaf = name[len(run.weights) + 1 :].rpartition(".")
            if hasattr(job.layer(run.layer).get_submodule(path), "lora_A"):
                return f"{run.weights}.{path}.base_layer.{leaf}"
    return name


def _merged(job: LearnJob, run: Run) -> dict[str, torch.Tensor]:
    """The matrices of a run with their additions, by name in the layer, in the dtypes that they had."""
    there, made = tensors_in(job, run), dict[str, torch.Tensor]()
    for name, module in job.layer(run.layer).named_modules():
        if hasattr(module, "lora_A") and NAME in module.lora_A:
            old = there[f"{name}.weight"].detach()
            delta: Any = module.get_delta_weight(NAME)
            made[f"{name}.weight"] = (old.float() + delta.detach().float()).to(old.dtype).contiguous()
    return made


@contextmanager
def _switched_off(model: nn.Module) -> Iterator[None]:
    """The base's own matrices; adapters that were on are on again behind the block."""
    on: list[Any] = [m for m in model.modules() if hasattr(m, "_disable_adapters") and not m.disable_adapters]
    for module in on:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module in on:
            module._disable_adapters = False
