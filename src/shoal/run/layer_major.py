"""All batches through one layer before the next: a layer that lies in a file is read once, however many batches.

The batches wait at a layer as hidden states, in memory up to a share of what is free, beyond it on the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

import torch
from torch import nn

from shoal.errors import UsageError
from shoal.models.stacks import Stack
from shoal.models.streamed import held
from shoal.plan import Run
from shoal.run.observe import Turn
from shoal.run.states import States
from shoal.run.walk import Walk


class LayerMajor:
    """Batches of (ids, mask) in front of the first layer of a stack."""

    def __init__(
        self,
        model: nn.Module,
        stack: Stack,
        batches: Iterable[tuple[torch.Tensor, torch.Tensor | None]],
        *,
        memory: int | None = None,
    ) -> None:
        """`memory`: bytes of hidden states held, None for a quarter of what is free. The model is probed and runs once
        for each batch, so do this before there are hooks on its layers."""
        self.rows, self.stack = tuple(batches), stack
        walk = Walk(model, self, stack=stack.name)
        self._stream = walk.stream()
        self._states = States(walk.starts[0].device, memory=memory)
        for number, state in enumerate(self._stream.states):
            self._states.put((0, number), state)
        self._stream.states[:] = [torch.empty(0)] * len(self.rows)
        _let_go(walk)

    def batches(self, _: int, /) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """The batches as they were cut."""
        return iter(self.rows)

    @torch.no_grad()
    def run(self, turn: Turn, report: Callable[[int], None] | None = None) -> None:
        """Run every layer once, in order, on all batches; `turn` is called before each run of a layer, `report` with
        the number of layers that are done.

        What the layers make equals bit for bit what the stock forward makes: they are the same calls in another order.
        Hooks on the layers see them. Evaluation mode is the caller's business.
        """
        firsts = list(accumulate((len(ids) for ids, _ in self.rows), initial=0))
        try:
            for index in range(self.stack.depth):
                with held(self.stack.layer(index)):
                    for number, (ids, mask) in enumerate(self.rows):
                        turn(ids, mask, firsts[number])
                        self._advance(index, number)
                if report is not None:
                    report(index + 1)
        finally:
            self._states.close()

    def _advance(self, index: int, number: int) -> None:
        states, stream = self._states, self._stream
        state = states.get((index, number))
        if state is None:
            raise UsageError(
                f"the hidden states of {len(self.rows)} batches fit neither into memory nor into the temporary folder; "
                "use fewer or shorter sequences, or set TMPDIR to a larger disk",
                code="U576",
            )
        states.forget((index, number))
        stream.states[number] = state
        states.put((index + 1, number), stream.run(number, Run(index)))
        stream.states[number] = torch.empty(0)


def _let_go(walk: Walk) -> None:
    """The states with which the layers were called: the store holds those that count."""
    walk.starts.clear()
    for calls in walk.calls:
        for index, (args, kwargs) in calls.items():
            calls[index] = ((None, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": None})
