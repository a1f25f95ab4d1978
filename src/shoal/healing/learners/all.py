"""Every layer of the plan."""

from __future__ import annotations

from typing import Literal

from shoal.healing.moving import LearnJob, Moving, cloned, whole_runs


def all(job: LearnJob, *, part: Literal["layer", "attention", "mlp", "norms"] = "layer") -> Moving:  # noqa: A001 - the file's name is the entry's
    """All tensors of all layers that the plan runs, or those of a `part` of them; norms: the vectors alone.

    Memory for what learns is four times its float32 size (clone, gradient and two moments). Embedding, final norm and
    head stand still.

    Source: uptraining, as Xia et al. 2023 (Sheared LLaMA, arXiv 2310.06694) do it after a cut.
    """
    facts = job.opened.facts(job.stack).layers

    def keep(layer: int, name: str) -> bool:
        if part == "layer":
            return True
        if part == "norms":
            return job.layer(layer).get_parameter(name).dim() == 1 and not name.endswith("bias")
        own = facts[layer].parts
        return own is not None and any(name.startswith(f"{root}.") for root in getattr(own, part))

    return cloned(job, whole_runs(job), "all", keep=keep)
