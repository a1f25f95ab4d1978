"""RYS, repeat yourself: one span of layers runs twice, and every span is tried."""

from __future__ import annotations

from pathlib import Path

from shoal.examples import MethodExamples
from shoal.methods._job import PruningJob
from shoal.scores import Found
from shoal.search.span_scan import span_scan

SEARCHES = True
REMOVES = False
EXAMPLES = MethodExamples(chooses_by="place", budget=None, quick={"every": 2})


def rys(
    job: PruningJob,
    *,
    file: Path | None = None,
    items: int = 100,
    first: int = 0,
    last: int | None = None,
    shortest: int = 1,
    longest: int | None = None,
    every: int = 1,
) -> Found:
    """Let one span of layers i..j of the frozen model run twice, 0..j and then i..end, by what each does to the task.

    The model grows by j - i + 1 layers, copies that a stock checkpoint holds; nothing is removed, so it takes no
    --drop. `file`: a task (see `PruningJob.on_task`), its first `items`; without one the cross-entropy on the
    calibration data decides. `first`, `last`, `shortest`, `longest` and `every` say which spans are tried, all without
    them; what is left out is empty on the map that the page draws. Evaluated spans are kept in the journal.

    Source: dnhkng 2026 (RYS, "LLM Neuroanatomy", dnhkng.github.io/posts/rys; there is no paper on arXiv), which scored
    short answers to hard sums and questions about feelings.

    How we differ: the task is yours; the end of a span counts as part of it, where RYS's (i, j) leaves j out. The best
    span is taken also where the model as it was is better, which trace and map tell.
    """
    return span_scan(
        job.plan,
        objective=job.objective(job.data) if file is None else job.on_task("rys", file, items),
        legal=job.legal,
        first=first,
        last=last,
        shortest=shortest,
        longest=longest,
        every=every,
        stack=job.stack,
        progress=job.progress,
    )
