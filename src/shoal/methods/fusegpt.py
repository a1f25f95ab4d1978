"""FuseGPT: removed layers are distilled into their neighbours."""

from __future__ import annotations

from shoal.examples import MethodExamples
from shoal.measures.macro_influence import macro_influence
from shoal.methods._job import PruningJob
from shoal.scores import Found
from shoal.search.one_shot import one_shot
from shoal.transforms.fuse_group import fuse_group

EXAMPLES = MethodExamples(budget="params=0.9")  # two layers side by side have no neighbour left to fuse with


def fusegpt(job: PruningJob, *, drop: int, rank: int = 8, epochs: int = 4) -> Found:
    """Remove the layers of lowest macro influence and distil each into the layers beside it.

    Source: Pei et al. 2024 (FuseGPT, arXiv 2411.14507).

    How we differ: influence is measured once; see the transform `fuse-group`.
    """
    scores = macro_influence(job.model, job.data, stack=job.stack, batch=job.batch, progress=job.progress)
    found = one_shot(job.plan, scores=scores, drop=drop, legal=job.legal, stack=job.stack)
    return job.then(fuse_group, found, rank=rank, epochs=epochs)
