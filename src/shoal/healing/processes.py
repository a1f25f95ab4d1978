"""The processes that heal one model together, each on its share of the windows: what the first finds out, all know."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from shoal.errors import ShoalError, UsageError, first_line

Found = TypeVar("Found")


def started() -> int:
    """How many processes torchrun or accelerate launch has started; 1 without them."""
    count = os.environ.get("WORLD_SIZE", "")
    return int(count) if count.isdecimal() else 1


def require_one_process(what: str) -> None:
    """Raise U676 for one of several processes: they would write over each other's results."""
    if started() > 1:
        raise UsageError(
            f"{what} runs in one process and this is one of {started()}; start it without torchrun or accelerate "
            "launch, and heal the plan that it makes with them (torchrun -m shoal heal)",
            code="U676",
        )


@dataclass(frozen=True)
class Processes:
    """One process, or one of a group in which each calls the same in the same order."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where the group exchanges tensors."""

    @staticmethod
    def join(device: str | torch.device | None = None) -> Processes:
        """The group that torchrun or accelerate launch has started, joined on first use; alone without them. On a
        machine with accelerators each process takes one of its own; `device` cpu keeps it on the CPU."""
        if started() == 1:
            return Processes()
        from accelerate import PartialState

        on_cpu = str(device).startswith("cpu") or not torch.accelerator.is_available()
        state = PartialState(cpu=on_cpu)
        return Processes(state.process_index, state.num_processes, state.device)

    @staticmethod
    def leave() -> None:
        """The group is not needed any more."""
        if started() > 1 and dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def told(self, find: Callable[[], Found]) -> Found:
        """What the first process finds, in all of them; what it raises is raised in all."""
        if self.count == 1:
            return find()
        box: list[Any] = [None, None]
        raised: Exception | None = None
        if self.first:
            try:
                box[0] = find()
            except Exception as error:
                raised = error
                code = error.code if isinstance(error, ShoalError) else None
                box[1] = (type(error) if code else UsageError, error.args[0] if code else first_line(error), code)
        dist.broadcast_object_list(box, src=0)
        if raised is not None:
            raise raised
        if box[1] is not None:
            kind, message, code = box[1]
            raise kind(message, code=code)
        found: Found = box[0]
        return found

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag whether it is set in any process."""
        if self.count == 1:
            return flags
        found = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return tuple(bool(one) for one in found.tolist())

    def summed(self, value: float) -> float:
        """The sum over all processes, the same number in each."""
        if self.count == 1:
            return value
        found = torch.tensor(value, dtype=torch.float32, device=self.device)
        dist.all_reduce(found)
        return float(found)

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier()
