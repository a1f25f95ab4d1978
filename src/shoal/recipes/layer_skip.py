"""A model whose early layers can answer."""

from __future__ import annotations

from shoal.healing.stage import Recipe, Settings, Stage


def layer_skip(
    *,
    most: float = 0.05,
    scale: float = 0.02,
    which: str = "rotate:8",
    learn: str = "lora:rank=16",
    rate: float = 2e-4,
) -> Recipe:
    """Layer dropout and a cross-entropy at every exit, so that a pass may end early: drafts of `--speculate exit`.

    The loss is `exit-loss` by layerskip with `scale`; layers are left out with a probability of up to `most`. `which`
    rotate:R reads each R-th exit, other ones in each step. The plan stays what it is, and its whole depth is there.

    Source: Elhoushi et al. 2024 (LayerSkip, arXiv 2404.16710).

    How we differ: LoRA learns where all tensors do there; `learn` all does the same. Rates of dropout and weights of
    exits are smaller than there (0.1 to 0.5, and 0.1 to 1), so that a few thousand tokens do not cost the end of a
    pretrained model.
    """
    return (
        Stage(
            terms=(f"exit-loss:scale={scale},which={which}",),
            learn=(learn,),
            policy=f"dropped:most={most}",
            settings=Settings(rate=rate),
        ),
    )
