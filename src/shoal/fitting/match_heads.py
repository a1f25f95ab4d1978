"""Which of another layer's attention maps suits each head of a layer best, and heads put in that order, exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from shoal.fitting.align import metric_root
from shoal.fitting.result import Job
from shoal.fitting.sharing import Group
from shoal.models.opened import open_model
from shoal.models.projections import HeadMatrices
from shoal.recording.attention import observe_maps


def map_distances(
    job: Job, groups: Sequence[Group], matrices: dict[int, HeadMatrices], what: str
) -> dict[int, np.ndarray]:
    """For each layer that follows the first of its group what its heads would lose by that one's maps: [heads, heads of
    the first], the squared error of what head j adds to the hidden state with map p, |O_j (A_j - P_p) V_j|^2, over what
    all heads of the layer add, under the whole base model on the job's text.

    `matrices`: of each follower. Padding does not count. Raises U537 and U507 as `observe_maps` does. Memory: the maps
    of one batch of the layers that are followed, and what one of these maps makes of all heads' values.
    """
    source = {layer: group[0] for group in groups for layer in group[1:]}
    last = {group[0]: max(group) for group in groups}
    errors: dict[int, torch.Tensor] = {}
    energy: dict[int, float] = {}
    held: dict[int, torch.Tensor] = {}
    given: dict[int, torch.Tensor] = {}
    keep = torch.ones(1, 1)
    done = 0

    def before(ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        nonlocal keep, done
        keep = torch.ones(ids.shape) if mask is None else mask.bool().float().cpu()
        done += len(ids)
        job.tell(done, len(job.data), "attention maps")

    def watch(layer: int, maps: torch.Tensor) -> None:
        if layer in last:
            held[layer] = maps.float()
        if layer in source:
            values = _weighed(matrices[layer], given[layer].reshape(*keep.shape, -1)).to(maps.device)
            real = keep.to(maps.device)[:, None, :, None]
            mine = maps.float() @ values * real
            theirs = held[source[layer]].to(maps.device).unbind(1)
            apart = [(mine - one[:, None] @ values * real).square().sum((0, 2, 3)) for one in theirs]
            errors[layer] = errors.get(layer, 0) + torch.stack(apart, 1).cpu().double()
            energy[layer] = energy.get(layer, 0.0) + float(mine.square().sum())
        for unread in [one for one in held if last[one] <= layer]:
            del held[unread]

    stack = open_model(job.model).stack(job.stack)
    handles = [
        stack.layer(layer)
        .get_submodule(own.known.values.module)
        .register_forward_pre_hook(lambda _, args, layer=layer: given.update({layer: args[0].detach()}))
        for layer, own in matrices.items()
    ]
    try:
        observe_maps(job.model, job.data.batches(job.batch), watch, what=what, before=before, stack=job.stack)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: (total / max(energy[layer], 1e-30)).numpy() for layer, total in errors.items()}


def _weighed(own: HeadMatrices, given: torch.Tensor) -> torch.Tensor:
    """The values of each head that attends [batch, heads, tokens, dim], so turned and stretched that their lengths are
    those of what the output matrix makes of them; `given` [batch, tokens, inputs]."""
    one = own.known.values
    x = torch.cat([given, torch.ones_like(given[..., :1])], -1) if own.biased(one) else given
    made = []
    for head in range(len(own.known.output.channels)):
        rows, columns = own.rows(one, head // own.known.group), own.columns(head)
        turned = metric_root(columns.T @ columns) @ rows
        made.append(x.float() @ turned.T.to(x.device).float())
    return torch.stack(made, 1)


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
