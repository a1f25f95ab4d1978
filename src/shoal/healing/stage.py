"""A stage of training: which formulas, what moves, how long and how fast. A recipe is a tuple of stages."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from shoal.errors import UsageError
from shoal.registry import Entry, get
from shoal.spelling import Spelled, options_of, read


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the optimiser goes: AdamW, a linear warm-up, then a cosine down to `floor` of the rate."""

    rate: float = 1e-3
    """The highest learning rate of what names none of its own."""
    betas: tuple[float, float] = (0.9, 0.95)
    decay: float = 0.0
    """Weight decay."""
    clip: float = 1.0
    """The largest norm of the gradient."""
    warm_up: float = 0.03
    """Share of the steps, and at least six of them where there are 24 or more."""
    floor: float = 0.1
    """Share of the highest rate at the end."""
    evaluations: int = 4
    """How often held-out text is looked at, or less often where it would be more than a quarter of what is read in
    training; the tensors that it likes best are kept."""
    patience: int = 3
    """After so many evaluations in a row without a better one the stage ends."""

    def steps_between(self, steps: int, trained: int, held: int) -> int:
        """Steps from one evaluation to the next, for so many windows trained on in all and so many held out."""
        often = max(1, min(self.evaluations, trained // (4 * held)))
        return math.ceil(steps / often)

    def factor(self, step: int, steps: int) -> float:
        """The share of the highest rate at a step (from 0) of so many."""
        rising = max(min(6, steps // 4), round(self.warm_up * steps))
        if step < rising:
            return (step + 1) / (rising + 1)
        done = (step - rising) / max(1, steps - rising)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stretch of training."""

    terms: tuple[str, ...] = ("logit-kd",)
    """Formulas as typed, NAME:option=value; `weight` is an option of each, 1 without it."""
    own_terms: tuple[str, ...] = ()
    """Formulas on the windows of the source `own`, in place of `terms` (without any: `terms`); the held-out text is
    then read both as it is and as the plan writes it on, in the same shares."""
    learn: tuple[str, ...] = ("lora",)
    """What moves, as typed; `rate` is an option of each, `settings.rate` without it."""
    policy: str = ""
    """Who decides at gates meanwhile, as typed (`shoal ls policies`); it puts them into a plan that has none."""
    share: float = 1.0
    """Of the tokens of the whole recipe, beside the other stages' shares."""
    data: tuple[tuple[str, float], ...] = (("text", 1.0),)
    """Where the tokens come from, with the share of each: `text` (the user's), `builtin`, `answers` and `own` (what the
    dense model, and what the plan as the stage finds it, write behind the beginnings of the user's text)."""
    temperature: float = 1.0
    """At which `answers` and `own` are drawn; 0 takes the likeliest token."""
    removed: float = 1.0
    """The share of the plan's removed layers that is gone in this stage; those that matter least go first."""
    fade: bool = False
    """Whether what is removed fades out over the stage instead of being gone from its first step."""
    shuffle: str = ""
    """The layers whose order is drawn for each micro-batch, as all or 3-28; on held-out text by its tokens."""
    settings: Settings = field(default_factory=Settings)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for records."""
        return asdict(self)

    def __str__(self) -> str:
        own = f"; on its own writing {' + '.join(self.own_terms)}" if self.own_terms else ""
        return f"{' + '.join(self.terms)}{own} · {' + '.join(self.learn)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A transform in place of a stage, such as `refit`: fitted on the first windows of the text, without gradients."""

    transform: str
    windows: int = 32

    def to_dict(self) -> dict[str, Any]:
        """Plain data for records."""
        return asdict(self)

    def __str__(self) -> str:
        return self.transform


def labels_and_kd(labels: float) -> tuple[str, ...]:
    """The terms of labels cross-entropy + (1 - labels) KL to the whole model; a term without weight is left out."""
    weights = {"cross-entropy": labels, "logit-kd": 1 - labels}
    return tuple(f"{name}:weight={weight}" for name, weight in weights.items() if weight)


def routed(options: str = "", layers: str = "") -> str:
    """The policy `routed` as typed, with these options; `layers` that have gates, without any all but the first."""
    return policy_text("routed", options, layers)


def policy_text(name: str, options: str = "", layers: str = "") -> str:
    """A policy as typed, with these options and the `layers` that have gates, last, since they may hold commas."""
    own = [text for text in (options, f"layers={layers}" if layers else "") if text]
    return ":".join([name, ",".join(own)] if own else [name])


Recipe = tuple[Stage | Fit, ...]


@dataclass(frozen=True, slots=True)
class Term:
    """A formula with its options and its weight in the sum."""

    text: str
    entry: Entry
    options: dict[str, Any]
    weight: float

    @property
    def function(self) -> Callable[..., Any]:
        """(what is seen in one step, options) -> the sum over the tokens that count."""
        return self.entry.load()


@dataclass(frozen=True, slots=True)
class Selection:
    """A choice of tensors with its options and its own learning rate, if it has one."""

    text: str
    entry: Entry
    options: dict[str, Any]
    rate: float | None


def term_of(text: str) -> Term:
    """`NAME:weight=0.1,option=value`. Raises U501 for a name, U502 for an option."""
    entry, options, weight = _parsed("terms", text, "weight")
    return Term(text, entry, options, 1.0 if weight is None else weight)


def selection_of(text: str) -> Selection:
    """`NAME:rate=1e-4,option=value`. Raises U501 for a name, U502 for an option."""
    entry, options, rate = _parsed("learners", text, "rate")
    return Selection(text, entry, options, rate)


def _parsed(kind: Any, text: str, own: str) -> tuple[Entry, dict[str, Any], float | None]:
    """The entry, its options, and the number under `own`, which every entry of the kind has."""
    spelled = read(text)
    entry = get(kind, spelled.name)
    given = [value for key, value in spelled.options if key == own]
    rest = Spelled(spelled.name, tuple(pair for pair in spelled.options if pair[0] != own), spelled.lone)
    try:
        number = float(given[-1]) if given else None
    except ValueError:
        number = -1.0
    if number is not None and not 0 < number < float("inf"):
        raise UsageError(f"{text}: {own}={given[-1]} is no number above 0; write {own}=0.1", code="U502")
    return entry, options_of(entry, rest, lone=True), number
