"""Every gate has a rate at which it is to be open."""

from __future__ import annotations

from shoal.healing.stage import Recipe, Settings, Stage, routed


def conv_aig(
    *, target: float = 0.8, layers: str = "", strength: float = 30.0, initial_bias: float = 4.0, rate: float = 3e-3
) -> Recipe:
    """A gate for each sequence at each layer, drawn by the Gumbel trick, each with a rate at which it is to be open.

    The loss is cross-entropy + `strength` times the mean over gates of (m - `target`)^2, m the share of a gate's
    sequences that run its layer. `layers` (3-28) have gates; without them all but the first.

    Source: Veit and Belongie 2017 (ConvNet-AIG, arXiv 1711.11503): its gates and target rates, on Transformer layers.
    """
    terms = ("cross-entropy", f"density:target={target},each=true,weight={strength}")
    policy = routed(f"grain=row,relax=gumbel,net=mlp,initial_bias={initial_bias:g}", layers)
    return (Stage(terms=terms, learn=("gates",), policy=policy, settings=Settings(rate=rate)),)
