"""Per task: each task has layers of its own, and a sequence keeps those of the task with which it began."""

from __future__ import annotations

from typing import ClassVar

import torch

from shoal.deciding.decisions import Decision
from shoal.deciding.forward import ForwardView
from shoal.deciding.gating import with_gates
from shoal.deciding.policy import Grain, Policy
from shoal.deciding.policy_options import kept_layers
from shoal.errors import UsageError
from shoal.examples import PolicyExamples, Refusal
from shoal.plan import Plan, Run, Spec

EXAMPLES = PolicyExamples(
    deciding=("per-task:plans=sql:0-3+chat:0,2-3,use=chat",),
    never=("per-task:plans=sql:0-3+chat:0,3",),
    always={"per-task:plans=sql:0-3+chat:0,3,use=chat": "0,3"},
    refused=(
        Refusal("no tasks", "per-task", "U584", "NAME:LAYERS"),
        Refusal("layers that are not there", "per-task:plans=sql:0-9", "U584", "layer 4"),
        Refusal("a task that has none", "per-task:plans=sql:0-2,use=chat", "U584", "use=chat"),
    ),
)


def per_task(plan: Plan, spec: Spec, *, plans: str = "", use: str = "") -> Policy:
    """Run the layers of one named task, and switch to another task's while the model stays loaded.

    `plans` = sql:0-20+chat:0-25,28-29: NAME:LAYERS joined by +. `use` is the task to begin with (default: the first),
    and `policy.use(NAME)` switches from the next sequences on; one that has begun keeps the layers that it began with,
    so none is ever missing in its KV cache and no fill is needed. A layer that a task leaves out is not called.

    Source: a path through the modules for each task: D2R, He et al. 2023 (arXiv 2312.14472).

    How we differ: the paths are given (by `shoal prune` on each task's text, say), where D2R learns them with its
    reinforcement learning. Raises U584 for lists that cannot be read and for a task that is not among them.
    """
    named: dict[str, frozenset[int]] = {}
    for piece in plans.split("+"):
        name, separator, listed = piece.partition(":")
        if not separator or not name or not listed or name in named:
            raise UsageError(
                f"per-task: plans={plans!r:.60} does not say which layers each task runs; write NAME:LAYERS joined by "
                "+, each name once, as in plans=sql:0-20+chat:0-29",
                code="U584",
            )
        named[name] = frozenset(kept_layers(plan, listed))
    gone = sorted(set(plan.layers()) - frozenset.intersection(*named.values()))
    made = PerTask(with_gates(plan, spec, gone, "task", None), named)
    made.use(use or next(iter(named)))
    return made


class PerTask(Policy):
    """Sets of layers by the name of a task."""

    grain: ClassVar[Grain] = "call"
    consistent = True

    def __init__(self, plan: Plan, named: dict[str, frozenset[int]]) -> None:
        super().__init__(plan)
        self.named = named
        self.task = next(iter(named))

    def use(self, task: str) -> None:
        """From the next sequences on, the layers of this task. Raises U584."""
        if task not in self.named:
            raise UsageError(f"per-task: use={task} has no layers; choose one of {', '.join(self.named)}", code="U584")
        self.task = task

    def should_run(self, run: Run, forward: ForwardView, hidden: torch.Tensor) -> Decision:
        if forward.past == 0:
            forward.memory["task"] = self.task
        return run.layer in self.named[forward.memory.get("task", self.task)]
