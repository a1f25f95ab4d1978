"""Labels and distillation mixed, on several texts."""

from __future__ import annotations

from shoal.healing.stage import Recipe, Settings, Stage, labels_and_kd


def mixed(
    *,
    labels: float = 0.5,
    builtin: float = 0.25,
    answers: float = 0.25,
    learn: str = "lora:rank=16",
    rate: float = 1e-3,
) -> Recipe:
    """Labels and distillation mixed, on the user's text, the built-in text and what the whole model itself writes.

    labels cross-entropy + (1 - labels) KL to the whole model, which writes behind beginnings of the user's text.
    Labels buy the text, distillation keeps the rest; text of the model's own distribution keeps what no file holds.
    `builtin` and `answers` are their shares of the tokens.

    Source: the sum of both losses: Hinton et al. 2015 (arXiv 1503.02531); the model's own text: Kim and Rush 2016
    (arXiv 1606.07947), and "On the limits of layer pruning for generative reasoning" (2026, arXiv 2602.01997).
    """
    data = (("text", 1 - builtin - answers), ("builtin", builtin), ("answers", answers))
    return (
        Stage(
            terms=labels_and_kd(labels),
            learn=(learn,),
            data=tuple((name, share) for name, share in data if share > 0),
            settings=Settings(rate=rate),
        ),
    )
