"""Keys and values that several layers can share, in closed form, with each layer's way back in its own matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shoal.fitting.kv_moments import Moments, Prediction, predicted
from shoal.fitting.sharing import Group
from shoal.models.projections import HeadMatrices, ScoreSide

FLOOR = 1e-3
"""The least weight of a rotated channel beside the mean one of its layers; below it nothing asks for the channel."""


@dataclass(frozen=True, slots=True)
class Lost:
    """What a layer of a group loses: squared error over energy, as its queries and its output matrix weigh it."""

    layer: int
    keys: float
    values: float


def align(
    group: Group,
    matrices: dict[int, HeadMatrices],
    moments: Moments,
    *,
    weighted: bool = True,
    ridge: float = 1e-3,
) -> tuple[Lost, ...]:
    """Give the first layer of `group` keys and values that all can read, and each of them its way back, in `matrices`.

    What a reader's matrices would be given is predicted from what the source is given, x_r ~ T x_s, by least squares
    (`predicted`). For each head the values to share span the best common subspace of both layers'
    values [dim], V_l = P_l V, and P_l is multiplied into the columns of the layer's output matrix. For each two
    channels that positions turn together the key to share is the best common complex number, k_l = z_l k, and conj(z_l)
    goes into the layer's queries; channels that no position turns are treated as values are. Best: least squares over
    the tokens, `weighted` by what the output matrix makes of an error and by the energy of the queries that meet it.
    """
    source = group[0]
    maps = {layer: predicted(moments, layer, source, ridge) for layer in group}
    lost = {layer: [0.0, 0.0, 0.0, 0.0] for layer in group}
    known = matrices[source].known
    for head in range(len(known.values.channels)):
        if isinstance(known.scores, ScoreSide):
            _align_keys(head, group, matrices, moments, maps, weighted, lost)
        _align_values(head, group, matrices, moments, maps, weighted, lost)
    return tuple(
        Lost(layer, k / k_all if k_all else 0.0, v / v_all if v_all else 0.0)
        for layer, (k, k_all, v, v_all) in lost.items()
    )


@dataclass(frozen=True, slots=True)
class _Rows:
    """Some rows of every layer of a group, as functions of what the source is given."""

    own: list[torch.Tensor]
    """Of each layer, of what it is given itself."""
    seen: list[torch.Tensor]
    """The same as predicted from the source's."""


def _rows(group: Group, tables: Sequence[torch.Tensor], biased: bool, maps: dict[int, Prediction]) -> _Rows:
    """`tables`: of each layer rows [n, inputs (and 1)]; without a bias nothing can hold a constant."""
    device = tables[0].device
    seen = []
    for layer, table in zip(group, tables, strict=True):
        seen.append(table.to(device) @ maps[layer][biased].to(device))
    return _Rows(list(tables), seen)


def _of(moment: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """A moment for a table with or without a bias, where that table is."""
    size = table.shape[-1]
    return moment[:size, :size].to(table.device)


def _align_values(
    head: int,
    group: Group,
    matrices: dict[int, HeadMatrices],
    moments: Moments,
    maps: dict[int, Prediction],
    weighted: bool,
    lost: dict[int, list[float]],
) -> None:
    one = matrices[group[0]].known.values
    tables = [matrices[layer].rows(matrices[layer].known.values, head) for layer in group]
    rows = _rows(group, tables, matrices[group[0]].biased(one), maps)
    roots = []
    for layer in group:
        own = matrices[layer]
        columns = torch.cat([own.columns(reader) for reader in own.known.readers(head)])
        roots.append(metric_root(columns.T @ columns, weighted))
    shared, backs = common_subspace(rows.seen, roots, _of(moments.own[group[0]], rows.seen[0]))
    matrices[group[0]].put_rows(one, head, shared)
    for place, (layer, back) in enumerate(zip(group, backs, strict=True)):
        own = matrices[layer]
        for reader in own.known.readers(head):
            own.put_columns(reader, own.columns(reader) @ back.to(own.columns(reader).device))
        _note(lost[layer], 2, roots[place], rows.own[place], back @ shared, moments, layer, group[0])


def _align_keys(
    head: int,
    group: Group,
    matrices: dict[int, HeadMatrices],
    moments: Moments,
    maps: dict[int, Prediction],
    weighted: bool,
    lost: dict[int, list[float]],
) -> None:
    sides = {layer: _scores(matrices[layer]) for layer in group}
    side = sides[group[0]]
    tables = [matrices[layer].rows(sides[layer].keys, head) for layer in group]
    rows = _rows(group, tables, matrices[group[0]].biased(side.keys), maps)
    moment = _of(moments.own[group[0]], rows.seen[0])
    energies = [
        query_energy(matrices[layer], sides[layer], moments.own[layer], head).to(moment.device) for layer in group
    ]
    shared, backs = common_key(side, rows.seen, energies, moment, weighted)
    matrices[group[0]].put_rows(side.keys, head, shared)
    for place, (layer, back) in enumerate(zip(group, backs, strict=True)):
        own_matrices, queries = matrices[layer], sides[layer].queries
        for reader in own_matrices.known.readers(head):
            mine = own_matrices.rows(queries, reader)
            own_matrices.put_rows(queries, reader, back.T.to(mine.device) @ mine)
        weights = metric_root(turning(energies[place], side))
        _note(lost[layer], 0, weights, rows.own[place], back @ shared, moments, layer, group[0])


def common_key(
    side: ScoreSide, seen: list[torch.Tensor], energies: list[torch.Tensor], moment: torch.Tensor, weighted: bool = True
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The key [dim, inputs] that heads with the rows `seen` [dim, inputs] of keys can share, and for each the way back
    [dim, dim]. `energies` [dim, dim]: of the queries that meet each; `moment` [inputs, inputs] of what is given."""
    shared = torch.zeros_like(seen[0])
    backs = [torch.zeros(2 * [len(shared)], dtype=shared.dtype, device=shared.device) for _ in seen]
    energies = [energy.to(shared.device) for energy in energies]
    if side.pairs:
        _common_numbers(side.pairs, seen, energies, moment, weighted, shared, backs)
    if side.plain:
        plain = torch.tensor(side.plain, device=shared.device)
        blocks = [energy[plain][:, plain] for energy in energies]
        part, own = common_subspace(
            [one[plain] for one in seen], [metric_root(block, weighted) for block in blocks], moment
        )
        shared[plain] = part
        for back, mine in zip(backs, own, strict=True):
            back[plain[:, None], plain] = mine
    return shared, backs


def _scores(matrices: HeadMatrices) -> ScoreSide:
    scores = matrices.known.scores
    assert isinstance(scores, ScoreSide)
    return scores


def query_energy(own: HeadMatrices, side: ScoreSide, moment: torch.Tensor, head: int) -> torch.Tensor:
    """E[q q^T] [dim, dim] over the heads that ask the keys of `head`."""
    total: torch.Tensor | float = 0.0
    for reader in own.known.readers(head):
        queries = own.rows(side.queries, reader)
        total = total + queries @ _of(moment, queries) @ queries.T
    assert isinstance(total, torch.Tensor)
    return total / moment[-1, -1].to(total.device)


def turning(energy: torch.Tensor, side: ScoreSide) -> torch.Tensor:
    """`energy` as keys at all distances meet it: of two channels that turn together only the sum of both counts."""
    met = energy.clone()
    turned = torch.tensor([channel for pair in side.pairs for channel in pair], dtype=torch.long, device=energy.device)
    met[turned] = 0
    met[:, turned] = 0
    for a, b in side.pairs:
        met[a, a] = met[b, b] = (energy[a, a] + energy[b, b]) / 2
    return met


def _common_numbers(
    pairs: tuple[tuple[int, int], ...],
    seen: list[torch.Tensor],
    energies: list[torch.Tensor],
    moment: torch.Tensor,
    weighted: bool,
    shared: torch.Tensor,
    backs: list[torch.Tensor],
) -> None:
    """For each pair of channels the complex row w and the numbers z_l for which w_l z_l w is nearest to w_l k_l."""
    re, im = (torch.tensor(channels, device=shared.device) for channels in zip(*pairs, strict=True))
    rows = torch.stack([torch.complex(one[re], one[im]) for one in seen], 1)  # [pairs, layers, inputs]
    weights = torch.stack([(energy.diagonal()[re] + energy.diagonal()[im]).sqrt() for energy in energies], 1)
    weights = (
        weights.clamp(min=float(FLOOR * weights.mean().clamp(min=1e-30))) if weighted else torch.ones_like(weights)
    )
    weights = weights / weights.square().mean(1, keepdim=True).sqrt()
    scaled = rows * weights[..., None]
    gram = scaled @ moment.to(scaled.dtype) @ scaled.mH
    factors = torch.linalg.eigh(gram)[1][..., -1]  # [pairs, layers]
    common = (factors.conj()[..., None] * scaled).sum(1)
    shared[re], shared[im] = common.real, common.imag
    back = factors / weights
    for place, one in enumerate(backs):
        one[re, re] = one[im, im] = back[:, place].real
        one[re, im], one[im, re] = -back[:, place].imag, back[:, place].imag


def common_subspace(
    seen: list[torch.Tensor], roots: list[torch.Tensor], moment: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What `seen` [dim, inputs] of all layers have most in common, [dim, inputs], and for each layer the way back
    [dim, dim]: the first `dim` principal directions of all rows, each layer's in the metric of its root."""
    dim = len(seen[0])
    stacked = torch.cat([root.to(one.device) @ one for root, one in zip(roots, seen, strict=True)])
    directions = torch.linalg.eigh(stacked @ moment @ stacked.T)[1][:, -dim:]
    parts = directions.split(dim)
    return directions.T @ stacked, [torch.linalg.solve(r.to(p.device), p) for r, p in zip(roots, parts, strict=True)]


def metric_root(metric: torch.Tensor, weighted: bool = True) -> torch.Tensor:
    """R with R^T R = `metric`; the identity when nothing is weighted."""
    eye = torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
    if not weighted:
        return eye
    floor = 1e-6 * metric.diagonal().mean().clamp(min=1e-30)
    root: torch.Tensor = torch.linalg.cholesky(metric + floor * eye).mT
    return root


def _note(
    sums: list[float],
    at: int,
    root: torch.Tensor,
    own: torch.Tensor,
    made: torch.Tensor,
    moments: Moments,
    layer: int,
    source: int,
) -> None:
    """Add the squared error of `made`, of what the source is given, against `own`, of what the layer is given."""
    root, own = root.to(made.device), own.to(made.device)
    mine, theirs = root @ own, root @ made
    whole = float((mine @ _of(moments.own[layer], own) * mine).sum())
    both = moments.own[source] if layer == source else moments.cross[layer, source]
    cross = float((mine @ _of(both, own) * theirs).sum())
    other = float((theirs @ _of(moments.own[source], own) * theirs).sum())
    sums[at] += max(0.0, whole - 2 * cross + other)
    sums[at + 1] += whole
