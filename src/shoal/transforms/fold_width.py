"""Mlps with fewer neurons: alike ones are merged, without text."""

from __future__ import annotations

from typing import Literal

import torch

from shoal.examples import TransformExamples
from shoal.fitting.clusters import k_means, means, sums, ward
from shoal.fitting.mlps import Mlp, kept, mlps_of, with_mlps
from shoal.fitting.result import Job, Transformed

NEEDS_PLAN = False
EXAMPLES = TransformExamples(
    refused=(
        ((), {"keep": 0.0}, "U688"),
        ((), {"keep": 1.5}, "U688"),
        ((), {"layers": "late"}, "U686"),
        ((), {"layers": "2-1"}, "U686"),
        ((), {"layers": "9"}, "U686"),
        ((2,), {"layers": "2"}, "U686"),
    )
)
Rows = dict[str, torch.Tensor]


def fold_width(
    job: Job,
    *,
    keep: float = 0.75,
    layers: str = "",
    cluster: Literal["kmeans", "ward"] = "kmeans",
    repair: Literal["none", "fold-ar"] = "none",
    seed: int = 0,
) -> Transformed:
    """Merge alike neurons of each mlp, so that a share `keep` of them is left; no text is read.

    A neuron is what the matrices that make it have for it (rows of gate and up) and what the matrix that reads it has
    (a column of down), laid behind one another. `cluster`: k-means over these vectors, or Ward's agglomeration, into
    keep x n clusters. Of the k neurons of a cluster, W_in [rows of each, hidden] becomes their mean and W_out [hidden]
    their sum: what they make together where all k are the same. `repair` fold-ar takes back the spread that the mean of
    unlike rows loses: each mean row times k / sqrt(k + (k^2 - k) r), r the mean cosine of two rows of the cluster;
    biases stay. `layers`: 3-5+9 names them; without it all whose neurons can be told. `keep` 1 changes nothing. Neurons
    of pretrained models are seldom alike: on SmolLM2 it is worse than dropping as many at random (docs/widths.md).

    Source: Wang et al. 2025 (Model Folding, arXiv 2502.10216): clusters, mean and sum, Fold-AR (there the correlation
    of activations, for inputs that are not correlated, which is the cosine of rows).

    How we differ: matrices of one mlp alone are merged (its gated mlps, as its experiments on LLaMA do), not heads, nor
    the hidden size. The released code for language models takes Ward's agglomeration after a principal component
    analysis and repairs nothing. Fold-AR is made for a norm behind each layer; behind a gate both factors are scaled.

    Raises U686 for layers that do not run once with an mlp of their own, U687 for an mlp whose neurons are not known
    (experts, a norm between its matrices), U688 for a `keep` that is no share.
    """
    kept(1, keep, "fold-width")
    if keep == 1:
        mlps_of(job, layers, "fold-width")
        return Transformed(job.plan, job.weights)
    mlps, new, notes = mlps_of(job, layers, "fold-width"), {}, []
    for number, one in enumerate(mlps):
        rows = one.rows()
        count = kept(one.count, keep, "fold-width")
        vectors = torch.cat([part.flatten(1) for part in rows.values()], 1)
        label = k_means(vectors, count, seed) if cluster == "kmeans" else ward(vectors, count)
        count = int(label.max()) + 1
        new[one.layer] = one.tensors_of(_merged(one, rows, label, count, scaled=repair == "fold-ar"))
        lost = (vectors - means(vectors, label, count)[label.to(vectors.device)]).norm() / vectors.norm()
        notes.append(f"layer {one.layer}: {one.count} neurons have become {count}, {float(lost):.1%} from their means")
        job.tell(number + 1, len(mlps), "fold-width")
    return with_mlps(job, new, mlps, "fold-width", tuple(notes))


def _merged(one: Mlp, rows: Rows, label: torch.Tensor, count: int, *, scaled: bool) -> Rows:
    made: Rows = {}
    for name, part in rows.items():
        flat = part.flatten(1)
        merged = sums(flat, label, count) if name == one.reader else means(flat, label, count)
        made[name] = merged.reshape(count, *part.shape[1:])
        if scaled and name != one.reader and part.shape[2] > 1:  # a bias is a mean, whatever the spread
            made[name] = made[name] * torch.stack([_scale(part[:, at], label, count) for at in range(part.shape[1])], 1)
    return made


def _scale(rows: torch.Tensor, label: torch.Tensor, count: int) -> torch.Tensor:
    """k / sqrt(k + (k^2 - k) r) for each cluster, [clusters, 1]."""
    size = torch.bincount(label, minlength=count).to(rows)
    units = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
    together = sums(units, label, count).square().sum(1)  # k + (k^2 - k) r, for r the mean over all pairs of two
    return (size / together.clamp(min=1e-12).sqrt()).where(size > 1, 1.0)[:, None]
