"""Routers that choose the layers of a whole sequence while its prompt is read."""

from __future__ import annotations

from shoal.healing.stage import Recipe, Settings, Stage, routed


def first(
    *, skip: float = 20.0, layers: str = "", gates: float = 0.5, initial_bias: float = 4.0, rate: float = 3e-3,
    recover: str = "lora:rank=16,rate=5e-4",
) -> Recipe:  # fmt: skip
    """A gate decides at each layer from the prompt whether the sequence runs it; first gates learn, then LoRA.

    The loss of the first stage, a `gates` share of the tokens, is cross-entropy + `skip` d, d the mean share of the
    layers that sequences run; that of the second is cross-entropy alone, and gates stand still. A layer is complete in
    the KV cache or never read.

    Source: Jain et al. 2024 (FiRST, arXiv 2410.12513).

    How we differ: in training the mean over the whole window decides, which is its own prompt there.
    """
    policy = routed(f"grain=row,relax=gumbel,initial_bias={initial_bias:g}", layers)
    terms = ("cross-entropy", f"density:by=linear,weight={skip}")
    settings = Settings(rate=rate)
    return (
        Stage(terms=terms, learn=("gates",), policy=policy, share=gates, settings=settings),
        Stage(terms=("cross-entropy",), learn=(recover,), policy=routed("grain=row", layers),
              share=1 - gates, settings=settings),
    )  # fmt: skip
