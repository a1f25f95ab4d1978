"""MKA: merge the removed layers by how much information they share with the layer before them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Literal

import torch

from shoal.errors import UsageError
from shoal.examples import TransformExamples
from shoal.fitting.holes import Hole
from shoal.fitting.merge import merged
from shoal.fitting.result import Job, Transformed
from shoal.models.precision import in_float64
from shoal.plan import Run
from shoal.recording.layer_inputs import LayerInputs

EXAMPLES = TransformExamples(role="merge", null={"share": 0.0}, refused=(((2,), {"share": -1.0}, "U558"),))


def mka(
    job: Job,
    *,
    sigma: float = 1.0,
    alpha: float = 0.5,
    dims: int = 2,
    share: float | None = None,
    weight: Literal["similarity", "released"] = "similarity",
) -> Transformed:
    """Merge each removed span into the layer l before it: theta_l <- a theta_l + (1 - a) theta_m, for m in the span.

    weight=similarity: a = S_lm, the similarity of the two layers: one that says the same as l leaves l as it is, one
    that says something else takes its place. weight=released: a = 1 / (1 + exp(-s_l / (s_l + s_m))) with s_i the mean
    of S_ij over all layers j, between 0.5 and 0.73. Each layer is a set of vectors, the mean output state of each
    calibration sequence. Diffusion kernel: K_ij = exp(-sqrt(|x_i - x_j| / (sigma * median))), p = K 1,
    K' = K / (p p^T)^alpha, A = K' / (v v^T) with v = sqrt(K' 1); of its singular vectors the second to the
    (dims + 1)-th, divided by the first, are the embedding. S = mean over coordinates of I(u; v) / sqrt(H(u) H(v)) of
    the ranks, in sqrt(sequences) bins. `share` fixes 1 - a instead: 0 is dropping, bit for bit.
    Raises U554 for fewer than 4 sequences, U558 for a share outside 0 to 1.

    Source: Liu et al. 2024 (MKA, arXiv 2406.16330).

    How we differ: entropies from binned ranks instead of nearest neighbours; sigma is a multiple of the median
    distance. The released code computes the second weight, but assigns into a fresh state dict, so that there no tensor
    ever changes and its result is dropping (`share` 0); its kernel is over the first tokens of one sequence.
    """
    if share is not None and not 0 <= share <= 1:
        raise UsageError(f"mka takes a share from 0 (the kept layer alone) to 1, not {share:g}", code="U558")
    if share is None and len(job.data) < 4:
        raise UsageError(f"mka compares layers over sequences; give 4 or more, not {len(job.data)}", code="U554")
    vectors = {} if share is not None else _embeddings(job, sigma, alpha, dims)

    @cache
    def given_up(kept: int, other: int) -> float:
        """1 - a, what the kept layer gives up to another."""
        if share is not None:
            return share
        if weight == "similarity":
            return 1 - _similarity(vectors[kept], vectors[other])
        return 1 - _released(*(_mean_similarity(vectors, layer) for layer in (kept, other)))

    def rule(_: str, parts: Sequence[torch.Tensor], hole: Hole) -> torch.Tensor:
        result = parts[0]
        for number, other in enumerate(parts[1:]):
            result = result + given_up(hole.first - 1, hole.first + number) * (other - result)
        return result

    return merged(job, "mka", rule)


def _released(own: float, other: float) -> float:
    """The weight of the kept layer in the released code, from both layers' mean similarities; 0.5 of either sum 0."""
    return 1 / (1 + math.exp(-own / (own + other))) if own + other else 0.5


def _mean_similarity(vectors: Mapping[int, torch.Tensor], layer: int) -> float:
    return sum(_similarity(vectors[layer], other) for other in vectors.values()) / len(vectors)


def _embeddings(job: Job, sigma: float, alpha: float, dims: int) -> dict[int, torch.Tensor]:
    """For each base layer the diffusion embedding of its outputs, [sequences, dims]."""
    inputs = LayerInputs(job.model, job.data, stack=job.stack, batch=job.batch)
    stream, found = inputs.stream(), {}
    for layer in range(inputs.stack.depth):
        stream.advance(Run(layer))
        means = [
            (state * real.to(state.device)[..., None]).sum(1) / real.sum(1, keepdim=True).to(state.device)
            for state, real in zip(map(in_float64, stream.states), inputs.real, strict=True)
        ]
        found[layer] = _diffusion(torch.cat(means).cpu(), sigma, alpha, dims)
        job.tell(layer + 1, inputs.stack.depth, "mka")
    return found


def _diffusion(x: torch.Tensor, sigma: float, alpha: float, dims: int) -> torch.Tensor:
    """The diffusion embedding [n, dims] of the vectors x [n, d]; unchanged when x is rotated."""
    distance = torch.cdist(x, x)
    middle = distance[~torch.eye(len(x), dtype=torch.bool)].median().clamp(min=torch.finfo(x.dtype).tiny)
    kernel = torch.exp(-(distance / (sigma * middle)).sqrt())
    p = kernel.sum(1)
    kernel = kernel / torch.outer(p, p) ** alpha
    v = kernel.sum(1).sqrt()
    left = torch.linalg.svd(kernel / torch.outer(v, v)).U
    return left[:, 1 : dims + 1] / left[:, :1]


def _similarity(a: torch.Tensor, b: torch.Tensor) -> float:
    """Normalised mutual information of two embeddings [n, dims], 0 to 1: 1 for the same up to any monotone map of each
    coordinate, signs included."""
    n = len(a)
    bins = max(2, int(n**0.5))
    coded = [(x.argsort(0).argsort(0) * bins // n) for x in (a, b)]
    found = []
    for u, v in zip(*(c.T for c in coded), strict=True):
        joint = torch.zeros(bins, bins, dtype=torch.float64)
        joint.index_put_((u, v), torch.ones(n, dtype=torch.float64), accumulate=True)
        joint /= n
        entropies = [_entropy(joint.sum(1)), _entropy(joint.sum(0))]
        mutual = sum(entropies) - _entropy(joint.flatten())
        found.append(mutual / (entropies[0] * entropies[1]) ** 0.5)
    return min(1.0, max(0.0, sum(found) / len(found)))


def _entropy(p: torch.Tensor) -> float:
    return float(-(p[p > 0] * p[p > 0].log()).sum())
