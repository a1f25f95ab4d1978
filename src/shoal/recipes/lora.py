"""Low-rank additions on the labels of a text."""

from __future__ import annotations

from shoal.healing.stage import Recipe, Settings, Stage


def lora(*, rank: int = 16, rate: float = 5e-4) -> Recipe:
    """Cross-entropy of the next token, LoRA on all matrices of the plan's layers.

    The quickest way to a low loss on the text that is trained on. Of other texts it brings back little: SmolLM2 without
    six layers went from a perplexity of 91 to 45 on the text of its training and from 99 to 81 on another (40,000
    tokens); at twice the rate to 42 and 89.

    Source: the healing of Gromov et al. 2024 (arXiv 2403.17887) and of Kim et al. 2024 (Shortened LLaMA, arXiv
    2402.02834).
    """
    return (Stage(terms=("cross-entropy",), learn=(f"lora:rank={rank}",), settings=Settings(rate=rate)),)
