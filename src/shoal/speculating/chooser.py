"""What a draft kind is: something that chooses steps, or something that finds tokens without running any layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from shoal.plan import Run, Spec
from shoal.plan.steps import Step

if TYPE_CHECKING:
    from shoal.speculating.draft_context import DraftContext


class Chooser:
    """Chooses the layers of the draft, once or before every round."""

    watches: Sequence[int] = ()
    """Layers whose outputs are kept for `DraftContext.exit_matches`."""
    most: int | None = None
    """Tokens to draft at most in the coming round, 0 for none at all; None: as many as the user allows."""

    def begin(self, spec: Spec) -> tuple[Step, ...]:
        """The steps of the first draft; called once for each generation, which may forget what was learnt before."""
        raise NotImplementedError

    def again(self, context: DraftContext) -> tuple[Step, ...] | None:
        """Called before each round; None: draft with the same steps."""
        return None


class Finder(Protocol):
    """Finds a likely continuation in the text itself."""

    def find(self, ids: torch.Tensor, most: int) -> list[int]:
        """Up to `most` tokens to come behind `ids`, [1, length]; none when nothing is found."""


@dataclass(frozen=True)
class Fixed(Chooser):
    """A draft of the same steps throughout."""

    steps: tuple[Step, ...]

    def begin(self, spec: Spec) -> tuple[Step, ...]:
        return self.steps


class PeriodicChooser(Chooser):
    """A draft of all layers at first, then one that is `chosen` again whenever the text has grown by `every` tokens."""

    every: int
    chosen_at: int = 0
    """Length of the text when a draft was last chosen."""

    def begin(self, spec: Spec) -> tuple[Run, ...]:
        self.chosen_at = 0
        return tuple(Run(i) for i in range(spec.stack("decoder").depth))

    def again(self, context: DraftContext) -> tuple[Run, ...] | None:
        if self.chosen_at and context.length - self.chosen_at < self.every:
            return None
        self.chosen_at = context.length
        return self.chosen(context)

    def chosen(self, context: DraftContext) -> tuple[Run, ...]:
        """The steps for the text as it is now."""
        raise NotImplementedError


Anew = PeriodicChooser
"""The former name, which drafts in files of users may import."""
