"""What a piece of data was: enough words and one hash to tell two numbers apart or to make one of them again."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class DataInfo:
    """The facts that are printed and recorded beside every number."""

    source: str
    """`builtin (Python 3.12)`, the name of a file, the id of a hub data set, or `list`; of a mixture each with its
    weight."""
    split: str
    """calibrate, tune, test or whole; of the sources only the built-in text is really cut by it."""
    length: int
    """Tokens in a window, the BOS token included."""
    count: int
    """Windows."""
    stride: int
    """Tokens of text from the start of one window to the start of the next."""
    bos: Literal["none", "each"]
    tokens: int
    """count x length."""
    sha256: str
    """Of the token ids as little-endian int64, row by row."""
    seed: int | None = None
    """Of the random choice of windows; None when they are the first ones."""
    how: str | None = None
    """How rows became text: their keys, and the chat template with a hash of it; None for plain text."""

    def describe(self) -> str:
        """One line, such as `valid.txt, calibrate, 16 x 512 tokens, stride 512, no BOS, 8,192 tokens`."""
        parts = [
            self.source,
            *([self.how] if self.how is not None else []),
            self.split,
            f"{self.count} x {self.length} tokens",
            f"stride {self.stride}",
            "no BOS" if self.bos == "none" else "BOS before each window",
            f"{self.tokens:,} tokens",
        ]
        if self.seed is not None:
            parts.append(f"windows drawn with seed {self.seed}")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "how" or value is not None}
