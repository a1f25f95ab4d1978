"""Gates that say for each sequence how many neurons of each mlp it uses."""

from __future__ import annotations

from typing import Literal

from shoal.healing.stage import Recipe, Settings, Stage, policy_text


def ebert(
    *,
    target: float = 0.8,
    layers: str = "",
    shares: str = "0+0.25+0.5+0.75+1",
    grain: Literal["row", "token", "none"] = "row",
    scale: bool = False,
    relax: Literal["straight-through", "gumbel"] = "straight-through",
    strength: float = 10.0,
    gates: float = 0.5,
    rate: float = 1e-2,
    recover: str = "lora:rank=16,rate=5e-4",
) -> Recipe:
    """A width for each sequence at each mlp; first the gates learn, then `recover` beside them.

    The loss is KL to the whole model + `strength` (d - `target`)^2, d the mean share of the depth that tokens use: an
    mlp with a share of its neurons is so much of half a layer. Attentions always run, so a `target` near 1/2 leaves
    hardly any mlp. The policy is `widths` with these `layers`, `shares`, `grain`, `scale` and `relax`; sort the neurons
    first (shoal fuse MODEL --with narrow:keep=1,by=output), since narrower mlps are made of the first ones. `gates` is
    the share of the tokens of the first stage, in which nothing else moves.

    Source: Liu et al. 2021 (EBERT, ACL Findings 2021, 425); with `scale` the rescaled outputs of LC-Net (Xia, thesis
    ark:/88435/dsp015q47rs12x).

    How we differ: a decoder, distilled from itself, where theirs is an encoder that is fine-tuned on labels; nested
    widths in place of masks, and no heads; the weight of the cost is ours.
    """
    policy = policy_text("widths", f"shares={shares},grain={grain},scale={str(scale).lower()},relax={relax}", layers)
    terms = ("logit-kd", f"density:target={target},weight={strength}")
    settings = Settings(rate=rate)
    first = Stage(terms=terms, learn=("gates",), policy=policy, share=gates, settings=settings)
    learn = (f"gates:rate={rate / 10:g}", recover)
    return (first, Stage(terms=terms, learn=learn, policy=policy, share=1 - gates, settings=settings))
