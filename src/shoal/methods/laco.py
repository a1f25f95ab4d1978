"""LaCo: windows of layers collapse into their first one, from the top down, while the output stays what it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from shoal.errors import UsageError
from shoal.examples import MethodExamples
from shoal.fitting.collapse import Collapsed, StateSimilarity
from shoal.fitting.result import Job
from shoal.ledger import Ledger
from shoal.methods._job import PruningJob
from shoal.plan import drop as drop_layers
from shoal.scores import Candidate, Found, too_few

EXAMPLES = MethodExamples(chooses_by="place", nested=False, most=2)


def laco(
    job: PruningJob,
    *,
    drop: int,
    group: int = 4,
    interval: int = 2,
    low: int = 1,
    threshold: float | None = None,
    sequences: int = 4,
) -> Found:
    """Collapse windows of `group` layers into their first where the final hidden state turns little, from the top down.

    theta_l <- theta_l + sum_k (theta_(l+k) - theta_l) over the k = 1..group-1 layers behind it as they are by then, so
    that windows may overlap; norms and biases are l's own. A window is merged where s = mean over sequences of cos(h,
    h') reaches `threshold`, h and h' [length * hidden] the final states of the dense model and of the merged one; then
    the window goes down by `interval`, else by one, as far as layer `low`. `sequences` of the calibration text are
    compared. The last window takes in no more layers than are still to go. Without a threshold it is the highest that
    gets there: after each pass it falls to the best s refused, and by 0.01 at least.

    Source: Yang et al. 2024 (LaCo, arXiv 2402.11187).

    How we differ: the paper's formula, where the released notebooks put the window's last layer in its place (the
    transform `laco-notebook`); the threshold is found from the number of layers. Raises U504 when not enough windows
    may go, U558 for windows that cannot be.
    """
    if group < 2 or interval < 1 or low < 0 or sequences < 1:
        raise UsageError(
            f"laco cannot merge windows of {group} layers, {interval} apart, down to layer {low}, on {sequences} "
            "sequences; give 2, 1, 0 and 1 or more",
            code="U558",
        )
    merging = Job(job.model, job.data, job.plan, stack=job.stack, batch=job.batch)
    trace: list[Candidate] = []
    alike = _judge(job, StateSimilarity(merging, sequences), drop, trace)
    limit = math.inf if threshold is None else threshold
    while True:
        state, refused = _collapse(job, alike, drop, group, interval, low, limit)
        if len(state.gone) == drop:
            made = state.transformed(merging, "laco")
            return Found(made.plan, tuple(trace), weights=made.weights)
        if threshold is not None or refused == -math.inf:
            raise too_few(len(state.gone), drop)
        limit = min(refused, limit - 0.01)


def _collapse(
    job: PruningJob, alike: Callable[[Collapsed], float], drop: int, group: int, interval: int, low: int, limit: float
) -> tuple[Collapsed, float]:
    """One pass from the top down: what is left, and the best similarity that was refused, -inf for none."""
    state, refused = Collapsed(tuple(sorted(set(job.plan.layers(job.stack))))), -math.inf
    place = len(state.alive)
    while (count := min(group - 1, drop - len(state.gone))) > 0:
        place = min(place, len(state.alive) - count - 1)
        if place < low:
            break
        trial = state.merged(place, count)
        found = alike(trial)
        if found >= limit:
            state, place = trial, place - interval
        else:
            refused, place = max(refused, found), place - 1
    return state, refused


def _judge(
    job: PruningJob, likeness: StateSimilarity, drop: int, trace: list[Candidate]
) -> Callable[[Collapsed], float]:
    """The similarity of a state, computed once, -inf where its plan is not legal."""
    known: Ledger[float] = Ledger()

    def judged(state: Collapsed) -> float:
        plain = drop_layers(job.plan, state.gone, stack=job.stack)
        found = likeness.of_collapsed(state, "laco") if job.legal(plain) else -math.inf
        trace.append(Candidate(str(plain), 1 - found, f"{len(state.gone)} layers merged, 1 - cosine"))
        if job.progress is not None:
            job.progress(len(state.gone), drop, "layers merged")
        return found

    def alike(state: Collapsed) -> float:
        key = repr((state.alive, sorted((layer, sorted(own.items())) for layer, own in state.shares.items())))
        return known.once(key, partial(judged, state))

    return alike
