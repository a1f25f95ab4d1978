"""The closed form everywhere, then distillation."""

from __future__ import annotations

from shoal.healing.stage import Fit, Recipe, Settings, Stage, labels_and_kd


def refit_kd(
    *, windows: int = 32, labels: float = 0.0, learn: str = "lora:rank=16", rate: float = 1e-3, every: bool = True
) -> Recipe:
    """First `refit` on `windows` windows of the text, without gradients, then KL to the whole model.

    With `every`, `refit` fits the output matrix of each mlp from the first removed span on, layer by layer, to the
    dense model's states. `labels` is the share of the cross-entropy in what is minimised then; `learn` and `rate` say
    what moves and how fast.

    Source: our own; the order is that of Puzzle, Bercovich et al. 2024 (arXiv 2411.19146), with a closed form in the
    place of the gradients of its first stage.
    """
    fit = Fit(transform=f"refit:every={str(every).lower()}", windows=windows)
    return (fit, Stage(terms=labels_and_kd(labels), learn=(learn,), settings=Settings(rate=rate)))
