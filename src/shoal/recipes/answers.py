"""The whole model's own answers as labels."""

from __future__ import annotations

from shoal.healing.stage import Recipe, Settings, Stage


def answers(*, learn: str = "lora:rank=16", rate: float = 1e-3) -> Recipe:
    """Cross-entropy on what the whole model writes behind the beginnings of the text, or as the answers of its rows.

    Source: sequence-level knowledge distillation, Kim and Rush 2016 (arXiv 1606.07947).

    How we differ: the text is drawn at temperature 1; there it is the likeliest that beam search finds.
    """
    stage = Stage(terms=("cross-entropy",), learn=(learn,), data=(("answers", 1.0),), settings=Settings(rate=rate))
    return (stage,)
