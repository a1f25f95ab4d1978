"""What a policy is told while it is trained."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Learning:
    """One training step as a policy sees it: `forward.learning`.

    Every forward begins with a generator at the start of its seed and an empty ledger, before the first layer runs.
    Layers that gradient checkpointing runs again do not ask the policy again, and a forward that is computed again as a
    whole draws the same numbers.
    """

    progress: float = 1.0
    """The share of the stage that is done, 0 to 1."""
    step: int = 0
    """Steps of the stage that are done."""
    seed: int = 0
    """Of this step; another one for each step, micro-batch and process."""
    choice: int = 0
    """Which candidate is taken where a term compares them, a forward for each (`ordered:relax=mixture`)."""
    ledger: dict[str, list[torch.Tensor]] = field(default_factory=dict, init=False)
    """What the policy wrote down in the newest forward for the terms: logits, probabilities, choices, by names of its
    own, with their graph."""
    generator: torch.Generator = field(default_factory=torch.Generator, init=False, repr=False)
    """To draw from, on the CPU."""

    def begin(self) -> None:
        """A forward begins."""
        self.generator.manual_seed(self.seed)
        self.ledger.clear()

    def note(self, name: str, value: torch.Tensor) -> None:
        """Write a value down under a name; the values of one name are kept in their order."""
        self.ledger.setdefault(name, []).append(value)


def sandwich(learning: Learning, entries: int, rows: int) -> list[int]:
    """For each sequence one of so many entries of a menu, from small to large: the first has the largest, the second
    the smallest, each other one an entry that is drawn (Yu and Huang 2019, arXiv 1903.05134)."""
    drawn = torch.randint(0, entries, (rows,), generator=learning.generator).tolist()
    return [*(entries - 1, 0)[:rows], *drawn[2:]]
