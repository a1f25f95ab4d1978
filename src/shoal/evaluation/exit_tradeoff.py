"""Thresholds of exits that make a weighted sum of disagreement and cost small, chosen offline on recorded exits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shoal.deciding.signals import WITHOUT_HEAD
from shoal.evaluation.exits import Features
from shoal.evaluation.staged import Stages


def trade_off(features: Features, by: str, weights: Sequence[float], *, head: float = 0.0) -> list[tuple[float, ...]]:
    """For each weight w in [0, 1] thresholds by exit (infinity: nobody leaves) with a small w (1 - A) + (1 - w) C / W.

    A is the agreement with the whole model, C the mean layers per token, plus `head` layers for each look through the
    head, W the layers of the whole model. From "nobody leaves" on, always the one threshold is changed that takes most
    away, to the best value that it can have while the others stay, until none takes anything away. Each weight then
    takes the best of what was found for any, so that along growing weights the agreement never falls. w = 1: nobody
    leaves. w = 0 without `head`: all leave at the first exit.

    Source: Wang et al. 2024 (DyCE, arXiv 2403.01695): the sum, and the repeated best single change ("circular").

    How we differ: agreement stands for accuracy over the base's accuracy and layers for multiplications; the best value
    of one threshold is exact (a sum over sorted tokens), where the paper minimises over an interval; one kind of head
    and signal at all places; no conservative estimate of the accuracy, since `calibrate` reports sequences that were
    held out. Raises U700 for a weight outside of [0, 1].
    """
    return recorded_stages(features, by, head=head).best(weights)


def recorded_stages(features: Features, by: str, *, head: float = 0.0) -> Stages:
    """The exits of a record as stages: tokens count so that sequences count alike, padding not at all."""
    whole = features.depths[-1]
    look = 0.0 if by in WITHOUT_HEAD else head / whole
    share = features.counted / features.counted.sum(1, keepdims=True) / len(features.counted)
    depths = np.asarray(features.depths) / whole
    return Stages(features.signals[by], features.wrong, depths, np.full(len(features.layers), look), share)
