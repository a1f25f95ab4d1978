"""Write a plan as a folder that plain transformers loads, prove it, and only then give it its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from shoal.atomic import publish, staged
from shoal.errors import WriteError
from shoal.evaluation import Progress
from shoal.executing.bind import refuse_second_plan
from shoal.executing.weights import Tensors, plan_and_weights, save_weights
from shoal.models.adapter import attach
from shoal.models.kinds import CAUSAL, auto_of
from shoal.models.load import Loaded, load
from shoal.models.opened import open_model
from shoal.models.other_readers import renumbering
from shoal.models.own_code import copy_own_code, runs_own_code
from shoal.models.stacks import find_stacks
from shoal.plan import Given, Plan, plan_to_json, require, shapes_of
from shoal.writing.adapter import PLACE, renumbered, write_adapter
from shoal.writing.blueprint import Blueprint
from shoal.writing.card import model_card, origin
from shoal.writing.container import parse_size
from shoal.writing.left_out import left_out_of
from shoal.writing.lineage import config_note, record_lines
from shoal.writing.output import (
    disk_errors,
    final_path,
    refuse_output,
    require_apart,
    require_space,
    savable,
    with_source,
    write_text,
)
from shoal.writing.papers import settle_papers
from shoal.writing.proof import FILE, Proof, prove, prove_many, verify
from shoal.writing.reference import adapter_reference, quiet
from shoal.writing.side_files import copy_modules, copy_side_files
from shoal.writing.surgery import blueprint, require_writable, rewrite

__all__ = ["Written", "refuse_output", "verify", "write"]

Page = str | Callable[[Proof], str]
_STAGES = ("writing", "proving", "publishing", "written")


@dataclass(frozen=True)
class Written:
    """A finished folder."""

    folder: Path
    proof: Proof
    """Without a check, and not passed, when no proof was asked for."""
    changed: dict[str, tuple[Any, Any]]
    """Config fields, (old, new)."""
    params: int
    """By unique storage."""
    bytes: int
    """Of the safetensors files."""
    left_out: tuple[str, ...] = ()
    """The base's tensors that are no part of its model."""
    zeroed: tuple[str, ...] = ()
    """The halves that are layers of their own, as `2a`: the other part of each is zeroed."""


def write(
    loaded: Loaded | str | Path | nn.Module,
    plan: Given,
    output: str | Path,
    *,
    weights: Mapping[str, torch.Tensor] | None = None,
    zero_parts: bool = False,
    overwrite: bool = False,
    shard_size: str = "5GB",
    records: Iterable[Mapping[str, Any]] = (),
    page: Page | None = None,
    card: Sequence[Mapping[str, Any]] | None = None,
    command: str | None = None,
    config: str | None = None,
    prove: bool = True,
    adapter: str | Path | None = None,
    progress: Progress | None = None,
) -> Written:
    """Write the stock model of `plan` with everything that belongs to it, and prove it before it gets its name.

    `loaded`: what `shoal.load` gives, or what it takes. `plan`: a Plan, depth notation, or the place of a plan.json or
    of a folder that Shoal wrote. `weights`: the tensors that the plan names, as `running` takes them (default: those
    beside such a plan.json); they are kept beside plan.json too. `zero_parts`: let a layer keep a dropped attention or
    mlp with all tensors zero. `records`: one JSON object a line, behind those of a base that Shoal wrote. `page`:
    report.html, or what makes it from the proof. `card`: rows {name, unit, dense, pruned, how} of the model card.
    `command`, `config`: what the user typed, and the same as a config file. `adapter`: the folder of a LoRA adapter of
    the base, which is written beside it, in the folder `adapter`, with its layers renumbered, and proved to do there
    what it does on the live plan. The model of `loaded` is not changed.

    Raises before any work `PlanError` (P122 while another plan runs on the model), the `WriteError`s W201-W215 and W283
    of `blueprint` and `require_writable`, and U524 no such size of shards, W220 output exists, W221 output and source
    overlap, W222 no parent folder, W223 too little disk space, W224 no permission, W225 output holds other things than
    a model, W295-W299 an adapter that cannot follow the plan. Raises later W216 configs that cannot be saved, W223 disk
    full, W226 another failure of the disk, W227 written twice at once, W230 failed proof, W231 no proof possible;
    nothing that was not there before is left under the output's name then.
    """
    limit = parse_size(shard_size)
    loaded = loaded if isinstance(loaded, Loaded) else load(loaded)
    inner = require_writable(loaded.model)
    refuse_second_plan(open_model(inner))
    plan, weights = plan_and_weights(plan, Plan.identity(open_model(inner).spec), weights)
    require(plan, open_model(inner).spec, shapes_of(weights))
    plan = with_source(plan, loaded.source)
    plans = blueprint(inner, plan, zero_parts=zero_parts, weights=weights)
    beside = None if adapter is None else Path(adapter).expanduser()
    final = final_path(output)
    made = None if beside is None else renumbered(beside, inner, plans, str(final))
    require_apart(final, _sources(loaded) + ([] if beside is None else [beside]))
    refuse_output(final, overwrite=overwrite)
    require_space(final, _bytes(inner, plans))
    lines = record_lines(loaded.folder, records)
    note = config_note(inner.config, plan, plans)
    left_out = left_out_of(loaded.folder, inner)
    with disk_errors(final), staged(final) as staging:
        tell_stage(progress, "writing")
        params = _fill(staging, loaded, plans, note, limit, weights)
        write_text(staging / "shoal" / "records.jsonl", "".join(f"{line}\n" for line in lines))
        if config is not None:
            write_text(staging / "shoal" / "config.yaml", config)
        tell_stage(progress, "proving")
        proof = _proved(staging, loaded, plans, weights) if prove else Proof(False, (), against="nothing")
        if beside is not None and made is not None:
            write_adapter(staging / PLACE, made, beside)
            proof = _with_adapter(proof, staging, loaded, plans, beside) if prove else proof
        if prove:
            write_text(staging / FILE, json.dumps(proof.to_dict(), indent=1) + "\n")
        text = model_card(
            plan,
            origin(loaded.source, loaded.folder),
            title=final.name,
            base_layers=note["base_layers"],
            chain=note.get("chain", ()),
            auto=auto_of(inner) or CAUSAL,
            rows=card or (),
            changed=plans.changed,
            left_out=left_out,
            command=command,
            proof=proof if prove else None,
            inputs=getattr(inner, "main_input_name", None),
        )
        write_text(staging / "README.md", text)
        if page is not None:
            write_text(staging / "report.html", page if isinstance(page, str) else page(proof))
        tell_stage(progress, "publishing")
        size = sum(file.stat().st_size for file in staging.glob("*.safetensors"))
        publish(staging, final, overwrite=overwrite)
    tell_stage(progress, "written")
    return Written(final, proof, plans.changed, params, size, left_out, plans.halves)


def tell_stage(progress: Progress | None, stage: str) -> None:
    """Say which of the stages of a write begins: writing, proving, publishing, written."""
    if progress is not None:
        progress(_STAGES.index(stage), len(_STAGES) - 1, "write and prove")


def _fill(staging: Path, loaded: Loaded, plans: Blueprint, note: dict[str, Any], limit: int, weights: Tensors) -> int:
    """Tensors, configs, tokenizer, side files and plan; the number of parameters. No reference to the rewritten model
    survives, so the proof does not hold it in memory."""
    (staging / "shoal").mkdir()
    with quiet():
        made = rewrite(loaded.model, plans.plan, plans=plans)
        made.config.shoal = note
        with savable():
            made.save_pretrained(staging, max_shard_size=limit)
        for file in staging.glob("*.safetensors"):  # which are made for their owner alone, unlike the files beside them
            file.chmod((staging / "config.json").stat().st_mode)
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(staging)
    if loaded.folder is not None:
        copy_side_files(loaded.folder, staging)
        copy_modules(loaded.folder, staging)
        if runs_own_code(made, made.config, loaded.tokenizer):
            copy_own_code(loaded.folder, staging)
        stack = loaded.opened.stack()
        settle_papers(staging, renumbering(stack, plans.of(stack.name).slots))
    digest = save_weights(staging / "shoal", plans.plan, weights)
    write_text(staging / "shoal" / "plan.json", plan_to_json(plans.plan, weights=digest))
    return sum({(p.data_ptr(), p.numel()): p.numel() for p in made.parameters()}.values())


def _proved(folder: Path, loaded: Loaded, plans: Blueprint, weights: Tensors) -> Proof:
    proof = prove(folder, loaded.model, plans.plan, tokenizer=loaded.tokenizer, plans=plans, weights=weights)
    if not proof.passed:
        more = f" (and {len(proof.failures) - 1} more)" if len(proof.failures) > 1 else ""
        cast = (
            "load the base with its dtype, as a cast rounds its tables" if _cast(loaded.model) else "run the plan live"
        )
        raise WriteError(
            f"the written folder failed its proof, so it was removed: {proof.failures[0]}{more}; {cast}", code="W230"
        )
    return proof


def _with_adapter(proof: Proof, folder: Path, loaded: Loaded, plans: Blueprint, adapter: Path) -> Proof:
    """The proof with that of the adapter: in a fresh process peft and the written pair must compute what the base with
    its own adapter computes under the plan."""
    put = attach(loaded.model, adapter, loaded.source)
    try:
        place, tokenizer = str((folder / PLACE).resolve()), loaded.tokenizer
        reference = adapter_reference(loaded.model, plans.plan, place, tokenizer=tokenizer)
    finally:
        put.detach()
    found = prove_many([(folder, reference)])[0]
    if not found.passed:
        raise WriteError(
            f"the renumbered adapter failed its proof, so nothing was written: {found.failures[0]}; merge it first "
            "(merge_and_unload)",
            code="W230",
        )
    checks = tuple(replace(check, name=f"adapter {check.name}") for check in found.checks)
    return replace(proof, checks=proof.checks + checks)


def _cast(model: nn.Module) -> bool:
    """Was the model cast after it was loaded? `model.to(bfloat16)` also rounds tables that no checkpoint holds (the
    frequencies of the rotary embedding), so a reload with the same weights computes something else."""
    stored = model.state_dict().keys()
    tables = [b for name, b in model.named_buffers() if name not in stored and b.is_floating_point()]
    return any(b.dtype.itemsize < 4 for b in tables)


def _sources(loaded: Loaded) -> list[Path]:
    """The folders that the base came from, as far as they are known."""
    named = [name for name in (loaded.source, getattr(loaded.model, "name_or_path", "")) if name]
    return [Path(name).expanduser() for name in named] + ([loaded.folder] if loaded.folder is not None else [])


def _bytes(model: PreTrainedModel, plans: Blueprint) -> int:
    """Of the tensors to be written: those outside the layers once, by storage, a layer as often as it runs."""
    stacks = find_stacks(model)
    inside = tuple(f"{stack.path}." for stack in stacks)
    outside = {(t.data_ptr(), t.nbytes): t.nbytes for n, t in model.state_dict().items() if not n.startswith(inside)}
    layers = [
        sum(t.nbytes for t in stack.layer(i).state_dict().values())
        for stack in stacks
        for i in plans.of(stack.name).slots
    ]
    return sum(outside.values()) + sum(layers)
