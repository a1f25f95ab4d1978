"""Policies whose every decision is written down, and what they must compute, said without the executor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from shoal.deciding.decisions import Decision
from shoal.deciding.exit_view import ExitView
from shoal.deciding.forward import ForwardView, kinds_of
from shoal.deciding.gating import with_exits, with_gates
from shoal.deciding.policy import Policy
from shoal.models.inspect import inspect
from shoal.models.opened import open_model
from shoal.models.stacks import find_stack
from shoal.plan import Exit, Plan, Run

from .families import DEPTH, VOCAB, tiny
from .references import Batch, by_hand, silenced

LENGTH, PREFILL = 12, 7
KINDS = ("skip/project", "skip/copy", "skip/mask", "exit/project", "exit/copy", "exit/mask", "exit/defer", "mlp")


class Written(Policy):
    """Runs and exits as `runs_at[layer]` and `leaves_at[name]` say, bool [batch, LENGTH]."""

    def __init__(self, plan: Plan, tables: dict[Any, torch.Tensor], part: str = "layer") -> None:
        super().__init__(plan)
        self.tables = tables
        self.leaves_out = part  # type: ignore[misc, assignment]

    def _now(self, key: Any, forward: ForwardView) -> Decision:
        return self.tables[key][: forward.rows, forward.past : forward.past + forward.tokens]

    def should_run(self, run: Run, forward: ForwardView, hidden: torch.Tensor) -> Decision:
        return self._now(run.layer, forward)

    def should_exit(self, step: Exit, forward: ForwardView, view: ExitView) -> Decision:
        return self._now(step.name, forward)


@cache
def tables(kind: str) -> dict[Any, torch.Tensor]:
    """Who runs what: ragged over rows and columns, some columns agreed on by all rows, layer 0 among the skipped."""
    generator = torch.Generator().manual_seed(3)
    if kind.startswith("exit"):
        depth = torch.randint(0, DEPTH, (2, LENGTH), generator=generator)  # the last layer that a token runs
        depth[:, 8], depth[:, 10], depth[0, 9], depth[:, 11] = 0, 1, 2, 3
        return {f"after-{layer}": depth <= layer for layer in range(DEPTH - 1)}
    run = torch.rand(DEPTH, 2, LENGTH, generator=generator) < 0.5
    run[1:, :, 9], run[:, :, 10] = False, torch.tensor([True, False, True, False])[:, None]
    if kind == "skip/copy":
        run[0] = True  # somebody must have keys and values to copy
    return dict(enumerate(run))


@cache
def policy_for(family: str, attention: str, kind: str) -> Policy:
    """The policy of one kind for a tiny model."""
    spec = inspect(tiny(family, attention))
    plan = Plan.identity(spec)
    what, _, fill = kind.partition("/")
    if what == "exit":
        gated = with_exits(plan, spec, range(DEPTH - 1), fill)  # type: ignore[arg-type]
    else:
        first = 1 if kind == "skip/copy" else 0
        gated = with_gates(plan, spec, range(first, DEPTH), "written", fill or None)  # type: ignore[arg-type]
    return Written(gated, tables(kind), "mlp" if what == "mlp" else "layer")


@cache
def batch_of(rows: int) -> dict[str, torch.Tensor]:
    """One sequence, or a left-padded batch of two."""
    ids = torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if rows == 2:
        ids[1, :3], mask[1, :3] = 0, 0
    return {"input_ids": ids[:rows], "attention_mask": mask[:rows]}


@torch.no_grad()
def whole(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Logits of one pass without a cache."""
    return model(**batch, use_cache=False).logits


@torch.no_grad()
def stepped(model: PreTrainedModel, batch: Batch, kind: str, chunk: int = 2) -> torch.Tensor:
    """Logits of a prefill, a chunk of `chunk` tokens as in verification, then single tokens."""
    config = model.config
    past: Cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=16)
    out, start = [], 0
    for end in (PREFILL, PREFILL + chunk, *range(PREFILL + chunk + 1, LENGTH + 1)):
        ids, mask = batch["input_ids"][:, start:end], batch["attention_mask"][:, :end]
        out.append(model(input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=True).logits)
        start = end
    return torch.cat(out, 1)


def expected(family: str, kind: str, rows: int, table: dict[Any, torch.Tensor] | None = None) -> torch.Tensor:
    """The logits under the policy: stock layers called by hand on the whole sequence, with eager attention, whose mask
    is always there to be edited."""
    model, batch, table = tiny(family, "eager"), batch_of(rows), table or tables(kind)
    what, _, fill = kind.partition("/")
    runs = {layer: _runs(table, what, layer)[:rows, :, None] for layer in range(DEPTH)}

    def chain(call: Callable[[int, torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        answer = hidden
        for layer, run in runs.items():
            if what == "mlp":
                with silenced(model, layer, "mlp"):
                    without = call(layer, hidden)
                hidden = answer = torch.where(run, call(layer, hidden), without)
            else:
                after = call(layer, hidden)
                answer = torch.where(run, after, answer)
                hidden = after if fill == "defer" else answer
        return answer

    with _editing(model, runs, fill):
        return by_hand(model, batch, chain)


def _runs(table: dict[Any, torch.Tensor], what: str, layer: int) -> torch.Tensor:
    if what != "exit":
        return table[layer]
    left = [table[f"after-{before}"] for before in range(layer)]
    return ~torch.stack(left).any(0) if left else torch.ones(2, LENGTH, dtype=torch.bool)


@contextmanager
def _editing(model: PreTrainedModel, runs: dict[int, torch.Tensor], fill: str) -> Iterator[None]:
    """Layers see holes in their masks (mask) or lower layers' keys and values (copy)."""
    stack = find_stack(model)
    kinds = kinds_of(open_model(model).facts(stack.name))
    copied = _Copying(runs, kinds)
    places = [fact.cache_at for fact in open_model(model).facts(stack.name).layers]

    def edit(index: int) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
            if fill == "mask":
                seen = runs[index][:, None, None, :, 0] | torch.eye(LENGTH, dtype=torch.bool)
                args = tuple(_hidden(a, seen) for a in args)
                kwargs = {name: _hidden(value, seen) for name, value in kwargs.items()}
            if fill == "copy":
                at, copied.layer = places[index], index
                args = tuple(copied if n == at else a for n, a in enumerate(args))
                kwargs = kwargs | ({at: copied} if isinstance(at, str) else {})
            return args, kwargs

        return hook

    layers = [stack.layer(i).register_forward_pre_hook(edit(i), with_kwargs=True) for i in range(stack.depth)]
    # the pass that only records what the layers are called with must stay as it is
    recording = model.register_forward_hook(lambda *_: setattr(copied, "on", True))
    try:
        yield
    finally:
        for handle in (*layers, recording):
            handle.remove()


def _hidden(value: Any, seen: torch.Tensor) -> Any:
    if not isinstance(value, torch.Tensor) or value.dim() != 4 or value.shape[-2:] != (LENGTH, LENGTH):
        return value
    return value.masked_fill(~seen, torch.finfo(value.dtype).min) if value.is_floating_point() else value & seen


class _Copying(Cache):
    """Hands every layer its own keys and values for the tokens that run it, and the layer's below for the others."""

    def __init__(self, runs: dict[int, torch.Tensor], kinds: list[Any]) -> None:
        super().__init__(layers=[])
        self.runs, self.kinds, self.layer, self.last = runs, kinds, 0, {}

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *_: Any, **__: Any) -> Any:
        kind, run = self.kinds[self.layer], self.runs[self.layer][:, None]
        old = self.last.get(kind, (key_states, value_states))
        self.last[kind] = torch.where(run, key_states, old[0]), torch.where(run, value_states, old[1])
        return self.last[kind]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0
