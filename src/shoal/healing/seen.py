"""What a term may look at in one step: each thing is computed once, and only when a term asks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import torch

from shoal.errors import UsageError
from shoal.executing.forward import Forward
from shoal.healing.averages import Averages
from shoal.healing.shown import Shown, Side
from shoal.healing.summed import summed
from shoal.models.kinds import require_causal
from shoal.plan import Plan

Formula = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor], torch.Tensor]
"""(logits of the student [n, vocabulary], of the teacher or None, labels [n]) -> the sum over these tokens, []. Logits
are float32."""


class Seen:
    """Student and teacher on one batch of tokens."""

    def __init__(
        self,
        student: Side,
        teacher: Side | None,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        labels: torch.Tensor,
        averages: Averages | None = None,
        *,
        prompts: bool = False,
    ) -> None:
        """`ids`, `mask` and `labels` are [batch, tokens]; `labels` holds the token that each column predicts, -100
        where the column does not count. `prompts`: to a policy no token counts as generated."""
        self._prompts = prompts
        self.sides = student, teacher
        self.averages = averages or Averages()
        self.ids, self.mask, self.labels = ids, mask, labels

    @property
    def plan(self) -> Plan:
        """What the student runs."""
        return self.sides[0].bound.plan

    @property
    def stack(self) -> str:
        """The stack that is healed."""
        return self.sides[0].stack.name

    @cached_property
    def counts(self) -> torch.Tensor:
        """Which columns count, bool [batch, tokens]."""
        return self.labels != -100

    @cached_property
    def student(self) -> Shown:
        """What the student's forward shows; gradients flow. To a policy what stands in front of the first token that
        counts is a prompt, and the rest written by the model: a layer that was left out never runs again."""
        return self.sides[0].show(self.ids, self.mask, self._written)

    @property
    def _written(self) -> torch.Tensor:
        """[batch, tokens]; a token counts where the column in front of it counts, which predicts it."""
        if self._prompts:
            return torch.zeros_like(self.counts)
        begun = self.counts.cumsum(1) > 0
        return torch.cat([torch.zeros_like(begun[:, :1]), begun[:, :-1]], 1)

    def once_more(self, *, prompts: bool = False, choice: int = 0) -> Seen:
        """The same tokens in another forward of the student, its graph beside the first one: with `prompts` to a policy
        all of them are prompt, and `choice` is what a policy takes where candidates are compared. What the policy wrote
        down of the first forward stays."""
        self.student  # noqa: B018 - what the policy writes down of it comes first
        side = self.sides[0]
        told, side.learning = side.learning, replace(side.learning, choice=choice)
        other = Seen(side, None, self.ids, self.mask, self.labels, self.averages, prompts=prompts)
        try:
            other.student  # noqa: B018 - its forward is this one
        finally:
            side.learning = told
        return other

    @cached_property
    def whole(self) -> Seen:
        """The same tokens, all of which a policy takes for a prompt."""
        return self.once_more(prompts=True)

    @cached_property
    def teacher(self) -> Shown:
        """What the teacher's forward shows, without gradients. Raises U675 where there is no teacher."""
        with torch.no_grad():
            return self._teacher().show(self.ids, self.mask)

    def noted(self, name: str, what: str) -> torch.Tensor:
        """What the policy wrote down under `name` at each gate in turn in the student's forward, [gates, batch,
        tokens]; gradients flow. Raises U675 where no policy did; `what` names the term then."""
        self.student  # noqa: B018 - its forward asks the policy
        found = self.sides[0].learning.ledger.get(name)
        if not found:
            raise UsageError(
                f"{what} reads the gates of a policy that learns and there is none; use a recipe that has one, as "
                "skip-layer",
                code="U675",
            )
        return torch.stack([one.to(self.labels.device) for one in found])

    @cached_property
    def prepared(self) -> Forward:
        """What the student's layers are called with besides the state, for steps that run alone."""
        with torch.no_grad():
            return self.sides[0].prepared(self.ids, self.mask)

    def over_logits(
        self,
        formula: Formula,
        what: str,
        *,
        teacher: bool = False,
        columns: torch.Tensor | None = None,
        behind: torch.Tensor | None = None,
        head: str = "base",
    ) -> torch.Tensor:
        """The sum of `formula` over the columns that count, a chunk of them at a time: logits of all of them, which
        are [batch, tokens, vocabulary], are never held. With `teacher` its logits are given too, without gradients.
        `columns` [batch, tokens], bool: only those of the columns that count. `behind` [batch, tokens, hidden]: states
        of the student that are read in place of its last ones, by the plan's own `head` or by the model's; the student
        itself stands in the teacher's place then, its last logits without gradients.

        Raises M322 for a model without next-token scores; `what` names the term then.
        """
        student = self.sides[0]
        require_causal(student.opened.model, what)
        read = self.counts if columns is None else self.counts & columns
        if behind is not None:
            told = self.student.last[read].detach() if teacher else None
            states = behind[read]
        else:
            told = self.teacher.last[read] if teacher else None  # first: no graph of the student lies beside it
            states = self.student.last[read]
        labels = self.labels[read]

        def of(part: slice, chunk: torch.Tensor) -> torch.Tensor:
            wanted = None
            if told is not None:
                with torch.no_grad():
                    tells = self._teacher() if behind is None else student
                    wanted = tells.logits(told[part][None])[0].float()
            made = student.logits(chunk[None]) if behind is None else student.exit_logits(chunk[None], head)
            return formula(made[0].float(), wanted, labels[part])

        vocabulary = student.opened.model.config.get_text_config(decoder=True).vocab_size
        return summed(
            states, of, vocabulary, most=self.ids.shape[1],
            learning=student.learning_head(None if behind is None else head),
        )  # fmt: skip

    def _teacher(self) -> Side:
        if self.sides[1] is None:
            raise UsageError("this term needs a teacher and there is none; leave teacher=None out", code="U675")
        return self.sides[1]
