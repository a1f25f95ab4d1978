"""The layers beside what was removed."""

from __future__ import annotations

from typing import Literal

from shoal.errors import UsageError
from shoal.healing.blocks import beside_gaps
from shoal.healing.moving import LearnJob, Moving, cloned, whole_runs


def near(job: LearnJob, *, width: int = 1, side: Literal["both", "before", "behind"] = "both") -> Moving:
    """All tensors of the `width` layers before and behind each removed span, or only on one `side` of it.

    They are clones in float32, which the plan names `heal-12` in the end; the base's own never move, so the whole model
    stays the teacher.

    Source: as the places beside a cut: Chen et al. 2024 (LLM-Streamline, arXiv 2403.19135).
    """
    if width < 1:
        raise UsageError(f"near: width={width} is no layer; write near:width=1", code="U502")
    return cloned(job, whole_runs(job, beside_gaps(job.plan, job.stack, width, side)), "near")
