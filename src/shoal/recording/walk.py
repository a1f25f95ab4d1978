"""Layer by layer over many sequences: what a fit needs, at the price of one pass however many layers it looks at.

The stock forward runs once for each batch over layers that hand their input on, which tells what it prepares for them
(masks, rotary tables, inputs of their own); then any step of any plan can be run on stored states of one depth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from shoal.executing.conductor import Conductor, Pass, PlannedList
from shoal.models.evaluating import evaluating
from shoal.models.opened import open_model
from shoal.models.stacks import unwrap
from shoal.plan import Plan, Step
from shoal.recording.observe import inputs_of, require_whole

Calls = dict[int, tuple[tuple[Any, ...], dict[str, Any]]]


class Batched(Protocol):
    """What can be cut into batches, such as `Data`."""

    def batches(self, size: int, /) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Ids and mask [batch, length] of each."""


class Walk:
    """Batches of `data` at the door of a model's layers. Holds what the layers are called with, once for each batch."""

    def __init__(self, model: nn.Module, data: Batched, *, stack: str | None = None, batch: int = 1) -> None:
        """Raises U507 when a plan is running on the model."""
        require_whole(model, "fitting a stand-in", stack)
        self.model, self.stack = unwrap(model), open_model(model).stack(stack)
        self.probe = open_model(self.model).facts(self.stack.name)
        self.starts: list[torch.Tensor] = []
        self.calls: list[Calls] = []
        self.real: list[torch.Tensor] = []
        """For each batch where a token is real, bool [batch, length]."""
        with evaluating(self.model):
            for ids, mask in data.batches(batch):
                calls = self._called(ids, mask)
                args, kwargs = calls[0]
                self.starts.append(args[0] if args else kwargs["hidden_states"])
                self.calls.append(calls)
                self.real.append(torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask.bool().cpu())

    def _called(self, ids: torch.Tensor, mask: torch.Tensor | None) -> Calls:
        calls: Calls = {}
        original = self.stack.layers
        setattr(self.stack.owner, self.stack.attr, _Recording(self, calls))
        try:
            backbone = self.model.base_model
            backbone(**inputs_of(backbone, ids, mask), use_cache=False)
        finally:
            setattr(self.stack.owner, self.stack.attr, original)
        return calls

    def kept(self, skip_first: int = 0) -> list[torch.Tensor]:
        """For each batch the tokens that count: real ones, without the first `skip_first` of each sequence."""
        return [real & (real.cumsum(-1) > skip_first) for real in self.real]

    def stream(self, plan: Plan | None = None) -> Stream:
        """The states that enter the first layer; `plan` is needed for steps that share KV."""
        steps = plan.steps(self.stack.name) if plan is not None else ()
        return Stream(self, list(self.starts), steps)


class Stream:
    """The hidden states of all batches, [batch, length, hidden] each, at one depth of one plan."""

    def __init__(self, walk: Walk, states: list[torch.Tensor], steps: tuple[Step, ...]) -> None:
        self.walk, self.states = walk, states
        stack = walk.stack
        self._conductor = Conductor(PlannedList(stack, walk.probe, (), {}), stack, walk.probe, steps, {})
        self._passes = [Pass(calls=calls) for calls in walk.calls]

    def __len__(self) -> int:
        return len(self.states)

    def run(self, number: int, step: Step, weights: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """The output of `step` for batch `number`, [batch, length, hidden]; the stream stays where it is."""
        conductor = self._conductor
        hidden = self.states[number]
        conductor.now = self._passes[number]
        like = next(self.walk.stack.layer(0).parameters())
        conductor.use(
            {
                name: t if t.requires_grad else t.to(device=hidden.device, dtype=like.dtype)
                for name, t in (weights or {}).items()
            }
        )
        # no layer has the index -1: every run finds what its own layer is called with in the pass
        return conductor._step(-1, step, hidden, -1, (), {})

    def advance(self, step: Step, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        """Take all batches through `step`."""
        with evaluating(self.walk.model):
            for number in range(len(self.states)):
                self.states[number] = self.run(number, step, weights)


class _Recording(nn.ModuleList):
    """A list of layers whose taps write down what they are called with and hand the hidden state on."""

    def __init__(self, walk: Walk, calls: Calls) -> None:
        super().__init__()
        self._modules = walk.stack.layers._modules
        self.__dict__["_taps"] = [_Note(walk, i, calls) for i in range(len(self._modules))]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.__dict__["_taps"])

    def __getitem__(self, index: Any) -> Any:
        return self.__dict__["_taps"][index]


class _Note:
    def __init__(self, walk: Walk, index: int, calls: Calls) -> None:
        self.walk, self.index, self.calls = walk, index, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self.walk.stack.layer(self.index), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls[self.index] = (args, kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        tail = self.walk.probe.layers[self.index].tail
        return hidden if tail < 0 else (hidden, *[None] * tail)
