"""All batches through one layer before the next: a layer that lies in a file is read once, however many batches.

The batches wait at a layer as hidden states, in memory up to a share of what is free, beyond it on the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import accumulate

import torch
from torch import nn

from shoal.errors import UsageError
from shoal.executing.calls import with_hidden
from shoal.executing.recorder import Recorder
from shoal.models.opened import OpenedModel
from shoal.models.stacks import Stack
from shoal.models.streamed import weights_loaded
from shoal.plan import Run, Step
from shoal.recording.layer_inputs import LayerInputs
from shoal.recording.state_store import StateStore

BeforeLayer = Callable[[torch.Tensor, torch.Tensor | None, int], None]
"""Called before a layer runs on a batch, with ids, mask and the number of the batch's first sequence."""
Path = tuple[tuple[Step, ...], ...]
"""For each layer of the stack the steps that run there, each a run of this very layer; none where it is left out."""


class LayerMajor:
    """Batches of (ids, mask) in front of the first layer of a stack."""

    def __init__(
        self,
        model: nn.Module | OpenedModel,
        stack: Stack,
        batches: Iterable[tuple[torch.Tensor, torch.Tensor | None]],
        *,
        memory: int | None = None,
    ) -> None:
        """`memory`: bytes of hidden states held, None for a quarter of what is free. The model is probed and runs once
        for each batch, so do this before there are hooks on its layers."""
        self.rows, self.stack = tuple(batches), stack
        inputs = LayerInputs(model, self, stack=stack.name)
        self._stream = inputs.stream()
        self._states = StateStore(inputs.first_states[0].device, memory=memory)
        for number, state in enumerate(self._stream.states):
            self._states.put(((), number), state)
        self._stream.states[:] = [torch.empty(0)] * len(self.rows)
        _drop_first_states(inputs)

    def batches(self, _: int, /) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """The batches as they were cut."""
        return iter(self.rows)

    def run(
        self, before_layer: BeforeLayer, report: Callable[[int], None] | None = None, recorder: Recorder | None = None
    ) -> None:
        """Run every layer once, in order, on all batches; `before_layer` is called before each run of a layer, `report`
        with the number of layers that are done, and `recorder` is called for every run.

        What the layers make equals bit for bit what the stock forward makes: they are the same calls in another order.
        Evaluation mode is the caller's business. Raises U576 for states that fit nowhere.
        """
        whole = [tuple((Run(index),) for index in range(self.stack.depth))]
        try:
            with self._stream.executor.recording(recorder or Recorder()):
                self.run_paths(whole, before_layer=before_layer, report=report)
        finally:
            self.close()

    @torch.no_grad()
    def run_paths(
        self,
        paths: Sequence[Path],
        *,
        before_layer: BeforeLayer | None = None,
        report: Callable[[int], None] | None = None,
    ) -> None:
        """Run all batches through the steps of each path; what paths share runs once. Then `state` has the results."""
        firsts = list(accumulate((len(ids) for ids, _ in self.rows), initial=0))
        here: list[tuple[Step, ...]] = [()] * len(paths)
        for index in range(self.stack.depth):
            moves = dict.fromkeys((old, path[index]) for old, path in zip(here, paths, strict=True) if path[index])
            there = [old + path[index] for old, path in zip(here, paths, strict=True)]
            gone = set(here) - set(there)
            with weights_loaded(self.stack.layer(index)) if moves else nullcontext():
                for number, (ids, mask) in enumerate(self.rows):
                    for before, steps in moves:
                        if before_layer is not None:
                            before_layer(ids, mask, firsts[number])
                        self._move(before, steps, number)
                    for before in gone:
                        self._states.forget((before, number))
            here = there
            if report is not None:
                report(index + 1)

    def state(self, steps: tuple[Step, ...], number: int) -> torch.Tensor:
        """The hidden state of batch `number` behind these steps. Raises U576 when there was no place for it."""
        state = self._states.get((steps, number))
        if state is None:
            raise UsageError(
                f"the hidden states of {len(self.rows)} batches fit neither into memory nor into the temporary folder; "
                "use fewer or shorter sequences, or set TMPDIR to a larger disk",
                code="U576",
            )
        return state

    def close(self) -> None:
        """Forget the hidden states."""
        self._states.close()

    def _move(self, before: tuple[Step, ...], steps: tuple[Step, ...], number: int) -> None:
        state = self.state(before, number)
        for step in steps:
            self._stream.states[number] = state
            state = self._stream.run(number, step)
        self._stream.states[number] = torch.empty(0)
        self._states.put((before + steps, number), state)


def _drop_first_states(inputs: LayerInputs) -> None:
    """Drop the hidden states with which the layers were called: the store holds the batches' states."""
    inputs.first_states.clear()
    for record in inputs.forwards:
        for index, call in record.calls.items():
            record.calls[index] = with_hidden(call, None)
