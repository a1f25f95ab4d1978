"""Layers that take over another layer's attention map, each head put where the map stands that suits it best."""

from __future__ import annotations

import re

from shoal.errors import UsageError
from shoal.examples import TransformExamples
from shoal.fitting.match_heads import best_places, map_distances, put_in_places
from shoal.fitting.result import Job, Transformed
from shoal.fitting.sharing import Group, can_share, listed_groups, sole_runs, with_tensors
from shoal.models.head_channels import projections_of
from shoal.models.opened import open_model
from shoal.models.projections import HeadMatrices
from shoal.plan import Plan, StackSpec, require, shapes_of
from shoal.plan.edit import share_map
from shoal.plan.steps import runs
from shoal.plan.tensors import tensors_of

NEEDS_PLAN = False
EXAMPLES = TransformExamples(
    quick={"span": "2-3"},
    refused=(
        ((), {}, "U667"),
        ((), {"span": "2-3", "pairs": "1-2"}, "U667"),
        ((), {"span": "0-1"}, "U667"),
        ((), {"span": "3-2"}, "U667"),
        ((), {"span": "late"}, "U667"),
        ((), {"pairs": "2-1"}, "P164"),
        ((2,), {"span": "2-3"}, "U667"),
    ),
)


def share_maps(job: Job, *, span: str = "", pairs: str = "", matched: bool = True) -> Transformed:
    """Let layers weigh their own values with the attention map of an earlier layer instead of making one.

    `span`: these layers follow the one before them, as 26-29 follow 25. `pairs` lists them instead: `9-10+11-12-13`,
    the layer that is followed first. Exactly one of the two; `span=none` shares nothing, bit for bit.

    `matched`: nothing pairs the heads of two layers, so each head of a follower is moved to the place of the map that
    suits it best on the text: the permutation of heads with the least sum of |O_j (A_j - P_p) V_j|^2, A_j and P_p
    [queries, keys] the maps of the follower and of the layer it follows, V_j [keys, dim] and O_j [hidden, dim] the
    follower's values and output matrix. So a difference at an attention sink, whose value is nearly zero, counts for
    little. It is folded into the follower's matrices
    of values and output, which is exact; of heads that attend with the same values (grouped-query attention) only
    permutations that keep these together are, and the best of those is taken.

    Source: the span of Shared Attention (Liao and Vargas 2024, arXiv 2407.12866).

    How we differ: the paper copies the maps head by head; `matched=false` does. Maps are compared in the whole base
    model, whatever the plan leaves out of it. Queries and keys of a follower are still made.

    Raises U667 for layers that cannot follow, U668 for an attention whose values and output the matching does not know,
    P107 to P109, P128 and P164 as any plan that shares a map, P141 and U537 for a model without maps.
    """
    opened = open_model(job.model)
    spec, name = opened.spec, opened.stack(job.stack).name
    stack = spec.stack(name)
    if bool(span) == bool(pairs):
        raise UsageError("share-maps needs either span=26-29 or pairs=9-10+11-12; give one of them", code="U667")
    if span == "none":
        return Transformed(job.plan, job.weights)
    groups = listed_groups(pairs, "share-maps") if pairs else (_span(span, job.plan, stack),)
    own = sole_runs(job.plan, groups, stack, "share-maps")
    plan = job.plan
    for one in groups:
        for layer in one[1:]:
            plan = share_map(plan, layer, one[0], stack=name)
    require(plan, spec, shapes_of(job.weights))
    if not matched:
        return Transformed(plan, job.weights)
    followers = [layer for one in groups for layer in one[1:]]
    known = {}
    for layer, side in projections_of(opened, followers, name).items():
        if isinstance(side, str):
            raise UsageError(
                f"share-maps cannot move the heads of layer {layer}: {side}; take matched=false", code="U668"
            )
        known[layer] = side
    tensors = {layer: tensors_of(own[layer].weights or "", job.weights) for layer in followers}
    matrices = {layer: HeadMatrices(opened.stack(name).layer(layer), known[layer], tensors[layer]) for layer in known}
    new, notes = {}, []
    for layer, losses in map_distances(job, groups, matrices, "share-maps").items():
        places = best_places(losses, known[layer].group)
        moved = sum(place != head for head, place in enumerate(places))
        lost = [sum(losses[head, at] for head, at in enumerate(order)) for order in (range(len(places)), places)]
        notes.append(
            f"{layer}: {moved} of {len(places)} heads moved, {lost[1]:.1%} of what they add is lost, "
            f"{lost[0]:.1%} without that"
        )
        if moved:
            new[layer] = tensors[layer] | put_in_places(matrices[layer], places)
    return with_tensors(job, plan, new, "share-maps", *notes)


def _span(text: str, plan: Plan, stack: StackSpec) -> Group:
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    order = [run.layer for run in runs(plan.steps(stack.name)) if can_share(run, stack)]
    if found is None:
        raise UsageError(f"share-maps: span={text} is no span; write span=26-29", code="U667")
    first, last = int(found[1]), int(found[2] or found[1])
    inside = [layer for layer in order if first <= layer <= last]
    before = [layer for layer in order if layer < first]
    if not before or not inside or last not in inside or first not in inside:
        raise UsageError(
            f"share-maps: span={text} must go upwards over layers with attention, behind one that makes the map, and "
            f"in {plan} it does not; name others",
            code="U667",
        )
    return (before[-1], *inside)
