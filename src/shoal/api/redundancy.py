"""redundancy: how alike every two layers are, by their weights, states, keys and values, and attention maps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from shoal._version import __version__
from shoal.api.assess import Source, opened_base, text_of
from shoal.atomic import write_atomically
from shoal.data import Data
from shoal.errors import UsageError
from shoal.evaluation import Progress
from shoal.measures.attention_similarity import attention_similarity
from shoal.measures.cka import cka
from shoal.measures.kv_similarity import kv_similarity
from shoal.measures.weight_similarity import weight_similarity
from shoal.models.kinds import require_text
from shoal.record import command_line, plain
from shoal.report.redundancy import render_redundancy
from shoal.scores import Scores

NEAREST = 8
"""So many of the nearest pairs are named."""
_ABSENT = ("U531", "U534", "U537")
"""Codes with which a measure says that the model has nothing for it to look at."""


@dataclass(frozen=True)
class PairMap:
    """How far apart every two layers are, by one yardstick: 0 for equal ones."""

    name: str
    measure: str
    """As `shoal measure --measure` takes it."""
    unit: str
    matrix: tuple[tuple[float, ...], ...]
    """[depth][depth], NaN for two that were not compared; of states [depth + 1][depth + 1], the last being the output.
    Empty where the model has nothing to compare, which `why_not` says."""
    why_not: str = ""

    def nearest(self) -> list[tuple[int, int, float]]:
        """The `NEAREST` pairs (lower, upper, distance) that are least apart."""
        pairs = itertools.combinations(range(len(self.matrix)), 2)
        found = [(i, j, self.matrix[j][i]) for i, j in pairs]
        return sorted((one for one in found if not math.isnan(one[2])), key=lambda one: one[2])[:NEAREST]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "nearest": self.nearest()}


@dataclass(frozen=True)
class Redundancy:
    """What `redundancy` found."""

    source: str
    stack: str
    maps: tuple[PairMap, ...]
    data: Data

    def to_dict(self) -> dict[str, Any]:
        """Plain data; what is not finite is None."""
        return {
            "source": self.source,
            "stack": self.stack,
            "data": self.data.info.to_dict(),
            "maps": [plain(one.to_dict()) for one in self.maps],
        }


def redundancy(
    source: Source,
    *,
    data: Any = "builtin",
    split: str = "calibrate",
    length: int = 128,
    limit: int = 8,
    bos: bool = False,
    batch: int = 1,
    stack: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Redundancy:
    """Compare every two layers by the measures weight-similarity, cka, kv-similarity and attention-similarity on
    `limit` windows of `length` tokens.

    A yardstick for which the model has nothing (no attention maps, quantised weights) says why. `options` go to
    `shoal.load`. Raises `DataError` for text that cannot be used, U507 while a plan is running, M323 for a stack that
    reads no text.
    """
    loaded = opened_base(source, **options)
    require_text(loaded.model, "the comparison of layers")
    text = text_of(loaded, data, split=split, length=length, limit=limit, bos=bos)
    asked: dict[str, Any] = {"pairs": "all", "stack": stack, "batch": batch, "progress": progress}
    ways: tuple[tuple[str, str, Callable[..., Scores]], ...] = (
        ("Weights", "weight-similarity", weight_similarity),
        ("Hidden states", "cka", cka),
        ("Keys and values", "kv-similarity", kv_similarity),
        ("Attention maps", "attention-similarity", attention_similarity),
    )
    maps = tuple(
        _map(name, f"{typed}:pairs=all", partial(own, loaded.model, text, **asked)) for name, typed, own in ways
    )
    return Redundancy(loaded.source, loaded.opened.stack(stack).name, maps, text)


def _map(name: str, typed: str, measured: Callable[[], Scores]) -> PairMap:
    try:
        scores = measured()
    except UsageError as error:
        if error.code not in _ABSENT:
            raise
        return PairMap(name, typed, "", (), str(error))
    rows = scores.detail["matrix"]
    if scores.measure == "cka":  # that of two states is how alike they are
        rows = [[1 - alike for alike in row] for row in rows]
    return PairMap(name, typed, scores.unit, tuple(map(tuple, rows)))


def publish(found: Redundancy, path: Path) -> None:
    """Write the page with the four maps."""
    facts = {"Model": found.source, "Stack": found.stack, "Text": found.data.info.describe()}
    facts |= {one.name: f"shoal measure {found.source} --measure {one.measure}" for one in found.maps}
    page = render_redundancy(
        found.to_dict()
        | {
            "title": f"Which layers of {found.source} are alike",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": __version__,
            "command": " ".join(command_line()),
            "facts": facts,
        }
    )
    write_atomically(path, page)
