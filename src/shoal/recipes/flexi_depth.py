"""Routers with an adapter for what they skip."""

from __future__ import annotations

from shoal.healing.stage import Recipe, Settings, Stage, routed


def flexi_depth(*, strength: float = 3.0, layers: str = "", adapter: int = 64, rate: float = 1e-3) -> Recipe:
    """A gate for each token at each layer, and an adapter for the tokens that it does not let in; the model stands.

    The loss is KL to the whole model + `strength` x the mean over tokens of d^2, d the share of the layers that a token
    runs. A token that skips a layer gives it keys and values and goes through an adapter of the inner width `adapter`;
    what a layer gives is weighted with the gate, and the adapter with the rest. `layers` (16-31) have gates, in the
    paper the upper half; without them all but the first.

    Source: Luo et al. 2025 (FlexiDepth, arXiv 2503.23798).

    How we differ: the teacher is the whole model, where labels teach there; its adapter is a narrow copy of the mlp
    behind the layer's norm, here two matrices behind a scaling to a root mean square of 1, and it begins at zero.
    """
    policy = routed(f"scale=true,net=mlp,adapter={adapter}", layers)
    terms = ("logit-kd", f"density:by=tokens,weight={strength}")
    return (Stage(terms=terms, learn=("gates",), policy=policy, settings=Settings(rate=rate)),)
