"""Which mlps at both ends of a stack must always run, from what was measured on a calibration text."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal.errors import UsageError

MAX_BYTES = 4_000_000


def cold_regions(file: str, layers: Sequence[int], threshold: float) -> tuple[int, int]:
    """How many of `layers` are cold at the beginning and at the end: those in front of the first and behind the last
    whose mlp turns the state so little that the mean cosine between its own input and output reaches `threshold`.

    `file`: what `shoal measure --measure block-influence:part=mlp --json` wrote. Raises U658 for a file that is none,
    and where no mlp reaches the threshold.
    """
    values = _values(file)
    cosines = {layer: 1 - values[layer] for layer in layers if layer < len(values)}
    warm = [place for place, layer in enumerate(layers) if cosines.get(layer, -math.inf) >= threshold]
    if len(cosines) < len(layers):
        raise UsageError(
            f"cold={file} has scores of {len(values)} layers and not of layer {max(layers)}; measure this model",
            code="U658",
        )
    if not warm:
        most = max(cosines.values())
        raise UsageError(
            f"by cold={file} no mlp reaches threshold={threshold:g}, the highest cosine is {most:.4f}; lower it",
            code="U658",
        )
    return warm[0], len(layers) - 1 - warm[-1]


def _values(file: str) -> list[float]:
    """By layer 1 - cosine, infinite for an mlp that was not judged."""
    try:
        with Path(file).expanduser().open("rb") as stream:
            read = json.loads(stream.read(MAX_BYTES + 1))
    except (OSError, ValueError, RecursionError):
        read = None
    found = next((one for one in _scores_in(read) if one.get("measure") == "block-influence" and _of_mlp(one)), None)
    values = None if found is None else found.get("values")
    if not isinstance(values, list) or not all(_is_score(one) for one in values):
        raise UsageError(
            f"cold={file} is no measurement of mlps; write it by shoal measure MODEL --measure "
            "block-influence:part=mlp --json",
            code="U658",
        )
    return [math.inf if one is None else float(one) for one in values]


def _scores_in(read: Any) -> list[dict[str, Any]]:
    """The scores of one measure, or of each of several."""
    several = read.get("scores") if isinstance(read, dict) else None
    found = [read, *(several.values() if isinstance(several, dict) else [])]
    return [one for one in found if isinstance(one, dict)]


def _of_mlp(one: dict[str, Any]) -> bool:
    detail = one.get("detail")
    return isinstance(detail, dict) and detail.get("part") == "mlp"


def _is_score(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
