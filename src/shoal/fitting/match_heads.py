"""Which of another layer's attention maps each head of a layer is nearest to, and heads put in that order, exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from shoal.fitting.result import Job
from shoal.fitting.sharing import Group
from shoal.models.projections import HeadMatrices
from shoal.recording.attention import observe_maps


def map_distances(job: Job, groups: Sequence[Group], what: str) -> dict[int, np.ndarray]:
    """For each layer that follows the first of its group how far its maps are from that one's: [heads of the layer,
    heads of the first], the mean over tokens of |A_j(q) - P_p(q)|^2, under the whole base model on the job's text.

    Padding does not count. Raises U537 and U507 as `observe_maps` does. Memory: the maps of one batch of the layers
    that are followed.
    """
    source = {layer: group[0] for group in groups for layer in group[1:]}
    last = {group[0]: max(group) for group in groups}
    sums: dict[int, torch.Tensor] = {}
    held: dict[int, torch.Tensor] = {}
    keep = torch.ones(1, 1)
    tokens, done = 0, 0

    def before(ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        nonlocal keep, tokens, done
        keep = torch.ones(ids.shape) if mask is None else mask.bool().float().cpu()
        tokens += int(keep.sum())
        done += len(ids)
        job.tell(done, len(job.data), "attention maps")

    def watch(layer: int, maps: torch.Tensor) -> None:
        if layer in last:
            held[layer] = maps.float() * keep.to(maps.device)[:, None, :, None]
        if layer in source:
            mine, theirs = maps.float() * keep.to(maps.device)[:, None, :, None], held[source[layer]].to(maps.device)
            energy = [one.square().sum((0, 2, 3)) for one in (mine, theirs)]
            both = torch.einsum("bhqk,bpqk->hp", mine, theirs)
            apart = (energy[0][:, None] + energy[1][None] - 2 * both).clamp(min=0).cpu().double()
            sums[layer] = sums.get(layer, torch.zeros_like(apart)) + apart
        for done_with in [one for one in held if last[one] <= layer]:
            del held[done_with]

    observe_maps(job.model, job.data.batches(job.batch), watch, what=what, before=before, stack=job.stack)
    return {layer: (total / max(1, tokens)).numpy() for layer, total in sums.items()}


def best_places(distances: np.ndarray, group: int) -> list[int]:
    """For each head the place where it stands, so that the sum of distances [heads, places] is least.

    Every `group` neighbouring heads attend with the same values and must stay together: whole groups change places, and
    heads within their group. Each pair of a group and a place for it is solved as an assignment of its own, and so are
    the groups to the places.
    """
    count = len(distances) // group
    inner: dict[tuple[int, int], list[int]] = {}
    costs = np.zeros((count, count))
    for a in range(count):
        for b in range(count):
            block = distances[a * group : (a + 1) * group, b * group : (b + 1) * group]
            rows, places = linear_sum_assignment(block)
            costs[a, b] = block[rows, places].sum()
            inner[a, b] = [b * group + int(place) for place in places]
    return [place for a, b in zip(*linear_sum_assignment(costs), strict=True) for place in inner[int(a), int(b)]]


def put_in_places(matrices: HeadMatrices, places: Sequence[int]) -> dict[str, torch.Tensor]:
    """The layer's matrices of values and output, by their names within it, with head j standing at `places[j]`."""
    known = matrices.known
    columns = [matrices.columns(head) for head in range(len(places))]
    rows = [matrices.rows(known.values, head) for head in range(len(known.values.channels))]
    for head, place in enumerate(places):
        matrices.put_columns(place, columns[head])
        matrices.put_rows(known.values, place // known.group, rows[head // known.group])
    return matrices.written(known.values, known.output)
