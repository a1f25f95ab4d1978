"""What a policy is: a plan with gates, and an answer at each gate while the model runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch

from shoal.deciding.decisions import Decision, Reduced, Soft, and_not, collapse_uniform, logical_and, logical_or
from shoal.deciding.exit_view import ExitView
from shoal.deciding.forward import ForwardView
from shoal.executing.weights import Tensors
from shoal.models.opened import OpenedModel
from shoal.plan import Exit, Plan, Run, Spec
from shoal.plan.steps import PartName

__all__ = ["Decision", "ExitView", "ForwardView", "Grain", "Policy", "Reduced", "Schedule", "Soft", "needs_no_fill"]

Grain = Literal["call", "row", "token"]


_RENAMED = {"runs": "should_run", "leaves": "should_exit", "saw": "after_run", "wrote": "after_forward"}
"""Former names of the answers of a policy: user files may define or call them."""


class Policy:
    """Who decides at the gates of `plan`. Subclasses answer at runs, at exits or at both; by default nothing is
    skipped.
    An object holds settings alone, so that it may decide in several running models at once. What is to be remembered
    goes to `forward.notes` for one forward, and to `forward.memory` for the sequences that are being written.
    """

    grain: ClassVar[Grain] = "token"
    leaves_out: ClassVar[PartName] = "layer"
    """What a gated run is spared: all of it, or "mlp", its second half (then the KV is complete)."""
    watches: ClassVar[bool] = False
    """Whether `after_run` is to be called."""
    watched: ClassVar[PartName] = "layer"
    """Of what `after_run` is told: of the run, or of its mlp alone (`before` is then the state that its attention
    leaves)."""
    reads_logits: ClassVar[bool] = False
    """Whether `after_forward` is to be called."""
    by: str = ""
    """The signal that it reads at exits, if it is always the same."""
    consistent: bool = False
    """True when it is proved that a layer never runs again for a sequence that has skipped it: no KV fill is needed."""

    only_training: ClassVar[bool] = False
    """Whether nothing is decided behind the training, so that the plan that learned runs without it."""
    tensors: str | None = None
    """Hash of the plan's tensors with which it was made (`hash_of_used`); None: whatever they are."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for old, new in _RENAMED.items():
            if old in cls.__dict__ and new not in cls.__dict__:
                warnings.warn(f"{cls.__name__}.{old} is now called {new}; rename it", DeprecationWarning, stacklevel=2)
                setattr(cls, new, _adapted(old, cls.__dict__[old]))
            elif new in cls.__dict__ and old != "wrote":
                setattr(cls, old, cls.__dict__[new])  # what a subclass of this one may still call

    def start(self, spec: Spec) -> dict[str, torch.Tensor]:
        """The tensors that it begins to learn with, by the names by which it finds them in `forward.tensors`."""
        return {}

    def check_tensors(self, tensors: Tensors, spec: Spec) -> None:
        """Raise U710 and U711 for tensors that it needs and that are missing, or do not fit the model."""

    def prepare(self, opened: OpenedModel) -> Any:
        """What it needs of this model beside its tensors, which it finds as `forward.prepared`; asked once, while the
        model is whole. Raises P1xx for a model that it cannot decide on."""
        return None

    def begin(self, forward: ForwardView) -> None:
        """A forward begins."""

    def should_run(self, run: Run, forward: ForwardView, hidden: torch.Tensor) -> Decision | Soft | Reduced:
        """Which tokens a gated run is for; `hidden` is its input, [batch, tokens, hidden]."""
        return True

    def instead(self, run: Run, forward: ForwardView, hidden: torch.Tensor) -> torch.Tensor:
        """The states of tokens that a gated run is not for, as `hidden`, its input: what they keep."""
        return hidden

    def should_exit(self, step: Exit, forward: ForwardView, view: ExitView) -> Decision | Soft:
        """Which tokens end at this exit; asked only where some are left, and heeded for those alone."""
        return False

    def after_run(self, run: Run, forward: ForwardView, before: torch.Tensor, after: torch.Tensor) -> None:
        """A run took `before` to `after`; called where `watches`, for runs that were called for all tokens."""

    def after_forward(self, forward: ForwardView, logits: torch.Tensor) -> None:
        """The forward is over: logits of its last column, [batch, vocabulary]; called where `reads_logits`."""


class Schedule(Policy):
    """Which layers are skipped depends on the column alone, so that it can be proved what is needed before running."""

    settled: int = 0
    """From this column on nothing changes any more."""

    @cached_property
    def consistent(self) -> bool:  # type: ignore[override]
        """Proved column by column."""
        return needs_no_fill(self)

    def skipped(self, column: int, generated: bool) -> frozenset[int]:
        """Base layers that the token in `column` skips, in a prompt or as a generated one."""
        raise NotImplementedError

    def begin(self, forward: ForwardView) -> None:
        def sets(generated: Callable[[int], bool]) -> list[frozenset[int]]:
            columns = range(forward.past, forward.past + forward.tokens)
            return [self.skipped(column, generated(column)) for column in columns]

        if forward.written is None:
            forward.notes["skipped"] = sets(forward.generated)
        else:
            forward.notes["skipped"] = sets(lambda _: False)
            forward.notes["skipped as written"] = sets(lambda _: True)

    def should_run(self, run: Run, forward: ForwardView, hidden: torch.Tensor) -> Decision:
        def by(name: str) -> Decision:
            sets = forward.notes[name]
            return forward.each(lambda column: run.layer not in sets[column - forward.past], hidden.device)

        if forward.written is None:
            return by("skipped")
        written = forward.written.to(hidden.device)
        return logical_or(logical_and(by("skipped as written"), written), and_not(by("skipped"), written))


def needs_no_fill(schedule: Schedule) -> bool:
    """Proof by looking at every column until nothing changes: no token runs a layer that an earlier token of the same
    sequence has skipped. A prompt may end anywhere."""
    for column in range(schedule.settled + 1):
        prompt, later = schedule.skipped(column, False), column + 1
        if not prompt <= schedule.skipped(later, False) or not prompt <= schedule.skipped(later, True):
            return False
        if not schedule.skipped(column, True) <= schedule.skipped(later, True):
            return False
    return True


Policy.runs = Policy.should_run  # type: ignore[attr-defined]
Policy.leaves = Policy.should_exit  # type: ignore[attr-defined]
Policy.saw = Policy.after_run  # type: ignore[attr-defined]


def _adapted(old: str, function: Callable[..., Any]) -> Callable[..., Any]:
    if old != "wrote":
        return function

    def after_forward(self: Policy, forward: ForwardView, logits: torch.Tensor) -> None:
        function(self, logits)

    return after_forward


_FORMER = {
    "Moment": ForwardView, "Sight": ExitView, "both": logical_and, "unless": and_not, "either": logical_or,
    "settle": collapse_uniform,
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _FORMER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    now: Any = _FORMER[name]
    warnings.warn(
        f"{name} is now {now.__module__}.{now.__name__}; import it from there", DeprecationWarning, stacklevel=2
    )
    return now
