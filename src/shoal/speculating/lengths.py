"""How many tokens to draft before the base model verifies them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shoal.errors import UsageError

Confidence = float | Literal["auto"] | None


@dataclass
class Length:
    """At most `most` tokens, fewer when the draft is unsure of the one it just drafted.

    `confidence`: stop behind a token before whose choice the draft's largest probability was below this; None: never;
    "auto": a threshold that moves after every verification so that about nine of ten drafted tokens are accepted
    (Draft & Verify, Zhang et al., 2309.08168, eq. 5-6: a = 0.5 a + 0.5 rate; t = 0.9 t + 0.1 (t +- 0.01)), and layers
    that hardly ever draft right (a < 0.25) rest for 4 rounds, then 8, up to 64 while they do no better. Whether to stop
    depends on the draft's distribution alone, never on the token drawn, so sampling stays exact.
    """

    most: int = 4
    confidence: Confidence = "auto"
    threshold: float = 0.6
    rate: float = 0.9
    resting: int = 0
    """Rounds for which the layers draft nothing."""
    rest: int = 4

    def __post_init__(self) -> None:
        if self.most < 1:
            raise UsageError(f"a draft of {self.most} tokens drafts nothing; use a length of 1 or more", code="U610")
        if isinstance(self.confidence, int | float) and not 0 <= self.confidence <= 1:
            raise UsageError(
                f"the draft's confidence {self.confidence} is no probability; use 0 to 1, auto or none", code="U614"
            )
        if isinstance(self.confidence, str) and self.confidence != "auto":
            raise UsageError(
                f"the draft's confidence {self.confidence!r} is no probability; use 0 to 1, auto or none", code="U614"
            )

    @property
    def looks(self) -> bool:
        """Is the draft's largest probability asked for?"""
        return self.confidence is not None

    def stops(self, largest: float) -> bool:
        """Stop behind a token for which the draft's largest probability was `largest`?"""
        if self.confidence is None:
            return False
        return largest < (self.threshold if self.confidence == "auto" else float(self.confidence))

    def rests(self) -> bool:
        """Do the layers sit this round out? Asked once for each round in which they could draft."""
        if not self.resting:
            return False
        self.resting -= 1
        return True

    def update(self, drafted: int, accepted: int) -> None:
        """Adapt the threshold to a verified draft: `accepted` of its `drafted` tokens stand."""
        if drafted and self.confidence == "auto":
            self.rate = 0.5 * self.rate + 0.5 * accepted / drafted
            step = 0.01 if self.rate <= 0.9 else -0.01
            self.threshold = min(0.99, max(0.0, 0.9 * self.threshold + 0.1 * (self.threshold + step)))
            if self.rate < 0.25:
                self.resting, self.rest = self.rest, min(64, 2 * self.rest)
            elif accepted:
                self.rest = 4
