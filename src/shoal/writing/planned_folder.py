"""Write a plan as a planned checkpoint: the tensors that it reads, each once, proved where Shoal is installed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from shoal.atomic import publish, staged
from shoal.errors import WriteError
from shoal.evaluation import Progress
from shoal.executing.bind import refuse_second_plan, require_legal
from shoal.executing.planned_tensors import NEW
from shoal.executing.weights import Tensors, plan_and_weights
from shoal.models.kinds import CAUSAL, auto_of
from shoal.models.load import Loaded, load
from shoal.models.opened import OpenedModel, open_model
from shoal.models.own_code import runs_own_code
from shoal.plan import Given, Plan, Shape, cost, shapes_of
from shoal.plan.capabilities import refusal
from shoal.planned import checkpoint_tensors, require_plannable, save_checkpoint
from shoal.writing import proof_child as measure
from shoal.writing.card import model_card, origin
from shoal.writing.container import parse_size
from shoal.writing.folder import Page, Written, tell_stage
from shoal.writing.lineage import record_lines
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
from shoal.writing.proof import FILE, Proof, prove_many
from shoal.writing.reference import Expected, Reference, live_side, load_settings, quiet
from shoal.writing.reference_kinds import depth_paths, kind_side, proves_as_causal
from shoal.writing.side_files import copy_side_files
from shoal.writing.surgery import require_writable


def write_planned(
    loaded: Loaded | str | Path | nn.Module,
    plan: Given,
    output: str | Path,
    *,
    weights: Mapping[str, torch.Tensor] | None = None,
    overwrite: bool = False,
    shard_size: str = "5GB",
    records: Iterable[Mapping[str, Any]] = (),
    page: Page | None = None,
    card: Sequence[Mapping[str, Any]] | None = None,
    command: str | None = None,
    config: str | None = None,
    prove: bool = True,
    progress: Progress | None = None,
) -> Written:
    """Write the planned checkpoint of `plan` (see `shoal.planned`), and prove it before it gets its name: a fresh
    process that imports `shoal.auto` must compute what the plan computes live, from as many parameters as the folder
    holds and with the same rows of the KV cache.

    Arguments as in `shoal.write`. Raises `PlanError` for a plan that is not legal here, P125 for one that a policy
    decides; `WriteError` W275 for a model that no planned checkpoint can hold, W211 to W215 of `require_writable`,
    W220 to W227, W230 for a failed proof and W231.
    """
    limit = parse_size(shard_size)
    loaded = loaded if isinstance(loaded, Loaded) else load(loaded)
    inner = require_writable(loaded.model)
    opened = open_model(inner)
    refuse_second_plan(opened)
    plan, tensors = plan_and_weights(plan, Plan.identity(opened.spec), weights)
    require_legal(opened, plan, tensors)
    refused = (refusal(steps, "live") for _, steps in plan.stacks)
    if (no := next((one for one in refused if one is not None), None)) is not None:
        raise WriteError(f"{no.message}; a planned checkpoint has no policy", code=no.code)
    require_plannable(inner, plan)
    if runs_own_code(inner, inner.config, loaded.tokenizer):
        raise WriteError(
            f"{type(inner).__name__} is code of its own, which a planned checkpoint does not carry; run the plan live",
            code="W275",
        )
    plan = with_source(plan, loaded.source)
    final = final_path(output)
    folders = [] if loaded.folder is None else [loaded.folder]
    require_apart(final, folders)
    refuse_output(final, overwrite=overwrite)
    held = checkpoint_tensors(opened, plan, tensors)
    require_space(final, sum(tensor.nbytes for tensor in held.values()))
    lines = record_lines(loaded.folder, records)
    with disk_errors(final), staged(final) as staging:
        tell_stage(progress, "writing")
        _fill(staging, loaded, opened, plan, tensors, limit)
        write_text(staging / "shoal" / "records.jsonl", "".join(f"{line}\n" for line in lines))
        if config is not None:
            write_text(staging / "shoal" / "config.yaml", config)
        tell_stage(progress, "proving")
        proof = _proved(staging, loaded, opened, plan, tensors) if prove else Proof(False, (), against="nothing")
        if prove:
            write_text(staging / FILE, json.dumps(proof.to_dict(), indent=1) + "\n")
        text = model_card(
            plan, origin(loaded.source, loaded.folder), title=final.name, base_layers=plan.layers(), rows=card or (),
            command=command, proof=proof if prove else None, planned=True, auto=auto_of(inner) or CAUSAL,
            inputs=getattr(inner, "main_input_name", None),
        )  # fmt: skip
        write_text(staging / "README.md", text)
        if page is not None:
            write_text(staging / "report.html", page if isinstance(page, str) else page(proof))
        tell_stage(progress, "publishing")
        size = sum(file.stat().st_size for file in staging.glob("*.safetensors"))
        publish(staging, final, overwrite=overwrite)
    tell_stage(progress, "written")
    return Written(final, proof, {}, _parameters(inner, held), size)


def _fill(staging: Path, loaded: Loaded, opened: OpenedModel, plan: Plan, weights: Tensors, limit: int) -> None:
    (staging / "shoal").mkdir()
    with quiet(), savable():
        save_checkpoint(staging, opened, plan, weights, max_shard_size=limit)
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(staging)
    for file in staging.glob("*.safetensors"):  # which are made for their owner alone, unlike the files beside them
        file.chmod((staging / "config.json").stat().st_mode)
    if loaded.folder is not None:
        copy_side_files(loaded.folder, staging)


def _proved(folder: Path, loaded: Loaded, opened: OpenedModel, plan: Plan, weights: Tensors) -> Proof:
    causal = proves_as_causal(opened.model)
    make = live_side if causal else kind_side
    side = make(opened.model, plan, tokenizer=loaded.tokenizer, greedy=(3, 32), weights=weights)
    held = checkpoint_tensors(opened, plan, weights)
    kv = side.rows or {"per_token": 0, "elements": 0, "rows": None}
    expected = Expected(
        _parameters(opened.model, held), opened.stack().depth, kv["per_token"], kv["elements"], kv["rows"],
        weights=_sums(opened.model, held),
    )  # fmt: skip
    if not causal:
        length = side.tensors["random.in.decoder_input_ids"].shape[1]
        priced = cost(plan, opened.spec, Shape(context=length), shapes_of(weights))
        depths = {stack.name: stack.depth for stack in opened.stacks}
        expected = replace(expected, kv_elements=priced.kv_elements, depths=depths)
    reference = Reference(
        expected, side.tensors, prompts=side.prompts, tokens=side.tokens, greedy=side.greedy, largest=side.largest,
        auto=auto_of(opened.model) or CAUSAL, depths=None if causal else depth_paths(opened.model),
        needs_shoal=True, **load_settings(opened.model),
    )  # fmt: skip
    proof = prove_many([(folder, reference)])[0]
    if not proof.passed:
        more = f" (and {len(proof.failures) - 1} more)" if len(proof.failures) > 1 else ""
        raise WriteError(
            f"the planned checkpoint failed its proof, so it was removed: {proof.failures[0]}{more}; run the plan live",
            code="W230",
        )
    return replace(proof, against="the live plan, loaded where Shoal is installed")


def _parameters(model: PreTrainedModel, held: Mapping[str, torch.Tensor]) -> int:
    """How many parameters the folder holds: of the base those that are no buffers, and all new ones."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return sum(t.numel() for name, t in held.items() if name in names or name.startswith(NEW))


def _sums(model: PreTrainedModel, held: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The bit sums of the state dict of the loaded checkpoint: 0 of what no run reads, which is empty there."""
    state = model.state_dict()
    storages = {(t.data_ptr(), t.numel()) for t in held.values()}
    read = {name: t for name, t in state.items() if (t.data_ptr(), t.numel()) in storages}
    new = {f"{NEW}{name.removeprefix(NEW).replace('.', '%2E')}": t for name, t in held.items() if name.startswith(NEW)}
    return dict.fromkeys(state, 0) | measure.bit_sums(read) | measure.bit_sums(new)
