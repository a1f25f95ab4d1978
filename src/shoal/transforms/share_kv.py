"""Layers that read another layer's keys and values, with the matrices around them fitted to it."""

from __future__ import annotations

from typing import Literal

from shoal.errors import UsageError
from shoal.examples import TransformExamples
from shoal.fitting.aligned_kv import Aligner, shared_plan
from shoal.fitting.average import averaged, fewer_heads
from shoal.fitting.result import Job, Transformed
from shoal.fitting.sharing import Pattern, listed_groups, patterned_groups, sole_runs, with_tensors
from shoal.models.opened import open_model
from shoal.plan import require, shapes_of
from shoal.plan.tensors import tensors_of_run

NEEDS_PLAN = False
EXAMPLES = TransformExamples(
    refused=(
        ((), {"pairs": "1"}, "U667"),
        ((), {"pairs": "0-1+1-2"}, "U667"),
        ((), {"pairs": "1-0"}, "U681"),
        ((), {"pairs": "1-7"}, "U667"),
        ((2,), {"pairs": "1-2"}, "U667"),
        ((), {"pattern": "last"}, "U667"),
        ((), {"pattern": "last", "readers": 4}, "U667"),
        ((), {"pattern": "later", "readers": 2}, "U681"),
        ((), {"pattern": "groups", "group": 0}, "U667"),
        ((), {"ridge": -1.0}, "U669"),
        ((), {"heads": 1}, "U667"),
        ((), {"heads": 3, "how": "average"}, "U667"),
    )
)


def share_kv(
    job: Job,
    *,
    pattern: Pattern = "pairs",
    pairs: str = "",
    group: int = 2,
    readers: int | None = None,
    how: Literal["aligned", "average", "first"] = "aligned",
    heads: int | None = None,
    weighted: bool = True,
    ridge: float = 1e-3,
) -> Transformed:
    """Let layers attend to an earlier layer's keys and values, and store none, with matrices fitted to that.

    `pattern`: which. pairs: every second layer reads the one before it (cross-layer attention); groups: the first of
    every `group` layers is read by the others; last: the last `readers` layers read the last one before them (YOCO,
    Gemma 3n); later: the `readers` layers before the last one read the last one, of the tokens before (LCKV), which
    `how` average or first makes. `pairs` lists them instead: `4-5+9-10-11`, the layer that is read first. Layers of
    different kinds are grouped among themselves. No layer in a group: nothing changes, bit for bit.

    `how`: aligned, in closed form. x_r ~ T x_s: what a reader is given, predicted from what its source is given,
    [hidden], with a `ridge` towards the best diagonal map, relative to each channel's mean square. Values: for each
    head the best common subspace [dim] of V_s x_s and V_r T x_s; each layer's way back is multiplied into its output
    matrix. Keys: for each two channels that a rotation turns together the best common complex number, which commutes
    with the rotation; each layer's factor goes into its queries. `weighted`: errors count as the output matrix and the
    energy of the queries weigh them. All of it is matrices of the same shapes. average: the source makes the mean of
    the group's keys and values; first: it keeps its own (neither reads the text). `heads`: with average and first, of
    how many heads the source makes keys and values; each is the mean of as many neighbours as it stands for.

    Source: our own; nobody else is known to us who published the closed form. average: Zuhri et al. 2024 (MLKV, arXiv
    2406.09297); the plan: Brandon et al. 2024 (CLA, arXiv 2405.12981), Wu and Tu 2024 (LCKV, arXiv 2405.10637).

    How we differ: MLKV's released code averages one layer after the other, so that of four the first two count an
    eighth each; here each counts the same. Where every reader loses more than it keeps, as in pairs of the first
    layers, this is worse than dropping the attention: the notes say what each layer loses.

    Raises U667 for layers that cannot be grouped and for `heads` that do not divide the layer's or go with aligned,
    U668 for an attention whose matrices the closed form does not know (a norm on keys, latent keys and values, layers
    of different rotations) or that runs with all its heads alone, U669 for a negative `ridge`, U681 for a layer that
    would be fitted to one that runs later, P107 to P109 as any plan that shares.
    """
    if not ridge >= 0:
        raise UsageError(f"share-kv takes a ridge of 0 or more, not {ridge:g}", code="U669")
    opened = open_model(job.model)
    spec, name = opened.spec, opened.stack(job.stack).name
    stack = spec.stack(name)
    if pairs:
        groups = listed_groups(pairs, "share-kv")
    else:
        groups = patterned_groups(job.plan, stack, pattern, group=group, readers=readers, what="share-kv")
    if not groups:
        return Transformed(job.plan, job.weights)
    if how == "aligned" and heads is not None:
        raise UsageError(
            f"share-kv: heads={heads} goes with how=average and how=first; aligned keeps all heads", code="U667"
        )
    if how == "aligned":
        return Aligner(job, groups, "share-kv").convert(groups, weighted=weighted, ridge=ridge)
    own = sole_runs(job.plan, groups, stack, "share-kv")
    plan = shared_plan(job.plan, groups, name)
    require(plan, spec, shapes_of(job.weights))
    if how == "first" and heads is None:
        return Transformed(plan, job.weights)
    tensors = {layer: tensors_of_run(run, job.weights) for layer, run in own.items()}
    new = {one[0]: averaged(opened, one if how == "average" else one[:1], tensors, name) for one in groups}
    if heads is not None:
        new = {layer: fewer_heads(opened, layer, own, heads, name) for layer, own in new.items()}
    return with_tensors(job, plan, new, "share-kv")
