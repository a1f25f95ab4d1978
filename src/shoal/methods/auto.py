"""Shoal's own choice: several searches, stand-ins in the place of what went, and held-out text decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from shoal.data.split import hold_out
from shoal.errors import UsageError
from shoal.evaluation.perplexity import perplexity
from shoal.examples import MethodExamples
from shoal.live import running
from shoal.methods._job import PruningJob
from shoal.plan.price import CountedPrice
from shoal.scores import Budget, Candidate, Found, Objective
from shoal.search.greedy import greedy
from shoal.transforms.refit import refit

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.search._candidates import Grain

SEARCHES = True
EXAMPLES = MethodExamples(chooses_by="loss", exact=False, nested=False, writable=False, best_first=True)


def auto(job: PruningJob, *, drop: int | None = None) -> Found:
    """Remove greedily layers, or attentions and mlps apart, fit the mlps before the holes anew, and keep the best.

    Source: the parts are FinerCut's (arXiv 2405.18218) and SLEB's (arXiv 2402.09025) greedy removal, and the refit of
    ReplaceMe (arXiv 2505.02819) without its constraint.

    How we differ: held-out text chooses among them.

    Searches: by the cross-entropy over whole layers; over parts by its rise per saved share of the budget. Each result
    is tried as it is and after the transform `refit`; a quarter of the calibration sequences, seen by no search and no
    fit, decides (the trace tells how), and a refit that wins is made anew on all of them. `drop` counts layers.
    Training-free; where only plans that a stock class can express are allowed, parts stay. Raises D413 for a single
    sequence, and what the searches raise when none of them gets there.
    """
    rest, held = hold_out(job.data)
    mine = replace(job, data=rest, budget=job.budget or _layers(job, drop))
    found: list[tuple[Found, Found]] = []
    failed: UsageError | None = None
    for search in _searches(mine, mine.objective(rest)):
        try:
            plain = search()
        except UsageError as error:
            failed = error
            continue
        found += [(plain, plain), (plain, mine.then(refit, plain))]
    if not found and failed is not None:
        raise failed
    judged = sorted((_loss(job, one, held), n) for n, (_, one) in enumerate(found))
    names = {True: "refit", False: "as it is"}
    trace = tuple(Candidate(str(found[n][1].plan), loss, names[bool(found[n][1].weights)]) for loss, n in judged)
    plain, best = found[judged[0][1]]
    return replace(job.then(refit, plain) if best.weights else best, trace=trace)


def _layers(job: PruningJob, drop: int | None) -> Budget:
    """As many layer runs less as `drop` says."""
    if drop is None:
        raise UsageError(
            "auto needs a number of layers or a budget; write --drop 6 or --budget params=0.8", code="U540"
        )
    price = CountedPrice("layers", job.spec)
    return Budget("layers", 1 - drop / price.dense, price)


def _searches(job: PruningJob, objective: Objective) -> Iterator[Callable[[], Found]]:
    def by(grain: Grain, rank: Literal["loss", "saving"]) -> Callable[[], Found]:
        return lambda: greedy(
            job.plan,
            objective=objective,
            budget=job.budget,
            grain=grain,
            rank=rank,
            legal=job.legal,
            stack=job.stack,
            progress=job.progress,
        )

    yield from (by("layer", "loss"), by("sublayers", "saving"))


def _loss(job: PruningJob, found: Found, held: Data) -> float:
    """Nats per token on the sequences held back; infinite for a broken model."""
    with running(job.model, found.plan, found.weights):
        mean = perplexity(job.model, held, batch=job.batch).nll
    return math.inf if math.isnan(mean) else mean
