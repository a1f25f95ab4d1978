"""LLaMA Pro: copies that add nothing, to be trained alone."""

from __future__ import annotations

from shoal.examples import MethodExamples
from shoal.methods._job import PruningJob
from shoal.scores import Found

REMOVES = False
EXAMPLES = MethodExamples(chooses_by="place", budget=None)


def llama_pro(job: PruningJob, *, every: int = 4) -> Found:
    """Put behind each `every`-th layer a copy of it whose output matrices are zero: the logits stay as they were.

    The transform `grow` with style=llama-pro; takes no --drop.

    Source: Wu et al. 2024 (LLaMA Pro, arXiv 2401.02415), block expansion; 4 makes 40 layers of LLaMA 2's 32.

    How we differ: training the copies on new text, the others frozen, is a step of its own.
    """
    return job.grown(style="llama-pro", every=every)
