"""A router sends each token from layer to layer."""

from __future__ import annotations

from shoal.healing.stage import Recipe, Settings, Stage


def radial(
    *, layers: str = "", steps: int = 0, reach: int | None = None, cost: float = 0.1, rate: float = 1e-2,
    learn: str = "",
) -> Recipe:  # fmt: skip
    """One router picks at each step the layer that a token runs next, or its end, distilled from the whole model.

    The loss is KL to the whole model + `cost` d, d the share of the program that tokens run. `layers` are those that it
    picks from (without them all but the first), `steps` the most that a token runs (0: as many as these), `reach` how
    far from the layer that stood there. `learn` names what moves beside the router, as lora:rank=16,rate=5e-4.

    Source: Dotzel et al. 2024 (Radial Networks, arXiv 2404.04900): its post-training distillation.

    How we differ: as in `assembled`: a row of keys and values for each layer of each step and not one cache for all
    layers; a linear router. How its cost is held down is not said; a price on the depth does it here.
    """
    words = {"part": "layer", "ends": "true", "router": "shared", "relax": "gumbel", "layers": layers,
             "steps": steps or None, "reach": reach}  # fmt: skip
    policy = "assembled:" + ",".join(f"{name}={value}" for name, value in words.items() if value not in ("", None))
    terms = ("logit-kd", *([f"density:by=linear,weight={cost}"] if cost else []))
    moving = ("gates", learn) if learn else ("gates",)
    return (Stage(terms=terms, learn=moving, policy=policy, settings=Settings(rate=rate)),)
