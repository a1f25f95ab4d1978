"""Orders of layers that each sequence chooses."""

from __future__ import annotations

from shoal.healing.stage import Recipe, Settings, Stage


def iot(
    *, orders: str = "", explore: float = 0.1, exploit: float = 0.01, temperature: float = 20.0,
    final_temperature: float = 2.0, learn: str = "lora:rank=16,rate=5e-4", rate: float = 1e-2,
) -> Recipe:  # fmt: skip
    """The predictor of the policy `ordered` learns together with the layers, which learn to run in each of its orders.

    The loss of a sequence is sum_k lambda_k L_k + `explore` KL(u || mean p) - `exploit` KL(u || p): its cross-entropy
    in each order, by the Gumbel softmax of what the predictor says while its temperature falls (`order-mixture`), all
    orders taken alike, and each choice clear (`choice-use`). `orders` as the policy takes them. A step costs a forward
    for each order.

    Source: Zhu et al. 2021 (IOT, arXiv 2103.03457).

    How we differ: LoRA learns where the whole model is trained from the start there; `learn` all does the same.
    """
    mixture = f"order-mixture:temperature={temperature},final_temperature={final_temperature}"
    terms = [mixture] + [f"choice-use:by={by},weight={weight}" for by, weight in
                         (("exploration", explore), ("exploitation", exploit)) if weight]  # fmt: skip
    policy = f"ordered:relax=mixture{f',orders={orders}' if orders else ''}"
    return (Stage(terms=tuple(terms), learn=("gates", learn), policy=policy, settings=Settings(rate=rate)),)
