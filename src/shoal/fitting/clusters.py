"""Rows gathered into clusters: k-means, or Ward's agglomeration."""

from __future__ import annotations

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage

ROUNDS = 30
"""Of Lloyd's iteration, at most; it stops when no row moves."""


def ward(rows: torch.Tensor, count: int) -> torch.Tensor:
    """The cluster of each of `rows` [rows, numbers], of `count` or fewer, by merging those two again and again whose
    union adds least to the sum of squares."""
    if count >= len(rows):
        return torch.arange(len(rows))
    found = fcluster(linkage(rows.cpu().numpy(), method="ward"), count, criterion="maxclust")
    return torch.from_numpy(np.asarray(found, dtype=np.int64)) - 1


def k_means(rows: torch.Tensor, count: int, seed: int = 0) -> torch.Tensor:
    """The cluster of each of `rows` [rows, numbers], of `count`, by Lloyd's iteration from rows that are drawn with
    chances by their squared distance from those drawn before (k-means++). No cluster stays empty."""
    if count >= len(rows):
        return torch.arange(len(rows))
    centres = rows[_spread(rows, count, torch.Generator().manual_seed(seed))]
    label = torch.full((len(rows),), -1)
    for _ in range(ROUNDS):
        distances = torch.cdist(rows, centres)
        nearest, found = distances.min(1)
        found = _without_gaps(found.cpu(), nearest.cpu(), count)
        if torch.equal(found, label):
            break
        label = found
        centres = means(rows, label, count)
    return label


def means(rows: torch.Tensor, label: torch.Tensor, count: int) -> torch.Tensor:
    """The mean row of each cluster, [clusters, numbers]; of a cluster with one row that row, bit for bit."""
    return sums(rows, label, count) / torch.bincount(label, minlength=count).to(rows)[:, None]


def sums(rows: torch.Tensor, label: torch.Tensor, count: int) -> torch.Tensor:
    """The sum of the rows of each cluster, [clusters, numbers]."""
    return rows.new_zeros(count, rows.shape[1]).index_add_(0, label.to(rows.device), rows)


def _spread(rows: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """The numbers of so many rows, each drawn far from the others."""
    chosen = [int(torch.randint(len(rows), (), generator=generator))]
    far = (rows - rows[chosen[0]]).square().sum(1).cpu().double()
    while len(chosen) < count:
        if not bool(far.any()):  # every row left is a copy of one that was drawn
            chosen += sorted(set(range(len(rows))) - set(chosen))[: count - len(chosen)]
            break
        chosen.append(int(torch.multinomial(far, 1, generator=generator)))
        far = torch.minimum(far, (rows - rows[chosen[-1]]).square().sum(1).cpu().double())
    return torch.tensor(chosen)


def _without_gaps(label: torch.Tensor, nearest: torch.Tensor, count: int) -> torch.Tensor:
    """Into clusters that nobody is in go the rows farthest from their centre, out of clusters of several."""
    sizes = torch.bincount(label, minlength=count)
    for gap in (sizes == 0).nonzero().flatten().tolist():
        row = int(torch.where(sizes[label] > 1, nearest, -1.0).argmax())
        sizes[label[row]] -= 1
        sizes[gap] += 1
        label[row], nearest[row] = gap, 0.0
    return label
