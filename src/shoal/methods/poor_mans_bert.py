"""Poor Man's BERT: the five strategies under the paper's names."""

from __future__ import annotations

from typing import Literal, cast

from shoal.examples import MethodExamples
from shoal.measures.block_influence import block_influence
from shoal.methods._job import PruningJob
from shoal.scores import Found
from shoal.search.one_shot import one_shot
from shoal.search.position import Preset, position

_PRESETS: dict[str, Preset] = {"top": "last", "bottom": "first", "symmetric": "middle"}

EXAMPLES = MethodExamples(chooses_by="place", without_data="0-1")


def poor_mans_bert(
    job: PruningJob,
    *,
    drop: int,
    strategy: Literal[
        "top", "alternate", "symmetric", "bottom", "contribution", "odd-alternate", "even-alternate"
    ] = "top",
    tokens: Literal["first", "last", "all"] = "first",
) -> Found:
    """Remove the top, every other, the middle or the bottom layers, or those that turn the hidden state least.

    Of every other layer, counted from 1 and from the top, odd-alternate takes the odd ones (of 12 layers and 4 to go
    11, 9, 7, 5) and even-alternate the even ones (12, 10, 8, 6); alternate begins below the top, which is odd-alternate
    for an even number of layers. contribution: the highest cos(x_l, x_l+1) at the first token, whose state is the
    sentence's in an encoder. In a decoder the first token sees itself alone: tokens=last judges the one that has seen
    the sentence, tokens=all the mean over all of them.

    Source: Sajjad et al. 2020 (Poor Man's BERT, arXiv 2004.03844).

    How we differ: contribution removes a number of layers, not those above a threshold; no task is learnt afterwards.
    """
    if strategy == "contribution":
        scores = block_influence(
            job.model, job.data, tokens=tokens, stack=job.stack, batch=job.batch, progress=job.progress
        )
        return one_shot(job.plan, scores=scores, drop=drop, legal=job.legal, stack=job.stack)
    which = _PRESETS.get(strategy, strategy)
    return position(job.plan, drop=drop, legal=job.legal, which=cast(Preset, which), stack=job.stack)
