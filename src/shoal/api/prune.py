"""prune: from a model and text to a plan, with what it costs and is worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any, cast

from shoal.api.assess import Source, bench, evaluate, is_given, opened_base, text_of
from shoal.api.budget import COUNTED, amount_of, measured_budget, parse_budget, priced, refuse_amount
from shoal.api.journal import journaled, kept
from shoal.api.legal_plans import legal_plans, require_writable
from shoal.api.pruned import Pruned
from shoal.api.stand_ins import Then, parse_then, transformed
from shoal.api.tracked import trials
from shoal.data import Data
from shoal.errors import UsageError, tell_unused
from shoal.evaluation import Progress
from shoal.evaluation.cluster import Machines
from shoal.evaluation.cluster_resources import Cluster
from shoal.evaluation.distributed_loss import loss_workers
from shoal.executing.weights import Tensors, plan_and_weights, shapes_in, used_by
from shoal.ledger import Ledger
from shoal.methods._job import PruningJob
from shoal.models.context import positions_of
from shoal.models.kinds import is_causal, require_causal, require_text
from shoal.models.load import Loaded
from shoal.models.opened import open_model
from shoal.plan import Given, Plan, Shape, Spec, cost, require, shapes_of
from shoal.registry import Entry, entries, get
from shoal.report.tracking import require_trackers
from shoal.scores import Budget, Found, Objective
from shoal.spelling import chosen, read
from shoal.user_files import is_file
from shoal.writing.surgery import blueprint


def prune(
    source: Source,
    *,
    method: str = "shortgpt",
    plan: Given | None = None,
    weights: Tensors | None = None,
    drop: int | None = None,
    keep: float | None = None,
    budget: str | Budget | None = None,
    data: Any = "builtin",
    split: str = "calibrate",
    length: int = 512,
    limit: int = 16,
    stride: int | None = None,
    bos: bool = False,
    batch: int = 1,
    seed: int = 0,
    stack: str | None = None,
    settings: Mapping[str, Any] | None = None,
    writable: bool = True,
    zero_parts: bool = False,
    journal: Path | None = None,
    then: Sequence[str] = (),
    memory: int | None = None,
    memo: Ledger[Any] | None = None,
    ray: str | None = None,
    workers: int = 2,
    gpus_per_worker: float = 0.0,
    track: Sequence[str] = (),
    timed: bool = True,
    assess: bool = False,
    test_data: Any = "builtin",
    progress: Progress | None = None,
    **options: Any,
) -> Pruned:
    """Find a plan with `drop` layers less (or a share `keep` of them, or within a `budget` such as "params=0.8") by a
    published method (NAME or NAME:key=value,key=value), or take `plan` as it is, with its `weights`. A method that
    grows the model takes no amount.

    Nothing is changed and nothing written; pass the result to `shoal.write`. `writable`: only plans that a stock class
    can express are looked at. `then`: transforms done after that, in order, as "refit" or "slerp:t=0.3" (see `shoal
    ls transforms`), fitted on the calibration text. `assess`: perplexity, agreement and generation on `limit` windows,
    at most 8, of the test split of `test_data`, and a paired timing. `journal`: a file in which searches keep what they
    evaluated; `memory`: bytes that they may hold as hidden states, beyond which these go to disk (default: a quarter of
    what is free); `memo`: what other calls on this model found of plans. `ray`: the address of a Ray cluster, or
    `local`, where `workers` processes evaluate the candidates of a search, each on the model read where it was read
    here, with `gpus_per_worker` on GPUs of its own. `track`: experiment trackers
    (`shoal.report.tracking`) that are told of every plan that is evaluated. `timed`: of a budget
    in prefill or decode also the time that the result really takes.
    Raises `UsageError` (U5xx), `PlanError` (P1xx), and `WriteError` (W2xx) for a model or plan that cannot be written.
    """
    if plan is not None and (drop is not None or keep is not None or budget is not None):
        raise UsageError("give a plan or how much to remove, not both", code="U521")
    entry, own = _asked(method, settings, track, drop, keep, budget)
    after = parse_then(then)
    _tell_unread(entry, data, planned=plan is not None, fitted=bool(after))
    loaded = opened_base(source, **options)
    spec = loaded.opened.spec
    identity = Plan.identity(spec, source=loaded.source)
    text, most = None, None
    # before the search, which may take hours: what will be needed after it
    test = _test(loaded, test_data, length=length, limit=min(limit, 8), bos=bos) if assess else None
    if writable:
        require_writable(loaded, identity)
    if plan is not None:
        found, method = _given(*plan_and_weights(plan, identity, weights), spec, loaded), "listed"
        if after:
            require_text(loaded.model, f"the transform {after[0].text}")
            text = text_of(loaded, data, split=split, length=length, limit=limit, stride=stride, bos=bos)
    else:
        budget = _measured(loaded, budget, _prompt(loaded, length), seed, progress)
        count, most = amount_of(spec, stack, drop, keep, budget) if entry.removes else (0, None)
        if entry.reads_data or after or is_causal(loaded.model):  # the records of causal models name it in any case
            reader = f"the transform {after[0].text}" if after and not entry.reads_data else f"the method {method}"
            require_text(loaded.model, reader)
            text = text_of(loaded, data, split=split, length=length, limit=limit, stride=stride, bos=bos)
        with (
            trials(track, {"model": loaded.source, "method": method}, identity, spec, most) as told,
            _pool(entry, loaded, Cluster(ray, workers, gpus_per_worker)) as pool,
        ):
            found = told.found(
                _found(
                    entry,
                    PruningJob(
                        model=loaded.model,
                        data=cast(Data, text),  # None only for a method that says that it reads none
                        plan=identity,
                        spec=spec,
                        legal=legal_plans(loaded, spec, writable=writable, zero_parts=zero_parts),
                        objective=journaled(
                            loaded.model,
                            identity,
                            path=journal,
                            batch=batch,
                            memory=memory,
                            seed=seed,
                            memo=memo,
                            pool=pool,
                            heard=told.heard,
                        ),
                        keep=_keeper(entry, identity=identity, path=journal, memo=memo, heard=told.heard),
                        memo=Ledger() if memo is None else memo,
                        stack=stack,
                        batch=batch,
                        seed=seed,
                        budget=most,
                        progress=progress,
                        tokenizer=loaded.tokenizer,
                    ),
                    count,
                    own,
                )
            )
    found, said = transformed(loaded, spec, found, after, text, stack=stack, batch=batch, seed=seed, progress=progress)
    if writable and (plan is not None or found.weights):
        blueprint(loaded.model, found.plan, zero_parts=zero_parts, weights=found.weights)
    shape, prompt = Shape(), _prompt(loaded, length)
    before, price = cost(identity, spec, shape), cost(found.plan, spec, shape, shapes_of(found.weights))
    result = Pruned(
        loaded, spec, found.plan, method, found, before, price, text, then=said, files=_files(method, after)
    )
    ran: dict[str, Any] = {"plan": found.plan, "weights": found.weights}
    if most is not None:
        result = replace(result, price=priced(most, model=loaded.model, prompt=prompt, seed=seed, timed=timed, **ran))
    if test is not None:
        worth = evaluate(loaded, data=test, batch=batch, progress=progress, **ran)
        speed = bench(loaded, prompt=prompt, seed=seed, progress=progress, **ran)
        result = replace(result, evaluation=worth, bench=speed)
    return result


def _asked(
    method: str, settings: Mapping[str, Any] | None, track: Sequence[str], *amounts: object
) -> tuple[Entry, dict[str, Any]]:
    """The method with its options. Raises U501, U502, U665 when an amount is given to one that removes nothing, U767
    and U768 for trackers."""
    require_trackers(track)
    entry, own = chosen("methods", method, settings)
    if not entry.removes:
        refuse_amount(method, *amounts)
    return entry, own


def _tell_unread(entry: Entry, data: Any, *, planned: bool, fitted: bool) -> None:
    """Say that a text was given of which nothing is read."""
    if is_given(data) and not fitted and (planned or not entry.reads_data):
        why = "a plan is given" if planned else f"the method {entry.name} reads no text"
        tell_unused(f"data={data!s:.60}", why)


def _pool(entry: Entry, loaded: Loaded, cluster: Cluster) -> AbstractContextManager[Machines | None]:
    """The processes that evaluate candidates, if any were asked for. Raises U573 and what `machines` does."""
    if cluster.address is not None and not entry.searches:
        others = ", ".join(name for name, one in entries("methods").items() if one.searches)
        raise UsageError(
            f"--ray hands out the candidates of a search and {entry.name} has none; leave it out, or use {others}",
            code="U573",
        )
    return loss_workers(loaded, cluster)


def _files(method: str, then: Sequence[Then]) -> tuple[dict[str, str], ...]:
    """The user's own files among these."""
    name = read(method).name
    own = ([get("methods", name)] if is_file(name) else []) + [one.entry for one in then]
    return tuple(entry.file.to_dict() for entry in own if entry.file is not None)


def _keeper(entry: Entry, **options: Any) -> Callable[[Objective, str], Objective]:
    """`kept` for the method's own objectives; those of a user's file are another file's when its text is another."""
    of = "" if entry.file is None else f" of {entry.file.sha256[:16]}"
    return lambda function, name: kept(function, f"{name}{of}", **options)


def _test(loaded: Loaded, source: Any, **options: Any) -> Data:
    """The text of the evaluation after pruning."""
    require_causal(loaded.model, "the evaluation after pruning")
    return text_of(loaded, source, split="test", **options)


def _given(plan: Plan, weights: Tensors, spec: Spec, loaded: Loaded) -> Found:
    """A plan that the user brings, if it is legal."""
    own = used_by(plan, weights)
    layers = shapes_in(open_model(loaded.model).stacks)
    require(plan, spec, shapes_of(own), layers)
    return Found(plan, weights=own)


def _measured(
    loaded: Loaded, budget: str | Budget | None, prompt: int, seed: int, progress: Progress | None
) -> str | Budget | None:
    """A budget in a unit of time with its time model; any other as it is."""
    if not isinstance(budget, str):
        return budget
    unit, share = parse_budget(budget)
    if unit in COUNTED:
        return budget
    return measured_budget(unit, share, loaded.model, prompt=prompt, seed=seed, progress=progress)


def _found(entry: Entry, job: PruningJob, count: int, own: Mapping[str, Any]) -> Found:
    """What the method finds. One that counts layers is asked for one more until the budget is met: layers differ, and
    `count` is that of the mean layer."""
    method = entry.load()
    if "drop" not in signature(method).parameters:
        found: Found = method(job, **own)
        return found
    while True:
        found = method(job, drop=count, **own)
        if job.budget is None or job.budget.met(found.plan, found.weights):
            return found
        count += 1


def _prompt(loaded: Loaded, length: int, new: int = 32) -> int:
    """The prompt to time: `length` tokens, or what the context leaves beside `new` decoded ones."""
    limit = positions_of(loaded.model)
    return length if limit is None else max(1, min(length, limit - new))
