"""A forward that begins in the middle: plans that start alike share the hidden state at which they part.

The stock forward still prepares embeddings, masks and rotary tables; the taps before the cut hand on what they are
given, and the tap at the cut goes on from the state that another plan, which ran the same steps before, left there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from shoal.executing.conductor import Conductor, Pass, PlannedList, Tap, _schedule
from shoal.executing.live import Running
from shoal.plan import Plan, Step
from shoal.plan.steps import runs

Prefix = tuple[int, tuple[Step, ...]]
"""A cut, as the base layer at whose tap the state is read, and the steps that ran before it."""
Seen = Callable[[int, torch.Tensor], None]
"""Called with the base layer and the hidden state that its tap is given."""


def prefixes(plan: Plan, stack: str | None = None) -> dict[int, Prefix]:
    """Cut -> prefix, for each cut behind which no step reads what a layer before it left (KV, or arguments)."""
    steps, depth = plan.steps(stack), plan.depth(stack)
    due, _ = _schedule(steps, depth)
    found: dict[int, Prefix] = {}
    needs = depth
    for cut in reversed(range(1, depth)):
        for run in runs(tuple(step for _, step in due[cut])):
            needs = min(needs, run.layer, *(source.layer for source in run.layer_sources))
        if needs >= cut:
            found[cut] = (cut, tuple(step for tap in due[:cut] for _, step in tap))
    return found


def shared(plans: Iterable[Plan], stack: str | None = None) -> set[Prefix]:
    """The prefixes at which two or more of `plans` part: for each plan, the longest one that another has as well."""
    own = [prefixes(plan, stack) for plan in plans]
    seen: dict[Prefix, int] = {}
    for found in own:
        for prefix in found.values():
            seen[prefix] = seen.get(prefix, 0) + 1
    longest = ((prefix for _, prefix in sorted(found.items(), reverse=True) if seen[prefix] > 1) for found in own)
    return {prefix for prefix in (next(ours, None) for ours in longest) if prefix is not None}


@contextmanager
def resumed(handle: Running, *, cut: int = 0, state: torch.Tensor | None = None, seen: Seen) -> Iterator[None]:
    """Until the end of the block, forwards of the running plan begin at `cut` with `state` (at 0: as always).

    `state`: the hidden state as the tap of `cut` is given it, of the same batch. `seen` is called at every tap from the
    cut on, before it runs. For one stack, and forwards without a KV cache.
    """
    planned = next(stack.layers for stack, _ in handle.swapped)
    assert isinstance(planned, PlannedList)
    taps = planned.__dict__["_taps"]
    suffix = _Suffix(planned.__dict__["conductor"], cut, state, seen)
    planned.__dict__["_taps"] = [_SuffixTap(suffix, tap.index) for tap in taps]
    try:
        yield
    finally:
        planned.__dict__["_taps"] = taps


class _SuffixTap(Tap):
    def __init__(self, suffix: _Suffix, index: int) -> None:
        super().__init__(suffix.conductor, index)
        self.suffix = suffix

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.suffix.tap(self.index, args, kwargs)


class _Suffix:
    def __init__(self, conductor: Conductor, cut: int, state: torch.Tensor | None, seen: Seen) -> None:
        self.conductor, self.cut, self.state, self.seen = conductor, cut, state, seen

    def tap(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if index < self.cut:
            if index == 0:
                self.conductor.now = Pass()
            return self.conductor.passed(index, hidden)
        if index == self.cut and self.state is not None:
            hidden = self.state
            if args:
                args = (hidden, *args[1:])
            else:
                kwargs = kwargs | {"hidden_states": hidden}
        self.seen(index, hidden)
        return self.conductor.tap(index, args, kwargs)
