"""A model that is used to fewer layers while it writes."""

from __future__ import annotations

from typing import Literal

from shoal.healing.stage import Recipe, Settings, Stage


def unified_tune(
    *, speedup: float = 2.0, layout: Literal["even", "released"] = "even", whole: float = 0.0, cosine: float = 0.0,
    learn: str = "lora:rank=16", rate: float = 5e-4,
) -> Recipe:  # fmt: skip
    """Prompts go through all layers and answers through L / `speedup` of them, as the policy `unified` decodes.

    The loss is cross-entropy of the answers + `whole` times that of the answers through all layers + `cosine` times
    1 - cos of the last states of both (the term `whole-path`, which costs a second forward). Of conversations and of
    prompts with responses the answer begins where the assistant first speaks, and what it said counts; of plain text it
    is all but the first token of a window. The result is a checkpoint of the whole depth, to be run with
    `--policy unified:speedup=...`.

    Source: Liu et al. 2024 (unified layer skipping, arXiv 2404.06954), whose released code has the two further losses.

    How we differ: LoRA learns where all tensors do there; `learn` all does the same. Without weights of theirs that are
    known, the two further losses are left out unless asked for.
    """
    further = (("labels", whole), ("cosine", cosine))
    terms = ("cross-entropy", *(f"whole-path:by={by},weight={weight}" for by, weight in further if weight))
    policy = f"unified:speedup={speedup},layout={layout}"
    return (Stage(terms=terms, learn=(learn,), policy=policy, settings=Settings(rate=rate)),)
