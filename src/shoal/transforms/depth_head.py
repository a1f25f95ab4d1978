"""A head that reads several depths, put at the end of the plan: sums of states, weights of scores, or a contrast."""

from __future__ import annotations

from typing import Literal

import torch

from shoal.errors import NotationError, UsageError
from shoal.examples import TransformExamples
from shoal.fitting.result import Job, Transformed
from shoal.models.opened import open_model
from shoal.plan import Exit, Step, parse_steps
from shoal.plan.heads import KEEPS, LOGITS, PLAUSIBLE, READS
from shoal.plan.select import run_of
from shoal.plan.steps import ends_in

NEEDS_PLAN = False
EXAMPLES = TransformExamples(
    refused=(
        ((), {"layers": "9"}, "U690"),
        ((), {"layers": "0x"}, "U690"),
        ((), {"how": "contrast", "layers": "0,1"}, "U690"),
        ((), {"how": "contrast", "plausible": 2.0}, "U690"),
        ((2,), {"layers": "2"}, "U690"),
    )
)
NAME = "depths"
"""Of the head and of the exit that it is at."""


def depth_head(
    job: Job,
    *,
    layers: str = "",
    how: Literal["scores", "states", "contrast"] = "scores",
    plausible: float = 0.1,
) -> Transformed:
    """Let the plan end with a head that also reads the states h_N [tokens, hidden] behind earlier layers N.

    `scores`: sum_N w_N log softmax(head(norm(h_N))) with w_N [vocabulary] for each of `layers` (as 0,8,16; without
    them the even ones of the lower half) and for the last layer that runs: 0 for those and 1 for this, so that the
    tokens are those of the plan before anything has learned. `states`: norm and head read k x + sum_N a_N h_N with k
    [1] 1 and a_N [1] 0: the plan's logits, bit for bit. Both learn with `heal --learn plan`. `contrast`: the last
    layer's log-probabilities minus those of one of `layers` (without one the middle layer), of the tokens that the last
    layer finds at least `plausible` (above 0, up to 1) times as likely as its likeliest; nothing has to learn. Nothing
    is saved: each depth of `scores` and of `contrast` is one more product with the head. Raises U690 for layers that
    the plan does not run before its last one and for a plan that has a head of its own.

    Source: Merge Decoding, NLPCC 2024 (scores); GTrans, Yang et al. 2022 (states; arXiv 2207.14467); DoLa, Chuang et
    al. 2023 (contrast; arXiv 2309.03883, equations 3 and 4).

    How we differ: the released code of Merge Decoding gives the head states without the final norm, and its weights
    start random. GTrans sums normalised states in groups, for the attention to the encoder too, with weights of a
    softmax; here any numbers may be learned, and the sum is of states as they are. DoLa chooses the earlier layer anew
    for each token, by the largest Jensen-Shannon divergence; here it is one layer, as its static variant.
    """
    steps = job.plan.steps(job.stack)
    ran = [layer for step in steps for layer in sorted(ends_in(step))]
    last = run_of(steps[-1])
    if last is None:
        raise _refused(f"the plan {job.plan} does not end with a layer")
    below = sorted(set(ran[:-1]) - {last.layer})
    chosen = _layers(layers) if layers else _usual(below, how)
    if not chosen or not set(chosen) <= set(below):
        raise _refused(f"the layers {layers or 'below the last one'} do not all run before the last one")
    if how == "contrast" and (len(chosen) > 1 or not 0 < plausible <= 1):
        raise _refused("a contrast is with one layer, and plausible is above 0 and at most 1")
    spec = open_model(job.model).spec
    new: dict[str, torch.Tensor] = {}
    if how == "states":
        new = {KEEPS: torch.ones(1)} | {f"{READS}.{layer}": torch.zeros(1) for layer in chosen}
    else:
        share = -1.0 if how == "contrast" else 0.0
        new = {f"{LOGITS}.{layer}": torch.full((spec.vocab,), share) for layer in chosen}
        new[f"{LOGITS}.{last.layer}"] = torch.ones(spec.vocab)
    if how == "contrast":
        new[PLAUSIBLE] = torch.tensor([plausible])
    weights = dict(job.weights) | {f"{NAME}.{name}": tensor for name, tensor in new.items()}
    ended: tuple[Step, ...] = (*steps, Exit(NAME, NAME))
    return Transformed(job.plan.with_steps(ended, job.stack), weights)


def _layers(text: str) -> list[int]:
    """The layers that `text` names, as depth notation does."""
    try:
        runs = [run_of(step) for step in parse_steps(text)]
    except NotationError:
        runs = [None]
    if None in runs:
        raise _refused(f"{text!r:.40} names no layers")
    return sorted({run.layer for run in runs if run is not None})


def _usual(below: list[int], how: str) -> list[int]:
    """The middle one of the layers for a contrast; else the even ones of their lower half."""
    half = len(below) // 2
    return below[half : half + 1] if how == "contrast" else [layer for layer in below[: half + 1] if layer % 2 == 0]


def _refused(why: str) -> UsageError:
    return UsageError(f"depth-head: {why}; name layers that run, as in layers=0,8,16", code="U690")
