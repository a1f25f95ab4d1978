"""What a draft kind is: something that chooses steps, or something that finds tokens without running any layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from shoal.plan import Run, Spec
from shoal.plan.steps import Step

if TYPE_CHECKING:
    from shoal.speculating.scene import Scene


class Chooser:
    """Chooses the layers of the draft, once or anew before a round."""

    watches: Sequence[int] = ()
    """Layers whose outputs the scene is to remember (`Scene.watched`)."""
    most: int | None = None
    """Tokens to draft at most in the coming round, 0 for none at all; None: as many as the user allows."""

    def begin(self, spec: Spec) -> tuple[Step, ...]:
        """The steps of the first draft; called once for each generation, which may forget what was learnt before."""
        raise NotImplementedError

    def again(self, scene: Scene) -> tuple[Step, ...] | None:
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


class Anew(Chooser):
    """A draft of all layers until something is known of the text; `chosen` anew whenever it grew by `every` tokens."""

    every: int
    looked: int = 0
    """Tokens of the text when it was last looked at."""

    def begin(self, spec: Spec) -> tuple[Run, ...]:
        self.looked = 0
        return tuple(Run(i) for i in range(spec.stack("decoder").depth))

    def again(self, scene: Scene) -> tuple[Run, ...] | None:
        if self.looked and scene.length - self.looked < self.every:
            return None
        self.looked = scene.length
        return self.chosen(scene)

    def chosen(self, scene: Scene) -> tuple[Run, ...]:
        """The steps for the text as it is now."""
        raise NotImplementedError
