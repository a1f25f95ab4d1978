"""What settings of thresholds cost, for the table of `calibrate`, and what their promise does not say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from shoal.api.exit_options import Exits
from shoal.api.risk_control import ControlledRisk, uncontrolled_risk
from shoal.deciding.signals import WITHOUT_HEAD
from shoal.evaluation.exit_search import Target
from shoal.evaluation.exits import Features


def finite(features: Features, thresholds: Sequence[float]) -> dict[int, float]:
    """Threshold by layer, for those exits at which anybody leaves."""
    pairs = zip(features.layers, thresholds, strict=True)
    return {layer: float(value) for layer, value in pairs if np.isfinite(value)}


def row(
    features: Features,
    held: Features,
    target: Target,
    by: str,
    thresholds: Sequence[float],
    head: float,
    name: int | str,
) -> dict[str, Any]:
    """One line of the table: a setting on the sequences `held`, which `head` layers a look costs."""
    one = uncontrolled_risk(held, target, by, thresholds)
    return {
        "setting": name,
        "thresholds": {str(layer): value for layer, value in finite(features, thresholds).items()},
        "layers": one.layers,
        "looks": one.looks,
        "layers_with_looks": one.layers + head * one.looks,
        target.kind: target.shown(one.risk),
        "error": one.error,
    }


def notes(promises: Sequence[ControlledRisk], live: bool, exits: Exits, head: float, whole: float) -> tuple[str, ...]:
    """What the promise does not say."""
    found = [
        "The promise is about sequences like the calibration text, fed as they are (teacher-forced): each token is "
        "compared with what the whole plan writes after the same text. In free generation a token that differs changes "
        "all that follows, so texts drift apart faster than these figures.",
        "Sequences, not tokens, are the units that are counted. Windows of one long document are not independent; "
        "give many documents where that matters.",
    ]
    if not live and exits.fill != "defer":
        found.append(
            f"Tested on recorded exits, with keys and values of the whole plan; the fill {exits.fill} makes others. "
            "Use --check live, or fill=defer."
        )
    if exits.by not in WITHOUT_HEAD:
        found.append(f"A look through the head costs about as much as {head:.1f} layers, which mean layers leave out.")
    found += [
        f"With its looks, {one.target} costs as much as {one.layers + head * one.looks:.1f} layers, more than the "
        f"{whole:g} of the whole plan: do not expect it to be faster here."
        for one in promises
        if one.promised and one.layers + head * one.looks > whole
    ]
    found += [
        f"No setting passed for {one.target}: nobody leaves. More sequences, other exits or another signal may help."
        for one in promises
        if not one.promised
    ]
    return tuple(found)
