"""Gates that learn by gradients first, and then by reward."""

from __future__ import annotations

from shoal.healing.stage import Recipe, Settings, Stage, routed


def skip_net(
    *, cost: float = 20.0, layers: str = "", soft: float = 0.5, initial_bias: float = 4.0, rate: float = 3e-3
) -> Recipe:
    """A gate for each sequence at each layer: hard forward and soft backward first, then policy gradient.

    The loss of the first stage, a `soft` share of the tokens, is cross-entropy + `cost` d, d the mean share of the
    layers that sequences run; in the second choices are drawn, and their reward is -cross-entropy - `cost` k, k the
    share of open gates. `layers` (3-28) have gates; without them all but the first.

    Source: Wang et al. 2018 (SkipNet, arXiv 1711.09485): its hybrid training, on Transformer layers.

    How we differ: a gate reads the mean of the states in front of its layer; one net for all gates (an LSTM) is not
    there. The base stands still.
    """
    policy = routed(f"grain=row,initial_bias={initial_bias:g}", layers)
    settings = Settings(rate=rate)
    first = ("cross-entropy", f"density:by=linear,weight={cost}")
    return (
        Stage(terms=first, learn=("gates",), policy=policy, share=soft, settings=settings),
        Stage(terms=(f"reinforce:cost={cost}",), learn=(f"gates:rate={rate / 10:g}",),
              policy=f"{policy},relax=sample", share=1 - soft, settings=settings),
    )  # fmt: skip
