"""Layers taken apart, and put together again for each token."""

from __future__ import annotations

from shoal.healing.stage import Recipe, Settings, Stage


def mom(
    *, layers: str = "", steps: int = 0, reach: int | None = None, balance: float = 0.01, cost: float = 0.0,
    temperature: float = 1.0, learn: str = "lora:rank=16,rate=5e-4", rate: float = 1e-2,
) -> Recipe:  # fmt: skip
    """Routers over pools of attentions and mlps learn beside these modules, from step t -> module t on (`assembled`).

    The loss is cross-entropy + `balance` KL(u || mean p), all modules of a place taken alike (`choice-use`), + `cost`
    d, d the share of the program that tokens run (`density`). `layers` are the pool (without them all but the first),
    `steps` how often something is taken of it (0: as often as it has layers), `reach` how far from the step's own
    module. A step of training calls every module of every place.

    Source: Gong et al. 2024 (Mixture-of-Modules, arXiv 2407.06677).

    How we differ: as in `assembled`, one module of a place and not K; the modules are those of the model that is given,
    to which LoRA is added; what its paper does against modules that nobody takes could not be read.
    """
    words = {"relax": "gumbel", "temperature": temperature, "layers": layers, "steps": steps or None, "reach": reach}
    policy = "assembled:" + ",".join(f"{name}={value}" for name, value in words.items() if value not in ("", None))
    terms = ["cross-entropy", *([f"choice-use:weight={balance}"] if balance else []),
             *([f"density:by=linear,weight={cost}"] if cost else [])]  # fmt: skip
    return (Stage(terms=tuple(terms), learn=("gates", learn), policy=policy, settings=Settings(rate=rate)),)
