"""Attentions with fewer heads of keys and values: alike ones of a layer are fused."""

from __future__ import annotations

from typing import Literal

from shoal.errors import UsageError
from shoal.examples import TransformExamples
from shoal.fitting.head_groups import LayerHeads, neighbouring
from shoal.fitting.kv_moments import moments_of
from shoal.fitting.mlps import listed_layers
from shoal.fitting.result import Job, Transformed
from shoal.fitting.sharing import can_share, sole_runs, with_tensors
from shoal.models.head_channels import projections_of
from shoal.models.opened import OpenedModel, open_model
from shoal.models.projections import HeadMatrices, Projection, Projections, ScoreSide
from shoal.plan import StackSpec
from shoal.plan.steps import runs
from shoal.plan.tensors import tensors_of_run

NEEDS_PLAN = False
EXAMPLES = TransformExamples(
    quick={"heads": 1},
    refused=(
        ((), {"heads": 0}, "U689"),
        ((), {"heads": 4}, "U689"),
        ((), {"heads": 1, "layers": "late"}, "U686"),
        ((), {"heads": 1, "layers": "9"}, "U667"),
        ((2,), {"heads": 1, "layers": "2"}, "U667"),
    ),
)


def fuse_heads(
    job: Job,
    *,
    heads: int = 1,
    layers: str = "",
    how: Literal["aligned", "average"] = "aligned",
    groups: Literal["alike", "neighbours"] = "alike",
) -> Transformed:
    """Let each layer make `heads` heads of keys and values, each fused of a group of its own.

    The heads of a layer are put into groups of one size: `neighbours`, or those that are `alike`, so that the pairs in
    a group lose little if they are fused; queries and the columns of the output matrix move along, which is exact. How
    much is lost: |R_q (k_h - k)|^2 and |R_o (v_h - v)|^2 over the text, R_q and R_o what queries and output matrix make
    of an error. A group has the key sum of w_h W_K,h and the value sum of w_h W_V,h, [dim, hidden]. `average`: w_h = 1
    over the size of the group. `aligned`: for every two channels that positions turn together w_h is the complex number
    of the best common key, and for values the matrix [dim, dim] of their best common subspace; the ways back are
    multiplied into queries and output matrix. As many heads as there are change nothing, bit for bit. `layers`: 3-5+9
    names them; without it all whose number of heads `heads` divides.

    Source: Chen et al. 2024 (DHA, arXiv 2406.06567): linear fusion of the heads of a group, alike heads together; its
    starting point with equal shares is the conversion of Ainslie et al. 2023 (GQA, arXiv 2305.13245). `aligned` is our
    own.

    How we differ: DHA searches for each layer how many groups of keys and how many of values it has, and learns the
    shares in training while a loss pulls them together; here keys and values have the same groups, of one size, and the
    shares are closed forms. `shoal heal` trains what comes out.

    Raises U667 for layers that do not run once with keys and values that nobody else reads, U668 for an attention whose
    matrices are not known by heads (a norm on keys, fused or latent ones) or that runs with all its heads alone, U686
    for `layers` that cannot be read, U689 for a number that divides no layer's heads.
    """
    wanted = listed_layers(layers, "fuse-heads")
    opened = open_model(job.model)
    name = opened.stack(job.stack).name
    stack = opened.spec.stack(name)
    chosen = _chosen(job, stack, wanted, heads)
    own = sole_runs(job.plan, tuple((layer,) for layer in chosen), stack, "fuse-heads")
    _refuse_read(job, stack, chosen)
    chosen = [layer for layer in chosen if stack.layers[layer].kv.heads > heads]
    if not chosen:
        return Transformed(job.plan, job.weights)
    known = _known(opened, chosen, name, must=wanted is not None)
    modules = {layer: one.values.module for layer, one in known.items()}
    moments = moments_of(job, tuple((layer,) for layer in known), modules)
    new, notes = {}, []
    for number, (layer, one) in enumerate(known.items()):
        tensors = tensors_of_run(own[layer], job.weights)
        matrices = HeadMatrices(opened.stack(name).layer(layer), one, tensors)
        found = LayerHeads(matrices, moments.own[layer], aligned=how == "aligned")
        cut = found.groups(heads) if groups == "alike" else neighbouring(found.count, heads)
        lost = found.lost(cut)
        said = ", ".join("+".join(map(str, group)) for group in cut)
        notes.append(f"{layer}: {said}; {lost.keys:.1%} of what its keys do is lost, {lost.values:.1%} of its values")
        new[layer] = tensors | found.written(cut)
        job.tell(number + 1, len(known), "heads")
    return with_tensors(job, job.plan, new, "fuse-heads", *notes)


def _chosen(job: Job, stack: StackSpec, wanted: frozenset[int] | None, heads: int) -> list[int]:
    """The layers to change, in order. Raises U689."""
    there = [run.layer for run in runs(job.plan.steps(stack.name)) if can_share(run, stack)]
    asked = sorted(set(there) if wanted is None else wanted)
    unfit = [n for n in asked if n < stack.depth and (heads < 1 or stack.layers[n].kv.heads % heads)]
    if unfit and (wanted is not None or len(unfit) == len(asked)):
        raise UsageError(
            f"fuse-heads: heads={heads} does not divide the {stack.layers[unfit[0]].kv.heads} heads of keys and values "
            f"of layer {unfit[0]}; give a number that does",
            code="U689",
        )
    return [layer for layer in asked if layer not in unfit]


def _refuse_read(job: Job, stack: StackSpec, chosen: list[int]) -> None:
    """Raise U667 for a layer whose keys, values or attention map another run reads: its heads may change places."""
    for run in runs(job.plan.steps(stack.name)):
        for source in run.layer_sources:
            if source.layer in chosen:
                raise UsageError(
                    f"fuse-heads: layer {run.layer} reads layer {source.layer}, whose heads would change places under "
                    "it; fuse first, and share then",
                    code="U667",
                )


def _known(opened: OpenedModel, chosen: list[int], stack: str, *, must: bool) -> dict[int, Projections]:
    """The matrices by heads of those layers that can be changed. Raises U668 where there is none, or for the first that
    cannot, if all `must`."""
    found: dict[int, Projections] = {}
    refused: dict[int, str] = {}
    layers = opened.spec.stack(stack).layers
    for layer, one in projections_of(opened, chosen, stack).items():
        if isinstance(one, str):
            refused[layer] = one
        elif isinstance(one.scores, str):
            refused[layer] = one.scores
        elif not layers[layer].kv.any_heads or not all(_in_order(side) for side in _stored(one)):
            refused[layer] = "it runs with all its heads of keys and values alone"
        else:
            found[layer] = one
    if refused and (must or not found):
        layer, why = next(iter(refused.items()))
        raise UsageError(f"fuse-heads cannot rewrite the attention of layer {layer}: {why}; name others", code="U668")
    return found


def _stored(one: Projections) -> tuple[Projection, ...]:
    return (one.scores.keys, one.values) if isinstance(one.scores, ScoreSide) else (one.values,)


def _in_order(side: Projection) -> bool:
    """Whether the channels of each head stand behind those of the head before, so that fewer heads are the first."""
    dim = len(side.channels[0])
    return all(set(own) == set(range(at * dim, at * dim + dim)) for at, own in enumerate(side.channels))
