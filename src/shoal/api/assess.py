"""evaluate and bench: what a model is worth and how fast it is, alone or against the dense one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from shoal.api.kv_cache import behind_prefix, refuse_beside_kv_cache
from shoal.api.task_scores import load_task_sets, task_scores
from shoal.data import Data, load_data
from shoal.errors import DataError, UsageError
from shoal.evaluation import (
    Agreement,
    GenerationCheck,
    KVHeld,
    Memory,
    Perplexity,
    Progress,
    Speed,
    compare_between,
    generation_check,
    memory,
    speed,
)
from shoal.evaluation.read_once import compare_read_once, perplexity_read_once
from shoal.evaluation.step_time import bandwidth, step_time_of
from shoal.evaluation.tasks import TaskScore
from shoal.executing.weights import Tensors, plan_and_weights
from shoal.graphs import Fused, fused
from shoal.live import running
from shoal.models.calls import device_of
from shoal.models.folder_kinds import planned_refusal
from shoal.models.kinds import require_causal
from shoal.models.load import Loaded, load
from shoal.models.opened import open_model
from shoal.plan import Given, Plan, Shape, given_plan, shapes_of
from shoal.planned import handle_of
from shoal.record import plain

Source = str | Path | nn.Module | Loaded


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found; parts that were not asked for are None."""

    perplexity: Perplexity
    dense: Perplexity | None = None
    agreement: Agreement | None = None
    generation: GenerationCheck | None = None
    dense_generation: GenerationCheck | None = None
    tasks: dict[str, TaskScore] = field(default_factory=dict)
    dense_tasks: dict[str, TaskScore] = field(default_factory=dict)
    kv: KVHeld | None = None
    """With a compressing KV cache: what it held. Both perplexities are then those of the second halves."""

    def to_dict(self) -> dict[str, Any]:
        scores = ("tasks", "dense_tasks")
        found = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in scores}
        values = {name: plain(value.to_dict()) for name, value in found.items() if value is not None}
        for name in scores:
            if own := getattr(self, name):
                values[name] = {task: plain(score.to_dict()) for task, score in own.items()}
        return values


@dataclass(frozen=True)
class Bench:
    """What `bench` found."""

    speed: Speed
    memory: dict[str, Memory]
    graph: Fused | None = None
    """With graphs: what computes otherwise, and how far the logits are from those without."""
    predicted: dict[str, float] | None = None
    """Where it was asked for: the share of the dense decode time that the plan should take by the bytes that it moves
    (`shoal.evaluation.step_time`): `share` where nothing stays in the processor's cache between two runs, and
    `share_if_cached` where this process has that cache to itself."""

    def to_dict(self) -> dict[str, Any]:
        held = {name: found.to_dict() for name, found in self.memory.items()}
        graph = {} if self.graph is None else {"graph": self.graph.to_dict()}
        predicted = {} if self.predicted is None else {"predicted": self.predicted}
        return {"speed": plain(self.speed.to_dict()), "memory": held} | graph | predicted


def opened(source: Source, **options: Any) -> Loaded:
    """`source` itself when it is loaded already."""
    return source if isinstance(source, Loaded) else load(source, **options)


def opened_base(source: Source, **options: Any) -> Loaded:
    """The same for what plans, measures or trains. Raises M382 for a planned checkpoint, whose plan is always on."""
    loaded = opened(source, **options)
    if handle_of(loaded.model) is not None:
        raise planned_refusal(loaded.source)
    return loaded


def tokenizer_of(loaded: Loaded) -> Any:
    """The tokenizer. Raises D440 when the model came without one, or with one that cannot be read."""
    if loaded.tokenizer is None:
        raise DataError(
            f"{loaded.source} has no tokenizer that can be read; put its tokenizer files beside it", code="D440"
        )
    return loaded.tokenizer


def is_given(data: Any) -> bool:
    """Whether `data`, as public functions take it, is a text of the caller's own that has yet to be read."""
    return data is not None and not isinstance(data, Data) and not (isinstance(data, str) and data == "builtin")


def text_of(loaded: Loaded, source: Any, **options: Any) -> Data:
    """Windows of text for this model; a `Data` is handed on as it is."""
    return source if isinstance(source, Data) else load_data(source, tokenizer_of(loaded), **options)


def evaluate(
    source: Source,
    *,
    plan: Given | None = None,
    weights: Tensors | None = None,
    against: Source | None = None,
    data: Any = "builtin",
    split: str = "test",
    window: int = 512,
    stride: int | None = None,
    limit: int = 16,
    bos: bool = False,
    batch: int = 1,
    generation: bool = True,
    new_tokens: int = 64,
    tasks: Sequence[str | Path] = (),
    task_items: int = 200,
    kv_cache: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Evaluation:
    """Perplexity on `limit` windows of `window` tokens and a greedy generation check; with a `plan` (run live) or a
    model to compare `against`, also the dense figures, KL(dense || this) and top-1 agreement.

    `weights`: the tensors that the plan names, as `running` takes them. `tasks`: .jsonl files of last words or multiple
    choice, or tasks of lm-eval; of each the first `task_items`. `kv_cache`, as `minicache:start=16`: the first half of
    each window is put into this cache and the second half scored, by the base model behind a plain cache; nothing is
    generated. `options` go to `shoal.load`. Raises `ShoalError` for a model, plan or data that cannot be used, U660 for
    what does not go with `kv_cache`.
    """
    _plan_or_model(plan, against)
    refuse_beside_kv_cache(kv_cache, against=against is not None, tasks=bool(tasks))
    loaded = opened(source, **options)
    require_causal(loaded.model, "evaluate")
    text = text_of(loaded, data, split=split, length=window, stride=stride, limit=limit, bos=bos)
    asked = load_task_sets(tasks, limit=task_items)
    other = None if against is None else opened(against, **options)
    if other is not None:
        _one_vocabulary(loaded, other)
    context = planned(loaded.model, plan, weights)
    if kv_cache is not None:
        mine, kv, whole = behind_prefix(loaded.model, text, kv_cache, context, batch=batch, progress=progress)
        return Evaluation(mine, whole, kv=kv)

    def written(model: Any) -> GenerationCheck | None:
        if not generation or loaded.tokenizer is None:
            return None
        return generation_check(model, loaded.tokenizer, new_tokens=new_tokens, progress=progress)

    def scored(model: Any) -> dict[str, TaskScore]:
        tokenizer = tokenizer_of(loaded) if asked else None
        return task_scores(model, tokenizer, asked, batch=max(8, batch), progress=progress)

    if plan is None and other is None:
        worth = perplexity_read_once(loaded.model, text, batch=batch, progress=progress)
        return Evaluation(worth, generation=written(loaded.model), tasks=scored(loaded.model))
    if other is None:
        identity = Plan.identity(open_model(loaded.model).spec)
        chosen = identity if plan is None else given_plan(plan, identity)
        both = compare_read_once(loaded.model, text, chosen, context, batch=batch, progress=progress)
    else:
        both = compare_between(other.model, loaded.model, text, batch=batch, progress=progress)
    with context():
        own, right = written(loaded.model), scored(loaded.model)
    reference = loaded.model if other is None else other.model
    return Evaluation(
        both.pruned, both.dense, both.agreement, own, written(reference), tasks=right, dense_tasks=scored(reference)
    )


def bench(
    source: Source,
    *,
    plan: Given | None = None,
    weights: Tensors | None = None,
    against: Source | None = None,
    graphs: Sequence[str] = (),
    predict: bool = False,
    prompt: int = 512,
    new: int = 32,
    batch: int = 1,
    pairs: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> Bench:
    """Wall clock of prefill and decode, dense and pruned in turn in one run, and the memory of weights and KV.

    The pruned side is `plan` run live, or `source` itself `against` a dense model; without both `source` is timed
    alone. `graphs`: the last side once more with other matrix products (`shoal.graphs.fused`, and what it raises).
    `predict`: measure this machine's memory, too, and say what the bytes that the plan's decode step moves predict.
    Raises `UsageError` U520 for both.
    """
    _plan_or_model(plan, against)
    loaded = opened(source, **options)
    require_causal(loaded.model, "bench")
    variants: dict[str, Callable[[], AbstractContextManager[Any]]] = {}
    if against is not None:
        dense = opened(against, **options)
        variants["dense"] = lambda: nullcontext(dense.model)
        variants["pruned"] = lambda: nullcontext(loaded.model)
    else:
        variants["dense"] = lambda: nullcontext(loaded.model)
        if plan is not None:
            variants["pruned"] = planned(loaded.model, plan, weights)
    graph: list[Fused] = []
    if graphs:
        last = list(variants)[-1]
        variants[f"{last} + {' + '.join(graphs)}"] = _graphed(variants[last], graphs, graph)
    timed = speed(variants, prompt=prompt, new=new, batch=batch, pairs=pairs, seed=seed, progress=progress)
    held = {}
    for name, variant in variants.items():
        with variant() as model:
            held[name] = memory(model, prompt=prompt, batch=batch)
    share = _predicted(loaded.model, plan, weights, timed) if predict and plan is not None else None
    return Bench(timed, held, graph[0] if graph else None, share)


def _predicted(model: Any, plan: Given, weights: Tensors | None, timed: Speed) -> dict[str, float]:
    """The share of the dense decode time, by the bytes alone."""
    spec = open_model(model).spec
    rates = bandwidth(device_of(model), model.dtype, max(stack.hidden for stack in spec.stacks))
    shape = Shape(timed.batch, timed.prompt, timed.prompt + timed.new // 2)
    chosen, tensors = plan_and_weights(plan, Plan.identity(spec), weights)
    found = step_time_of(rates, timed.variants[0].decode.median, spec, shape, timed.dtype)
    shapes = shapes_of(tensors)
    return {"share": found.without_cache().share(chosen, shapes), "share_if_cached": found.share(chosen, shapes)}


def _graphed(
    variant: Callable[[], AbstractContextManager[Any]], graphs: Sequence[str], told: list[Fused]
) -> Callable[[], AbstractContextManager[Any]]:
    """The same variant with `graphs` on its model; what they say goes to `told`."""

    @contextmanager
    def context() -> Iterator[Any]:
        with variant() as model, fused(model, *graphs) as handle:
            told.append(handle)
            yield model

    return context


def _plan_or_model(plan: Given | None, against: Source | None) -> None:
    if plan is not None and against is not None:
        raise UsageError("give a plan or a model to compare with, not both", code="U520")


def _one_vocabulary(loaded: Loaded, other: Loaded) -> None:
    """Raise U511 before token ids of one model meet the embeddings of another."""
    sizes = [one.model.config.get_text_config(decoder=True).vocab_size for one in (loaded, other)]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"{loaded.source} has {sizes[0]} tokens and {other.source} {sizes[1]}; use models with one vocabulary",
            code="U511",
        )


def planned(
    model: Any, plan: Given | None, weights: Tensors | None = None
) -> Callable[[], AbstractContextManager[Any]]:
    """A factory of contexts that yield `model` while `plan` runs on it."""

    @contextmanager
    def context() -> Iterator[Any]:
        if plan is None:
            yield model
            return
        with running(model, plan, weights):
            yield model

    return context
