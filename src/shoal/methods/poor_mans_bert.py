"""Poor Man's BERT: the five strategies under the paper's names."""

from __future__ import annotations

from typing import Literal

from shoal.examples import MethodExamples
from shoal.measures.block_influence import block_influence
from shoal.methods._job import PruningJob
from shoal.scores import Found
from shoal.search.one_shot import one_shot
from shoal.search.position import Preset, position

_PRESETS: dict[str, Preset] = {"top": "last", "bottom": "first", "symmetric": "middle", "alternate": "alternate"}

EXAMPLES = MethodExamples(chooses_by="place", without_data="0-1")


def poor_mans_bert(
    job: PruningJob,
    *,
    drop: int,
    strategy: Literal["top", "alternate", "symmetric", "bottom", "contribution"] = "top",
) -> Found:
    """Remove the top, every other, the middle or the bottom layers, or those that turn the hidden state least.

    Source: Sajjad et al. 2020 (Poor Man's BERT, arXiv 2004.03844).

    How we differ: contribution is the cosine of all tokens' states and not of the sentence's first one, which a decoder
    does not have; no task is learnt afterwards.
    """
    if strategy == "contribution":
        scores = block_influence(job.model, job.data, stack=job.stack, batch=job.batch, progress=job.progress)
        return one_shot(job.plan, scores=scores, drop=drop, legal=job.legal, stack=job.stack)
    return position(job.plan, drop=drop, legal=job.legal, which=_PRESETS[strategy], stack=job.stack)
