"""One model of many depths."""

from __future__ import annotations

from shoal.healing.stage import Recipe, Settings, Stage


def elastic(*, menu: str = "", learn: str = "lora:rank=16", rate: float = 5e-4) -> Recipe:
    """Distillation at several depths in turn (see the policy `sampled`), so that each plan of the menu is usable.

    The loss is KL to the whole model, of sequences that run at the largest, the smallest and drawn depths. What has
    learned keeps all layers; a plan of one depth is run on it: shoal generate elastic --plan 0,2,4,...

    Source: nested sub-networks of Cai et al. 2024 (Flextron, arXiv 2406.10260) and of Klein et al. 2024 (NAS for
    pruning, arXiv 2405.02267), in depth; the sandwich rule: Yu and Huang 2019 (arXiv 1903.05134).

    How we differ: the teacher is the model as it was, which stands still, and not the largest sub-network.
    """
    policy = f"sampled:menu={menu}" if menu else "sampled"
    return (Stage(terms=("logit-kd",), learn=(learn,), policy=policy, settings=Settings(rate=rate)),)
