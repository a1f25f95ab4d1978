"""The inputs of every layer, and the residual stream run layer by layer over many sequences, at the cost of one pass.

The stock forward runs once for each batch over layers that hand their input on, which tells what it prepares for them
(masks, rotary tables, inputs of their own); then any step of any plan can be run on stored states of one depth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Protocol

import torch
from torch import nn

from shoal.executing.bind import BoundPlan, bind
from shoal.executing.calls import hidden_of
from shoal.executing.executor import Executor
from shoal.executing.forward import Forward
from shoal.executing.inputs import require_whole, run_stack
from shoal.models.evaluating import evaluating
from shoal.models.opened import OpenedModel, open_model
from shoal.models.streamed import weights_loaded
from shoal.plan import Plan, Step
from shoal.plan.steps import runs


class Batched(Protocol):
    """What can be cut into batches, such as `Data`."""

    def batches(self, size: int, /) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Ids and mask [batch, length] of each."""


class LayerInputs:
    """The arguments that the stock forward calls each layer with, captured once for each batch of `data`."""

    def __init__(
        self, model: nn.Module | OpenedModel, data: Batched, *, stack: str | None = None, batch: int = 1
    ) -> None:
        """Raises U507 when a plan is running on the model, M323 for a stack that reads no text."""
        self.opened = open_model(model)
        require_whole(self.opened, "fitting a stand-in", stack)
        self.model, self.stack = self.opened.model, self.opened.stack(stack)
        self.facts = self.opened.facts(self.stack.name)
        self.first_states: list[torch.Tensor] = []
        self.forwards: list[Forward] = []
        """For each batch the hidden state that enters the first layer, [batch, length, hidden]."""
        self.real: list[torch.Tensor] = []
        """For each batch where a token is real, bool [batch, length]."""
        bound = bind(self.opened)
        executor = bound.executor(self.stack.name)
        with evaluating(self.model), bound.running():
            for ids, mask in data.batches(batch):
                record = self._prepared(executor, ids, mask)
                self.first_states.append(hidden_of(record.calls[0]))
                self.forwards.append(record)
                self.real.append(torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask.bool().cpu())

    def _prepared(self, executor: Executor, ids: torch.Tensor, mask: torch.Tensor | None) -> Forward:
        return executor.prepared(lambda: run_stack(self.model, self.stack, ids, mask))

    def token_masks(self, skip_first: int = 0) -> list[torch.Tensor]:
        """For each batch the tokens that count: real ones, without the first `skip_first` of each sequence."""
        return [real & (real.cumsum(-1) > skip_first) for real in self.real]

    def stream(self, plan: Plan | None = None) -> ResidualStream:
        """The states that enter the first layer; `plan` is needed for steps that share KV."""
        # not checked: a plan whose tensors are about to be fitted is not legal yet
        bound = BoundPlan(self.opened, plan or Plan.identity(self.opened.spec), {})
        return ResidualStream(self, list(self.first_states), bound.executor(self.stack.name))


class ResidualStream:
    """The hidden states of all batches, [batch, length, hidden] each, at one depth of one plan."""

    def __init__(self, inputs: LayerInputs, states: list[torch.Tensor], executor: Executor) -> None:
        self.inputs, self.states, self.executor = inputs, states, executor
        self._forwards = [Forward(calls=record.calls) for record in inputs.forwards]
        self._tensors: dict[str, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.states)

    def run(self, number: int, step: Step, weights: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """The output of `step` for batch `number`, [batch, length, hidden]; the stream is not moved."""
        tensors = dict(weights or {})
        if tensors.keys() != self._tensors.keys() or any(t is not self._tensors[n] for n, t in tensors.items()):
            self._tensors = tensors
            self.executor.use(tensors)
        return self.executor.run_step(step, self.states[number], self._forwards[number])

    def advance(self, step: Step, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        """Take all batches through `step`, for which a layer that lies in a file is read once."""
        with evaluating(self.inputs.model), ExitStack() as held:
            for run in runs((step,)):
                held.enter_context(weights_loaded(self.inputs.stack.layer(run.layer)))
            for number in range(len(self.states)):
                self.states[number] = self.run(number, step, weights)
