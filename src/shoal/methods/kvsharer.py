"""KVSharer: layers whose keys and values are least alike share those of the earlier one."""

from __future__ import annotations

import math
from dataclasses import replace

from shoal.errors import UsageError
from shoal.examples import MethodExamples
from shoal.fitting.collapse import StateSimilarity
from shoal.fitting.result import Transformed
from shoal.methods._job import PruningJob
from shoal.plan import Plan
from shoal.plan.edit import share_kv
from shoal.recording.kv_means import kv_distances, mean_kv
from shoal.scores import Candidate, Found

SEARCHES = True
EXAMPLES = MethodExamples(
    chooses_by="place", counts="steps", nested=False, budget="kv=0.8", writable=False, needed={"threshold": -1.0}
)


def kvsharer(job: PruningJob, *, drop: int, threshold: float = 0.5, sequences: int = 30, tokens: int = 64) -> Found:
    """Let `drop` layers attend to another layer's keys and values, trying pairs from the least alike on.

    A pair is kept when the final hidden state stays like the dense model's. Keys and values are averaged over the first
    `sequences` texts of the calibration data, each cut to `tokens`. Two layers are apart by the mean over heads and
    tokens of the Euclidean distance of their mean keys, averaged with that of their mean values. Of a pair the later
    layer reads the earlier one, and what that one reads itself; a layer that reads is not tried again. The pair stays
    when the cosine of the final states, mean over the texts, is above `threshold`.

    Source: Yang et al. 2024 (KVSharer, arXiv 2410.18517), which takes a threshold of 0.5 and 64 tokens of 30 texts.

    How we differ: the released code adds up keys and values of texts of different lengths, skips those that do not fit
    and divides by all; here each place is averaged over the texts that have it. Layers of different kinds are not
    paired. Raises U504 when fewer pairs stay above the threshold; such plans run live only.
    """
    if drop < 1:
        raise UsageError(f"kvsharer cannot share the keys and values of {drop} layers; give 1 or more", code="U504")
    ids, mask = job.data.ids[:sequences, :tokens], None if job.data.mask is None else job.data.mask[:sequences, :tokens]
    data = replace(job.data, ids=ids, mask=mask, answers=None)
    means = mean_kv(job.model, data.batches(job.batch), what="kvsharer", before=lambda _: None, stack=job.stack)
    apart = kv_distances(means)
    likeness = StateSimilarity(replace(job, data=data), sequences)
    reads: dict[int, int] = {}
    trace: list[Candidate] = []
    for later, earlier in sorted(apart, key=lambda pair: -apart[pair]):
        if len(reads) == drop:
            break
        if later in reads:
            continue
        tried = {**reads, later: earlier}
        plan = _plan(job, {layer: tried.get(source, source) for layer, source in tried.items()})
        found = likeness.of(Transformed(plan, job.weights)) if job.legal(plan) else -math.inf
        trace.append(Candidate(str(plan), 1 - found, f"{later} reads {earlier}, {apart[later, earlier]:.3g} apart"))
        if found > threshold:
            reads = {layer: tried.get(source, source) for layer, source in tried.items()}
        if job.progress is not None:
            job.progress(len(reads), drop, "layers that read")
    if len(reads) < drop:
        raise UsageError(
            f"kvsharer finds {len(reads)} layers whose keys and values can be replaced with a cosine above "
            f"{threshold:g}, and {drop} were asked for; share fewer, lower the threshold, or allow plans that only run "
            "live",
            code="U504",
        )
    return Found(_plan(job, reads), tuple(trace))


def _plan(job: PruningJob, reads: dict[int, int]) -> Plan:
    plan = job.plan
    for layer, source in reads.items():
        plan = share_kv(plan, layer, source, stack=job.stack)
    return plan
