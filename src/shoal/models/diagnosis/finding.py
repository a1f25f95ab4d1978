"""What a diagnosis says: findings, and the repaired checkpoint as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong."""

    what: str
    """The config field, tensor or file."""
    found: str
    wanted: str
    """What it should be."""
    mend: str | None
    """How a repair mends it; None when the folder does not say enough."""
    breaks: bool = True
    """False for what transformers loads rightly all the same."""

    def __str__(self) -> str:
        return f"{self.what} is {self.found}, should be {self.wanted}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with a checkpoint, and the sound one that it can become."""

    findings: tuple[Finding, ...]
    config: PreTrainedConfig | None = None
    """Repaired, of the whole model; None when the config cannot be understood."""
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Repaired config fields, (old, new)."""
    names: dict[str, str] = field(default_factory=dict)
    """{tensor of the repaired checkpoint: its name in the files}."""
    doubtful: tuple[tuple[str, str], ...] = ()
    """(tensor, tensor it is tied to) pairs that the files hold both: equal, or not tied."""
    base: PreTrainedConfig | None = None
    """The config before layers were deleted, where it is known which were kept."""
    kept: tuple[int, ...] | None = None
    """Layers of `base` that were kept, where that is known."""
    carried: frozenset[str] = frozenset()
    """Tensors of the repaired checkpoint that belong to layers beside the model's, which the config announces."""
    notes: tuple[str, ...] = ()
    """What is worth a word and not wrong."""

    @property
    def broken(self) -> tuple[Finding, ...]:
        """The findings that keep the checkpoint from loading rightly."""
        return tuple(finding for finding in self.findings if finding.breaks)

    @property
    def unrepairable(self) -> tuple[Finding, ...]:
        """The findings that a repair cannot mend."""
        return tuple(finding for finding in self.findings if finding.breaks and finding.mend is None)
