"""policy.json as plain data: thresholds for each exit at several levels, by `shoal calibrate`, or who decides with the
tensors that `shoal heal` trained."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from shoal.atomic import write_atomically
from shoal.deciding.signals import Signal
from shoal.errors import NotationError, UsageError
from shoal.executing.weights import Tensors, hash_of_used
from shoal.plan import Plan
from shoal.record import plain

FORMAT = "shoal-policy/1"
MAX_BYTES = 4_000_000


@dataclass(frozen=True, slots=True)
class Level:
    """One setting that can be switched to while the model runs."""

    name: str
    """agreement=0.95 for one that is promised, setting-3 for a row of the table that is not."""
    thresholds: dict[int, float]
    """By base layer, 0-based: from which value of the signal on a token leaves behind it; without a value never."""
    promised: bool = False
    layers: float | None = None
    """Mean layers per generated token on the calibration text."""
    found: dict[str, Any] = field(default_factory=dict)
    """What else is known of it: risk, p-value, confidence, sequences."""


@dataclass(frozen=True, slots=True)
class PolicyFile:
    """Everything that the policy `calibrated` needs, and how it came to be."""

    family: str
    fingerprint: str
    """Of the base model's structure, `Spec.fingerprint`."""
    plan: str
    """Hash of the plan without gates whose exits were calibrated."""
    levels: tuple[Level, ...]
    by: str = "probability"
    head: str = "base"
    fill: str = "project"
    prefill: bool = False
    weights: str | None = None
    """Hash of the tensors of the exits, when they have some of their own."""
    made: dict[str, Any] = field(default_factory=dict)
    """Data, counts, versions, command."""

    @property
    def exits(self) -> tuple[int, ...]:
        """Every layer behind which some level may leave."""
        return tuple(sorted({layer for level in self.levels for layer in level.thresholds}))

    def level(self, name: str) -> Level:
        """The level of this name, the first one for "". Raises U606."""
        for level in self.levels:
            if name in ("", level.name):
                return level
        names = ", ".join(level.name for level in self.levels)
        raise UsageError(f"there is no level {name!r:.60} in this policy; it has {names}", code="U606")

    def require(self, plan: Plan, where: str) -> None:
        """Raise U605 when the policy was calibrated for another model or plan."""
        _require_same(self, plan, where, "calibrated", "shoal calibrate")

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `save` writes it."""
        found: dict[str, Any] = plain(asdict(self))
        for level in found["levels"]:
            level["thresholds"] = {str(layer): value for layer, value in level["thresholds"].items()}
        return {"format": FORMAT, "policy": "calibrated", **found}

    def save(self, path: str | Path) -> None:
        """Write it, whole or not at all. Raises W229 when that is not possible."""
        write_atomically(path, json.dumps(self.to_dict(), indent=1) + "\n", "the policy")


@dataclass(frozen=True, slots=True)
class LearnedPolicy:
    """A policy whose tensors are those of a plan, as `shoal heal` trained them together."""

    text: str
    """NAME:key=value,... as `--policy` takes it."""
    family: str
    fingerprint: str
    plan: str
    """Hash of the plan with its gates."""
    weights: str | None
    """Hash of the tensors of plan and gates."""
    made: dict[str, Any] = field(default_factory=dict)
    """Recipe, data, versions, command."""

    @staticmethod
    def of(text: str, plan: Plan, weights: Tensors, made: dict[str, Any]) -> LearnedPolicy:
        """What `text` decides about `plan` with its `weights`."""
        base = plan.base
        return LearnedPolicy(text, base.family, base.fingerprint, plan.hash, hash_of_used(plan, weights), made)

    def require(self, plan: Plan, where: str) -> None:
        """Raise U605 when the policy was trained for another model or plan."""
        _require_same(self, plan, where, "trained", "shoal heal")

    def save(self, path: str | Path) -> None:
        """Write it, whole or not at all. Raises W229 when that is not possible."""
        data = {"format": FORMAT, "policy": "learned", **plain(asdict(self))}
        write_atomically(path, json.dumps(data, indent=1) + "\n", "the policy")


def _require_same(file: PolicyFile | LearnedPolicy, plan: Plan, where: str, how: str, command: str) -> None:
    if file.fingerprint != plan.base.fingerprint:
        raise UsageError(
            f"{where} was {how} for a {file.family} of another shape, not for this {plan.base.family}; run {command} "
            "on this model",
            code="U605",
        )
    if file.plan != plan.hash:
        raise UsageError(f"{where} was {how} for another plan than {plan}; run {command} with this plan", code="U605")


def load_policy(path: str | Path) -> PolicyFile | LearnedPolicy:
    """Read a policy.json; any bytes give what it holds or a `NotationError` N006, never another exception."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise NotationError(f"{path} is too large for a policy; name the file of shoal calibrate", code="N006")
        data = json.loads(path.read_bytes())
    except OSError as error:
        message = f"cannot read the policy {path}: {error.strerror}; name the file of shoal calibrate"
        raise NotationError(message, code="N006") from None
    except (ValueError, RecursionError):
        raise NotationError(f"{path} is no JSON; name the file of shoal calibrate", code="N006") from None
    try:
        return _read(data)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise NotationError(
            f"{path} is no policy that this version can read ({str(error)[:80]}); make it anew with shoal calibrate",
            code="N006",
        ) from None


def _read(data: dict[str, Any]) -> PolicyFile | LearnedPolicy:
    if data["format"] != FORMAT or data["policy"] not in ("calibrated", "learned"):
        raise ValueError(f"its format is {data['format']!r}")
    if data["policy"] == "learned":
        weights = None if data.get("weights") is None else str(data["weights"])
        words = {name: str(data[name]) for name in ("text", "family", "fingerprint", "plan")}
        return LearnedPolicy(**words, weights=weights, made=dict(data.get("made") or {}))
    levels = tuple(
        Level(
            str(level["name"]),
            {int(layer): _finite(value) for layer, value in level["thresholds"].items()},
            bool(level.get("promised")),
            level.get("layers"),
            dict(level.get("found") or {}),
        )
        for level in data["levels"]
    )
    if not levels:
        raise ValueError("it has no levels")
    if data["by"] not in get_args(Signal):
        raise ValueError(f"its signal is {data['by']!r}")
    return PolicyFile(
        str(data["family"]),
        str(data["fingerprint"]),
        str(data["plan"]),
        levels,
        data["by"],
        str(data["head"]),
        str(data["fill"]),
        bool(data["prefill"]),
        None if data.get("weights") is None else str(data["weights"]),
        dict(data.get("made") or {}),
    )


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("a threshold is not finite")
    return number
