"""What a policy is: a plan with gates, and an answer at each gate while the model runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch

from shoal.plan import Exit, Plan, Run
from shoal.plan.steps import PartName

Grain = Literal["call", "row", "token"]
Decision = bool | torch.Tensor
"""True or False for the whole pass, or bool [batch or 1, tokens]. Only a bool lets a layer not be called at all."""


@dataclass
class Moment:
    """One forward as a policy sees it."""

    rows: int
    tokens: int
    """Columns of this forward; a prefill has as many as the prompt, padding included."""
    past: int
    """Columns that the cache holds already."""
    prompt: int | None
    """Columns from this one on count as generated although nothing is cached: a teacher-forced pass."""
    real: torch.Tensor | None = None
    """Which columns of this forward are no padding, bool [batch, tokens]; None: all."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Whatever the policy wants to remember until the end of this forward."""
    memory: dict[str, Any] = field(default_factory=dict)
    """Whatever it wants to remember of these sequences: it stays beside their KV cache, is empty when the cache is, and
    ends with the forward when there is none."""

    def generated(self, column: int) -> bool:
        """Whether `column` counts as decoding: it comes after a prefill, or `prompt` says so."""
        return self.past > 0 or (self.prompt is not None and column >= self.prompt)

    def each(self, answer: Callable[[int], bool], device: torch.device) -> Decision:
        """One answer for each column of this forward, as a bool where all agree."""
        answers = [answer(self.past + n) for n in range(self.tokens)]
        return answers[0] if len(set(answers)) == 1 else torch.tensor([answers], device=device)

    def decoding(self, device: torch.device) -> Decision:
        """Which columns count as decoding."""
        return self.past > 0 if self.prompt is None else self.each(self.generated, device)


class Sight:
    """What can be seen at an exit; the head runs when somebody asks, once."""

    hidden: torch.Tensor
    """[batch, tokens, hidden]"""

    def read(self, what: str) -> torch.Tensor:
        """[batch, tokens]: "probability" of the likeliest token, its "margin" over the second, "certainty" (1 - entropy
        over the log of the vocabulary), "choice" (the likeliest token) "saturation" (cosine to the state one layer
        before) or "probe" (what the exit's own probe makes of the state)."""
        raise NotImplementedError


class Policy:
    """Who decides at the gates of `plan`. Subclasses answer at runs, at exits or at both; by default nothing is
    skipped.
    An object holds settings alone, so that it may decide in several running models at once. What is to be remembered
    goes to `moment.notes` for one forward, and to `moment.memory` for the sequences that are being written.
    """

    grain: ClassVar[Grain] = "token"
    leaves_out: ClassVar[PartName] = "layer"
    """What a gated run is spared: all of it, or "mlp", its second half (then the KV is complete)."""
    watches: ClassVar[bool] = False
    """Whether `saw` is to be called."""
    reads_logits: ClassVar[bool] = False
    """Whether `after_forward` is to be called."""
    by: str = ""
    """The signal that it reads at exits, if it is always the same."""
    consistent: bool = False
    """True when it is proved that a layer never runs again for a sequence that has skipped it: no KV fill is needed."""

    tensors: str | None = None
    """Hash of the plan's tensors with which it was made (`hash_of_used`); None: whatever they are."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "wrote" in cls.__dict__:
            warnings.warn(
                f"{cls.__name__}.wrote(logits) is now after_forward(moment, logits); rename it",
                DeprecationWarning,
                stacklevel=2,
            )
            wrote = cls.__dict__["wrote"]

            def after_forward(self: Policy, moment: Moment, logits: torch.Tensor) -> None:
                wrote(self, logits)

            cls.after_forward = after_forward  # type: ignore[method-assign]

    def begin(self, moment: Moment) -> None:
        """A forward begins."""

    def runs(self, run: Run, moment: Moment, hidden: torch.Tensor) -> Decision:
        """Which tokens a gated run is for; `hidden` is its input, [batch, tokens, hidden]."""
        return True

    def leaves(self, stop: Exit, moment: Moment, sight: Sight) -> Decision:
        """Which tokens end at this exit; asked only where some are left, and heeded for those alone."""
        return False

    def saw(self, run: Run, moment: Moment, before: torch.Tensor, after: torch.Tensor) -> None:
        """A run took `before` to `after`; called where `watches`, for runs that were called for all tokens."""

    def after_forward(self, moment: Moment, logits: torch.Tensor) -> None:
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

    def begin(self, moment: Moment) -> None:
        moment.notes["skipped"] = [
            self.skipped(column, moment.generated(column)) for column in range(moment.past, moment.past + moment.tokens)
        ]

    def runs(self, run: Run, moment: Moment, hidden: torch.Tensor) -> Decision:
        sets = moment.notes["skipped"]
        return moment.each(lambda column: run.layer not in sets[column - moment.past], hidden.device)


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


def both(one: Decision, other: Decision) -> Decision:
    """And."""
    if isinstance(one, bool):
        return other if one else False
    if isinstance(other, bool):
        return one if other else False
    return one & other


def unless(one: Decision, other: Decision) -> Decision:
    """`one` and not `other`."""
    return both(one, (not other) if isinstance(other, bool) else ~other)


def either(one: Decision, other: Decision) -> Decision:
    """Or."""
    return unless(True, both(unless(True, one), unless(True, other)))


def settle(decision: Decision) -> Decision:
    """A bool where the tensor says the same for all."""
    if isinstance(decision, bool):
        return decision
    return bool(decision.all()) or (decision if bool(decision.any()) else False)


def column_sets(sets: Iterable[Iterable[int]]) -> list[frozenset[int]]:
    """Frozen sets of layers."""
    return [frozenset(one) for one in sets]
