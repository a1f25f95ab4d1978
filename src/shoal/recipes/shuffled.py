"""A model whose layers may run in any order."""

from __future__ import annotations

from shoal.healing.stage import Recipe, Settings, Stage, labels_and_kd


def shuffled(*, layers: str = "all", labels: float = 1.0, learn: str = "lora:rank=16", rate: float = 5e-4) -> Recipe:
    """The order of the layers is drawn anew for each micro-batch, all orders being as likely.

    The loss is `labels` cross-entropy + (1 - `labels`) KL to the whole model in its own order. `layers` (1-28) are
    those that change places, all of the plan by default. What is kept is what held-out text likes best under drawn
    orders too. The plan stays as it is; any order of it can be run afterwards (0,2,1,3), and a layer be left out of it
    (0,2,3).

    Source: Freiberger et al. 2024 (LayerShuffle, arXiv 2407.04513), its first variant.

    How we differ: LoRA learns where all tensors do there (`learn` all does the same); layers are not told at which
    place they run, as in the variants with a position's encoding or prediction. Halves stay together, as in its code.
    """
    return (Stage(terms=labels_and_kd(labels), learn=(learn,), shuffle=layers, settings=Settings(rate=rate)),)
