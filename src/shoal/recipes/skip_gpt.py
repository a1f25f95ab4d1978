"""A gate for each token at each attention and at each mlp."""

from __future__ import annotations

from shoal.healing.stage import Recipe, Settings, Stage


def skip_gpt(
    *, target: float = 0.75, strength: float = 8.0, gates: float = 0.5, temperature: float = 5.0,
    initial_bias: float = 4.0, rate: float = 1e-2, recover: str = "lora:rank=16,rate=2e-4",
) -> Recipe:  # fmt: skip
    """Attention and mlp of a layer have a gate each; first gates learn while the temperature falls, then LoRA.

    The loss of the first stage is KL to the whole model + `strength` |d - `target`|, d the mean share of the depth that
    tokens run; in the second gates stand still and what is left recovers by KL.

    Source: Zhao et al. 2025 (SkipGPT, arXiv 2506.04179).

    How we differ: the teacher is the whole model, where labels teach there.
    """
    policy = (
        f"routed:part=halves,relax=gumbel,temperature={temperature},final_temperature=0.5,initial_bias={initial_bias:g}"
    )
    settings = Settings(rate=rate)
    return (
        Stage(terms=("logit-kd", f"density:target={target},by=abs,weight={strength}"), learn=("gates",), policy=policy,
              share=gates, settings=settings),
        Stage(terms=("logit-kd",), learn=(recover,), policy="routed:part=halves", share=1 - gates, settings=settings),
    )  # fmt: skip
