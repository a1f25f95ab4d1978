"""Gates that learn by reward alone."""

from __future__ import annotations

from shoal.healing.stage import Recipe, Settings, Stage, routed


def block_drop(*, cost: float = 1.0, layers: str = "", initial_bias: float = 4.0, rate: float = 3e-3) -> Recipe:
    """A gate for each sequence at each layer, by self-critical policy gradient: few layers, and right all the same.

    The reward of a sequence is a (1 - k^2) - (1 - a) `cost`, k the share of open gates and a the share of next tokens
    that are predicted right, less that of its likeliest choices. `layers` (3-28) have gates; without them all but the
    first.

    Source: Wu et al. 2018 (BlockDrop, arXiv 1711.08393): its reward, on Transformer layers.

    How we differ: one net sees the image and chooses all blocks at once there; here each gate reads the mean of the
    states in front of its layer. Gates of all layers learn from the first step, where the last ones begin there; no
    tuning of gates and model together follows.
    """
    terms = (f"reinforce:reward=right,cost={cost},baseline=greedy",)
    policy = routed(f"grain=row,relax=sample,initial_bias={initial_bias:g}", layers)
    return (Stage(terms=terms, learn=("gates",), policy=policy, settings=Settings(rate=rate)),)
