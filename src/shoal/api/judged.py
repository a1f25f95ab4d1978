"""What healing did, on two texts: windows held out of the training text, and a second one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from shoal.data import Data
from shoal.deciding.gating import ungated
from shoal.deciding.policy import Schedule
from shoal.evaluation import Perplexity, Progress, perplexity
from shoal.executing.weights import Tensors
from shoal.healing.run_folder import RunFolder
from shoal.live import Running, running
from shoal.models.load import Loaded
from shoal.plan import Plan
from shoal.record import plain

HELD, WATCHED = "held out", "watched"
"""The two texts that say what healing did: windows held out of the training text, and a second text."""
WATCHED_WINDOWS = 8
Ran = tuple[Plan, Tensors, str]
"""A plan, its tensors, and who decides at its gates, as typed; "" for nobody."""


@dataclass(frozen=True)
class Judged:
    """What one text says of the dense model, of the plan before and after healing."""

    dense: Perplexity
    before: Perplexity
    after: Perplexity
    layers: float | None = None
    """Layers that a token of this text ran on average, where a policy decides about the plan after healing."""

    @property
    def back(self) -> float:
        """The share of the lost nats that came back."""
        lost = self.before.nll - self.dense.nll
        return (self.before.nll - self.after.nll) / lost if lost > 0 else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        sides = {name: getattr(self, name) for name in ("dense", "before", "after")}
        figures = {name: {"perplexity": one.value, "nll": one.nll, "error": one.error} for name, one in sides.items()}
        depth = {} if self.layers is None else {"layers": self.layers}
        return plain({**figures, **depth, "back": self.back, "data": self.dense.info.to_dict()})


def judged(
    loaded: Loaded,
    texts: Mapping[str, Data],
    sides: Mapping[str, Ran | None],
    kept: RunFolder,
    *,
    batch: int,
    stop: Callable[[], bool],
    progress: Progress | None,
) -> dict[str, Judged]:
    """What each text says of each side; those that are done when the run is told to stop."""
    found: dict[str, Judged] = {}
    for name, text in texts.items():
        worth, layers = dict[str, Perplexity](), None
        for side, ran in sides.items():
            if stop():
                return found
            worth[side], layers = _worth(loaded, text, ran, kept, f"{side}, {name}", batch)
            if progress is not None:
                progress(len(found) * 3 + len(worth), 6, "both texts")
        found[name] = Judged(**worth, layers=layers)
    return found


def _worth(
    loaded: Loaded, text: Data, ran: Ran | None, kept: RunFolder, name: str, batch: int
) -> tuple[Perplexity, float | None]:
    """The perplexity of the whole model, or of a plan with its tensors, and under a policy the layers of a token; from
    the run's folder if it is known there."""
    known = kept.found(name)
    if known is not None and known["info"]["sha256"] == text.info.sha256:
        each = {key: tuple(known[key]) for key in ("per_sequence", "per_sequence_tokens")}
        figures = {key: value for key, value in known.items() if key != "layers"}
        return Perplexity(**{**figures, **each, "info": text.info}), known.get("layers")
    layers = None
    with nullcontext() if ran is None else _running(loaded, *ran) as handle:
        found = perplexity(loaded.model, text, batch=batch)
        if handle is not None and handle.policy is not None:
            layers = handle.trace.counts.asked / handle.trace.counts.tokens
    if math.isfinite(found.nll):
        kept.remember(name, {**found.to_dict(), **({} if layers is None else {"layers": layers})})
    return found, layers


@contextmanager
def _running(loaded: Loaded, plan: Plan, weights: Tensors, policy: str) -> Iterator[Running]:
    """A plan at work as it is judged: where nobody decides every layer runs and nobody leaves, and what a schedule says
    of written tokens holds for all of a text but its first."""
    with running(loaded.model, plan if policy else ungated(plan), weights, policy=policy or None) as handle:
        if isinstance(handle.policy, Schedule):
            handle.prompt = 1
        yield handle
