"""The model's list of layers, able to change what runs from one forward to the next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from shoal.executing.conductor import Conductor, PlannedList, Tap
from shoal.models.probe import Probe
from shoal.models.stacks import Stack
from shoal.plan.steps import Run, Step


class SteeredList(PlannedList):
    """Yields the real layers themselves until a part is played: the base model then runs exactly as it came."""

    def __init__(self, stack: Stack, probe: Probe) -> None:
        super().__init__(stack, probe, tuple(Run(i) for i in range(stack.depth)), {})
        self.__dict__["_real"] = self.__dict__["_taps"]
        self.play(None)

    def play(self, part: Any) -> None:
        """From now on yield the `taps` of `part`; None: every layer."""
        self.__dict__["_now"] = None if part is None else part.taps

    def __iter__(self) -> Iterator[Any]:
        now = self.__dict__["_now"]
        return iter(self._modules.values() if now is None else now)

    def __getitem__(self, index: Any) -> Any:
        now = self.__dict__["_now"]
        return (list(self._modules.values()) if now is None else now)[index]


@dataclass
class Part:
    """Some steps of the model, ready to run over a cache of their own rows."""

    conductor: Stateful
    taps: list[Any]
    rows: tuple[int, ...]
    """The base row behind each slot of the part."""

    @classmethod
    def of(cls, conductor: Stateful) -> Part:
        """The part that a conductor plays."""
        taps = [Tap(conductor, i) for i in range(len(conductor.due))]
        return cls(conductor, taps, conductor.rows)


class Stateful(Conductor):
    """Hands states out of the pass and takes states in.

    `saved` grows by what comes out of layer `after`. With `states`, [batch, tokens, hidden], the steps run on these,
    whatever hidden state the stock forward begins with.
    """

    def __init__(
        self, planned: PlannedList, stack: Stack, probe: Probe, steps: tuple[Step, ...], after: int | None = None
    ) -> None:
        super().__init__(planned, stack, probe, steps, {})
        self.after = after
        self.saved: list[torch.Tensor] = []
        self.states: torch.Tensor | None = None

    def tap(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As every conductor."""
        if index == 0 and self.states is not None:
            if args:
                args = (self.states, *args[1:])
            else:
                kwargs = kwargs | {"hidden_states": self.states}
        out = super().tap(index, args, kwargs)
        if index == self.after:
            self.saved.append(out[0] if isinstance(out, tuple | list) else out)
        return out

    def forget(self) -> None:
        """Let go of all states."""
        self.saved, self.states = [], None
