"""Patient distillation: labels, the teacher's distribution, and its states on the way."""

from __future__ import annotations

from shoal.healing.stage import Recipe, Settings, Stage


def patient(*, labels: float = 0.5, hidden: float = 10.0, temperature: float = 5.0, rate: float = 1e-4) -> Recipe:
    """Patient distillation: labels, the whole model's distribution and its states on the way; all layers learn.

    The loss is labels cross-entropy + (1 - labels) KL + hidden PKD, PKD over every second layer of the base.
    PKD compares states of length 1 behind the same base layer. `labels` -1: the states alone, for encoders, which have
    neither labels nor a distribution.

    Source: Sun et al. 2019 (patient knowledge distillation, arXiv 1908.09355).

    How we differ: the student keeps the layers of its plan; there it is the teacher's first ones.
    """
    states = f"hidden-kd:weight={hidden},by=pkd,at=every:2"
    terms = [states]
    if labels >= 0:
        pair = {"cross-entropy": labels, f"logit-kd:temperature={temperature}": 1 - labels}
        terms = [_weighted(term, weight) for term, weight in pair.items() if weight > 0] + terms
    return (Stage(terms=tuple(terms), learn=("all",), settings=Settings(rate=rate)),)


def _weighted(term: str, weight: float) -> str:
    return f"{term}{',' if ':' in term else ':'}weight={weight}"
