"""The engine that Shoal did not take: a bank of layers whose iteration yields the steps themselves.

The list's children are the layers that the plan keeps, under their base names; iterating, indexing and `len` give one
`Step` for each step of the plan. While the plan runs, every field of the config that describes layers one by one is put
in the plan's order, so that the stock forward picks masks, rotary tables and cache rows by the step's position. A step
calls its layer with the arguments that the loop made for that position. See docs/engines.md for how it compares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers.cache_utils import Cache

from shoal.executing.slots import KeysValues, PassingCache, prepare_rows, slot_view
from shoal.models.depth import permuted_config
from shoal.models.examine import LayerFacts
from shoal.models.inspect import inspect
from shoal.models.opened import open_model
from shoal.models.parts import without
from shoal.models.stacks import Stack, find_stack, unwrap
from shoal.plan import Map, Parallel, Plan, Run, parse_plan, require
from shoal.plan import Step as PlanStep
from shoal.plan.steps import layers_of, runs, writes_kv


class PlannedLayers(nn.ModuleList):
    """Children: the kept layers under their base names. Iteration, indexing and length: the steps."""

    def __init__(self, stack: Stack, facts: list[LayerFacts], steps: tuple[PlanStep, ...], weights: Any) -> None:
        super().__init__()
        kept = {run.layer for run in runs(steps)}
        self._modules = {str(i): stack.layer(i) for i in sorted(kept)}
        shared = Shared(facts, {r.kv.read for r in runs(steps) if r.kv.read is not None}, weights)
        # the config's order types one cache row for each step; a group needs several rows, a map or an mlp none
        shared.rows = tuple(at for at, step in enumerate(steps) for run in runs((step,)) if writes_kv(run))
        made, slot = [], 0
        for position, step in enumerate(steps):
            made.append(Step(self, shared, position, step, slot))
            slot += sum(writes_kv(run) for run in runs((step,)))
        self.__dict__["steps"] = made

    def __iter__(self) -> Iterator[Any]:
        return iter(self.__dict__["steps"])

    def __getitem__(self, index: Any) -> Any:
        return self.__dict__["steps"][index]

    def __len__(self) -> int:
        return len(self.__dict__["steps"])


class Shared:
    """What the steps of one plan have in common, and the KV that one pass hands from step to step."""

    rows: tuple[int, ...]

    def __init__(self, facts: list[LayerFacts], sources: set[int], weights: Mapping[str, torch.Tensor]) -> None:
        self.facts, self.sources, self.weights = facts, sources, weights
        self.states: dict[int, KeysValues] = {}
        self.passing = PassingCache()


class Step:
    """One step at one position of the loop; attributes are those of its first layer."""

    def __init__(self, bank: PlannedLayers, shared: Shared, position: int, step: PlanStep, slot: int) -> None:
        self.bank, self.shared, self.position, self.step, self.slot = bank, shared, position, step, slot
        self.named = str(layers_of(step)[0]) if not isinstance(step, Map) else next(iter(bank._modules))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bank._modules[self.named], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if self.position == 0:
            for value in (*args, *kwargs.values()):
                if isinstance(value, Cache):
                    prepare_rows(value, self.shared.rows)
        match self.step:
            case Run():
                return self._run(self.step, self.slot, args, kwargs)
            case Parallel():
                outs = [self._run(r, self.slot + n, args, kwargs) for n, r in enumerate(self.step.branches)]
                changes = torch.stack([(o[0] if isinstance(o, tuple) else o) - hidden for o in outs])
                total = changes.sum(0) if self.step.join == "sum" else changes.mean(0)
                return (hidden + total, *outs[-1][1:]) if isinstance(outs[-1], tuple) else hidden + total
            case Map(weights=name):
                weight, bias = self.shared.weights[f"{name}.weight"], self.shared.weights.get(f"{name}.bias")
                out, tail = nn.functional.linear(hidden, weight, bias), self.shared.facts[0].tail
                return out if tail < 0 else (out, *[None] * tail)
        return hidden

    def _run(self, run: Run, slot: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        shared, layer = self.shared, self.bank._modules[str(run.layer)]
        fact = shared.facts[run.layer]
        assert layer is not None
        shares = run.layer in shared.sources or run.kv.read is not None
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
        if given or shares:
            keep = partial(shared.states.__setitem__, run.layer) if run.layer in shared.sources else None
            read = None if run.kv.read is None else shared.states[run.kv.read]
            view = slot_view(given[0] if given else shared.passing, slot, read=read, keep=keep)
            if isinstance(fact.cache_at, int):
                args = (*args[: fact.cache_at], view, *args[fact.cache_at + 1 :])
            else:
                kwargs = kwargs | {str(fact.cache_at): view}
        names: tuple[str, ...] = ()
        if run.part != "layer":
            assert fact.parts is not None
            names = fact.parts.mlp if run.part == "attention" else fact.parts.attention
        with without(layer, names, fact.returns):
            if run.weights is None:
                return layer(*args, **kwargs)
            prefix = f"{run.weights}."
            own = {n[len(prefix) :]: t for n, t in shared.weights.items() if n.startswith(prefix)}
            return functional_call(layer, own, args, kwargs)


@contextmanager
def bank(model: nn.Module, plan: Plan | str, weights: Mapping[str, torch.Tensor] | None = None) -> Iterator[None]:
    """Run `plan` on `model` inside the context, like `shoal.live.running`. Raises W206 besides P1xx."""
    inner = unwrap(model)
    spec, stack = inspect(inner), find_stack(inner)
    if isinstance(plan, str):
        plan = parse_plan(plan, Plan.identity(spec))
    require(plan, spec, {name: tuple(t.shape) for name, t in (weights or {}).items()})
    steps, original = plan.steps(), stack.layers
    planned = PlannedLayers(stack, open_model(inner).facts(stack.name).layers, steps, weights or {})
    _, changed = permuted_config(stack.config, tuple(layers_of(step)[0] for step in steps if layers_of(step)))
    setattr(stack.owner, stack.attr, planned)
    try:
        for name, (_, new) in changed.items():
            setattr(stack.config, name, new)
        yield
    finally:
        setattr(stack.owner, stack.attr, original)
        for name, (old, _) in changed.items():
            setattr(stack.config, name, old)
