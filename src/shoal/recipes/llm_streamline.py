"""LLM-Streamline's healing: one layer takes over what was removed behind it."""

from __future__ import annotations

from shoal.healing.stage import Recipe, Settings, Stage


def llm_streamline(*, loss: float = 0.25, rate: float = 3e-4) -> Recipe:
    """The layer before each removed span learns what it and the span made, then on the cross-entropy of the text.

    Of a window of drop + 1 layers one stays and is trained. `loss` is the share of the tokens of the second stage, at a
    third of the rate; 0 leaves it out.

    Source: Chen et al. 2024 (LLM-Streamline, arXiv 2403.19135).
    """
    where = "near:side=before"
    local = Stage(terms=("block-local:side=before",), learn=(where,), share=1 - loss, settings=Settings(rate=rate))
    if not loss:
        return (local,)
    return (local, Stage(terms=("cross-entropy",), learn=(where,), share=loss, settings=Settings(rate=rate / 3)))
