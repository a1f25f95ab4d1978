"""Routers that say for each token which layers it runs."""

from __future__ import annotations

from typing import Literal

from shoal.healing.stage import Recipe, Settings, Stage, routed


def skip_layer(
    *,
    target: float = 0.8,
    layers: str = "",
    relax: Literal["gumbel", "straight-through"] = "gumbel",
    net: Literal["linear", "mlp"] = "linear",
    strength: float = 100.0,
    gates: float = 0.5,
    rate: float = 1e-2,
    recover: str = "lora:rank=16,rate=5e-4",
) -> Recipe:
    """A gate for each token at each layer, its keys and values kept; first gates learn, then `recover` beside them.

    The loss is KL to the whole model + `strength` (d - `target`)^2, d the mean share of the layers that tokens run. A
    gate is drawn by the Gumbel trick with a straight-through gradient; a token that skips a layer still gives it keys
    and values. `layers` have gates (3-28; default all but the first); `gates` is the share of the tokens of the first
    stage, in which nothing else moves; `rate` is that of the gates.

    Source: Zeng et al. 2023 (SkipLayer, arXiv 2311.15436).

    How we differ: it trains model and routers from random numbers on labels; here a model that can be used already is
    its own teacher, and stands still while the gates learn.
    """
    policy = routed(f"relax={relax},net={net}", layers)
    terms = ("logit-kd", f"density:target={target},weight={strength}")
    settings = Settings(rate=rate)
    first = Stage(terms=terms, learn=("gates",), policy=policy, share=gates, settings=settings)
    learn = (f"gates:rate={rate / 10:g}", recover)
    return (first, Stage(terms=terms, learn=learn, policy=policy, share=1 - gates, settings=settings))
