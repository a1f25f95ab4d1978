"""Gates that say for each sequence in how many bits each layer runs."""

from __future__ import annotations

from typing import Literal

from shoal.healing.stage import Recipe, Settings, Stage, policy_text


def fractional(
    *,
    target: float = 0.6,
    layers: str = "",
    bits: str = "0+4+8+16",
    full: int = 16,
    grain: Literal["row", "token", "none"] = "row",
    relax: Literal["straight-through", "gumbel"] = "gumbel",
    strength: float = 1.0,
    gates: float = 0.5,
    rate: float = 1e-2,
    recover: str = "lora:rank=16,rate=5e-4",
) -> Recipe:
    """Skip, few bits, or all bits for each sequence at each layer; first gates learn, then `recover` beside them.

    The loss is cross-entropy + `strength` |d - `target`|, d the mean share of the bits of all layers that tokens use: a
    layer in b bits is b / `full`. The policy is `fractional` with these `layers`, `bits`, `grain` and `relax`. `gates`
    is the share of the tokens of the first stage, in which nothing else moves.

    Source: Shen et al. 2020 (Fractional Skipping, AAAI, arXiv 2001.00705): a target for the computation, whose price
    changes its sign there.

    How we differ: a language model whose weights stand still but for `recover`, where theirs is trained at all bits
    first; a linear gate for each layer and not one LSTM; Gumbel noise.
    """
    policy = policy_text("fractional", f"bits={bits},full={full},grain={grain},relax={relax}", layers)
    terms = ("cross-entropy", f"density:target={target},by=abs,weight={strength}")
    settings = Settings(rate=rate)
    first = Stage(terms=terms, learn=("gates",), policy=policy, share=gates, settings=settings)
    learn = (f"gates:rate={rate / 10:g}", recover)
    return (first, Stage(terms=terms, learn=learn, policy=policy, share=1 - gates, settings=settings))
