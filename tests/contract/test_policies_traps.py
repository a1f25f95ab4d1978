"""What goes wrong when a layer is simply not called for a token: each trap, the naive way and ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from shoal.deciding.gating import with_exits, with_gates
from shoal.deciding.kv_state import COMPUTED, COPIED, HOLE, PROJECTED
from shoal.live import running
from shoal.models.inspect import inspect
from shoal.models.stacks import find_stack
from shoal.plan import Plan

from .families import DEPTH, tiny
from .policy_cells import LENGTH, Written, batch_of, expected, stepped, tables, whole

Table = dict[Any, torch.Tensor]


def table_of(*skipped: tuple[int, int, int]) -> Table:
    """Every token runs every layer but for those (layer, row, column); row -1 is both."""
    runs = torch.ones(DEPTH, 2, LENGTH, dtype=torch.bool)
    for layer, row, column in skipped:
        runs[layer, slice(None) if row < 0 else row, column] = False
    return dict(enumerate(runs))


@dataclass(frozen=True)
class Trap:
    """A naive run is right without `skipped` and wrong with it."""

    family: str
    rows: int
    chunk: int
    skipped: tuple[tuple[int, int, int], ...]


TRAPS = {
    "layer 0 counts positions": Trap("llama", 1, 1, ((0, -1, 8),)),
    "layer 0 never ran, in a padded batch": Trap("llama", 2, 1, tuple((0, -1, column) for column in range(LENGTH))),
    "a chunk of several tokens under sdpa": Trap("llama", 1, 2, ((1, -1, 9), (2, -1, 9), (1, -1, 10), (0, -1, 10))),
    "a padded batch": Trap("gpt2", 2, 1, ((1, -1, 8),)),
    "a window slides past the hole": Trap("gemma3_text", 1, 1, ((2, -1, 8), (2, -1, 9))),
    "rows that differ": Trap("llama", 2, 1, ((1, 0, 8), (2, 0, 8), (2, 1, 10))),
}


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_catches_the_naive_way_and_not_ours(name: str) -> None:
    trap = TRAPS[name]
    model, batch, table = tiny(trap.family), batch_of(trap.rows), table_of(*trap.skipped)
    seen = batch["attention_mask"].bool()
    right = expected(trap.family, "skip/mask", trap.rows, table)
    spec = inspect(model)
    gated = with_gates(Plan.identity(spec), spec, range(DEPTH), "written", "mask")
    with running(model, gated, policy=Written(gated, table)):
        ours = stepped(model, batch, "dynamic", trap.chunk)
    assert (ours - right)[seen].abs().max() <= 1e-4
    with naive(model, {}):
        assert (stepped(model, batch, "dynamic", trap.chunk) - whole(model, batch))[seen].abs().max() <= 1e-4
    theirs = torch.full_like(right, torch.inf)
    with naive(model, table), suppress(RuntimeError):  # a mask and a row of different lengths
        theirs = stepped(model, batch, "dynamic", trap.chunk)
    assert (theirs - right)[seen].abs().max() > 1e-2


@contextmanager
def naive(model: PreTrainedModel, table: Table) -> Iterator[None]:
    """A layer that no token of the first row needs is not called, and nothing is written for it."""
    stack = find_stack(model)
    past = [0] * stack.depth
    originals = [stack.layer(i).forward for i in range(stack.depth)]

    def made(index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            start, past[index] = past[index], past[index] + hidden.shape[1]
            runs = table.get(index)
            if runs is not None and not bool(runs[0, start : past[index]].any()):
                return hidden
            return original(hidden, *args, **kwargs)

        return forward

    try:
        for index, original in enumerate(originals):
            stack.layer(index).forward = made(index, original)  # type: ignore[method-assign]
        yield
    finally:
        for index in range(stack.depth):
            del stack.layer(index).forward


@pytest.mark.parametrize("fill", ["project", "copy", "mask", "defer"])
def test_what_was_cropped_is_forgotten(fill: str) -> None:
    """Assisted decoding takes tokens back: codes of entries, and tokens that wait, go with them."""
    model, batch, table = tiny("llama"), batch_of(1), tables("exit/project")
    spec = inspect(model)
    gated = with_exits(Plan.identity(spec), spec, range(DEPTH - 1), fill)  # type: ignore[arg-type]
    with running(model, gated, policy=Written(gated, table)) as handle, torch.no_grad():
        right, deep = stepped(model, batch, "dynamic"), handle.trace.depths
        past = DynamicCache(config=model.config)

        def on(start: int, end: int) -> torch.Tensor:
            ids = batch["input_ids"][:, start:end]
            return model(input_ids=ids, past_key_values=past, use_cache=True).logits

        on(0, 7), on(7, 9), on(9, 10), on(10, 11)
        past.crop(-3)
        got = torch.cat([on(8, 10), on(10, 11), on(11, 12)], 1)
        assert (got - right[:, 8:]).abs().max() <= 1e-4
        assert handle.trace.depths == deep
        past.crop(-4)
        assert (on(8, 12) - right[:, 8:]).abs().max() <= 1e-4


@pytest.mark.parametrize(("fill", "code"), [("project", PROJECTED), ("copy", COPIED), ("mask", HOLE)])
def test_every_entry_says_what_it_is(fill: str, code: int) -> None:
    """One code for each layer, sequence and column; what a token ran is computed, the rest is what the fill says."""
    model, batch, table = tiny("llama"), batch_of(2), tables("skip/copy")
    spec = inspect(model)
    gated = with_gates(Plan.identity(spec), spec, range(1, DEPTH), "written", fill)  # type: ignore[arg-type]
    past = DynamicCache(config=model.config)
    with running(model, gated, policy=Written(gated, table)), torch.no_grad():
        for start, end in ((0, 7), (7, 9), (9, 10), (10, 11), (11, 12)):
            model(batch["input_ids"][:, start:end], batch["attention_mask"][:, :end], past_key_values=past)
    codes = past._shoal_kv_state.codes[:, :, :LENGTH]  # type: ignore[attr-defined]
    assert [row.get_seq_length() for row in past.layers] == [LENGTH] * DEPTH
    for layer in range(DEPTH):
        assert torch.equal(codes[layer], torch.where(table[layer], COMPUTED, code))


def test_a_deferred_token_runs_once_and_late() -> None:
    """Three tokens leave, the fourth takes them through the layers that they left out: one call of four tokens."""
    model, batch = tiny("llama"), batch_of(1)
    leaves = torch.zeros(2, LENGTH, dtype=torch.bool)
    leaves[:, 8:11] = True
    spec = inspect(model)
    gated = with_exits(Plan.identity(spec), spec, [1], "defer")
    calls: list[int] = []
    handle = find_stack(model).layer(3).register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[1]))
    try:
        with running(model, gated, policy=Written(gated, {"after-1": leaves})) as running_now:
            calls.clear()
            got = stepped(model, batch, "dynamic", 1)
            counts = running_now.trace.counts
    finally:
        handle.remove()
    assert calls == [7, 1, 4]
    assert (counts.late, counts.projected, counts.to_dict()["simulated"]) == (6, 0, 0)
    assert counts.layers == dict.fromkeys(range(DEPTH), LENGTH)
    dense = whole(model, batch)
    assert (got - dense)[:, [*range(8), 11]].abs().max() <= 1e-4
    assert (got - dense)[:, 8:11].abs().max() > 1e-2
