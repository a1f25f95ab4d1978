"""Which branches are computed in which step: a plain value, kept as a folder of JSON and safetensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from shoal.atomic import publish, staged
from shoal.errors import UsageError, WriteError, first_line

SCHEDULE, BETAS = "reuse.json", "betas.safetensors"
VERSION = 1


@dataclass(frozen=True, eq=False)
class ReuseSchedule:
    """The betas of a sampling run. Raises U707 for numbers that are no schedule."""

    branches: tuple[str, ...]
    """The names of modules, in the order of the columns."""
    betas: torch.Tensor
    """[steps, branches], from 0 (reuse) to 1 (compute); rows of full steps are not looked at."""
    every: int = 2
    """The first of so many steps is a full one: it computes all branches and keeps what they made."""
    threshold: float = 0.1
    """A branch is computed where its beta is above this."""

    def __post_init__(self) -> None:
        betas = self.betas
        if betas.dim() != 2 or betas.shape[1] != len(self.branches) or not len(betas) or not self.branches:
            raise _refusal(f"betas of {list(betas.shape)} are not [steps, {len(self.branches)} branches]")
        if not bool(((betas >= 0) & (betas <= 1)).all()):
            raise _refusal("a beta is no number from 0 to 1")
        if len(set(self.branches)) < len(self.branches):
            raise _refusal("a branch is named twice")
        if self.every < 2:
            raise _refusal(f"every={self.every} leaves no step that could reuse anything; give 2 or more")
        if not 0 <= self.threshold <= 1:
            raise _refusal(f"threshold={self.threshold:g} is no number from 0 to 1")

    @classmethod
    def constant(
        cls, branches: Sequence[str], steps: int, beta: float, *, every: int = 2, threshold: float = 0.1
    ) -> ReuseSchedule:
        """One beta for all: 1 is the dense model, 0 reuses whatever can be reused."""
        if steps < 1:
            raise _refusal(f"steps={steps} is no sampling run")
        return cls(tuple(branches), torch.full((steps, len(branches)), float(beta)), every, threshold)

    @property
    def steps(self) -> int:
        """How often a sampling run calls the model."""
        return len(self.betas)

    def is_full(self, step: int) -> bool:
        """Whether a step, counted from 0, computes everything and keeps it."""
        return step % self.every == 0

    def computes(self, step: int, branch: int) -> bool:
        """Whether the branch with this number is computed in that step."""
        return self.is_full(step) or float(self.betas[step, branch]) > self.threshold

    @property
    def planned(self) -> dict[str, int]:
        """In how many steps of a sampling run each branch is computed."""
        return {
            name: sum(self.computes(step, at) for step in range(self.steps)) for at, name in enumerate(self.branches)
        }

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the schedule as a folder that appears whole or not at all. Raises W286 where
        something is there already and `overwrite` is False, or nothing can be written."""
        final = Path(folder)
        said = {"version": VERSION, "branches": self.branches, "every": self.every, "threshold": self.threshold}
        if final.exists() and not overwrite:
            raise WriteError(f"{final} is there already; name another folder or overwrite it", code="W286")
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with staged(final) as partial:
                (partial / SCHEDULE).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
                save_file({"betas": self.betas.detach().float().cpu().contiguous()}, partial / BETAS)
                publish(partial, final, overwrite=overwrite)
        except OSError as error:
            raise WriteError(f"cannot write {final}: {error.strerror}; choose another place", code="W286") from None
        return final

    @classmethod
    def load(cls, folder: str | Path) -> ReuseSchedule:
        """Read what `save` wrote. Raises W286 for what is no such folder."""
        place = Path(folder)
        try:
            said = json.loads((place / SCHEDULE).read_text(encoding="utf-8"))
            betas = load_file(place / BETAS)["betas"].float()
            return _read(said, betas)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, UsageError) as error:
            raise WriteError(
                f"{place} is no reuse schedule of this version ({first_line(error)}); name a folder that "
                "ReuseSchedule.save wrote",
                code="W286",
            ) from None


def _read(said: dict[str, Any], betas: torch.Tensor) -> ReuseSchedule:
    branches, every, threshold = said["branches"], said["every"], said["threshold"]
    if said["version"] != VERSION or not isinstance(branches, list) or not all(isinstance(b, str) for b in branches):
        raise ValueError("its branches are no list of names, or it has another version")
    if type(every) is not int or type(threshold) not in (int, float):
        raise ValueError("every or threshold is no number")
    return ReuseSchedule(tuple(branches), betas, every, float(threshold))


def _refusal(why: str) -> UsageError:
    return UsageError(f"no reuse schedule can be made of this: {why}", code="U707")
