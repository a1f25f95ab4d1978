"""Heads of keys and values of one layer in groups of one size, and each group fused into one head."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shoal.fitting.align import common_key, common_subspace, metric_root, query_energy, turning
from shoal.models.projections import HeadMatrices, Projection, ScoreSide

Groups = tuple[tuple[int, ...], ...]


def neighbouring(heads: int, made: int) -> Groups:
    """`heads` in `made` groups of neighbours."""
    return _cut(range(heads), heads // made)


def cheapest_groups(costs: np.ndarray, made: int) -> Groups:
    """`made` groups of one size with a small sum of the costs [heads, heads] of all pairs within a group.

    From neighbours on two heads of different groups change places, those first that make the sum smallest, until none
    makes it smaller: so it is never dearer than that of neighbours.
    """
    order = list(range(len(costs)))
    size = len(costs) // made
    while True:
        pairs = itertools.combinations(range(len(order)), 2)
        found = [(_sum(costs, _swapped(order, a, b), size), a, b) for a, b in pairs if a // size != b // size]
        now = _sum(costs, order, size)
        if not found or min(found)[0] >= now - 1e-9 * abs(now):
            return tuple(sorted(tuple(sorted(one)) for one in _cut(order, size)))
        order = _swapped(order, *min(found)[1:])


@dataclass(frozen=True, slots=True)
class Loss:
    """Squared errors over what is there without any, as queries and output matrix weigh them."""

    keys: float
    values: float


@dataclass(frozen=True, slots=True)
class _Fused:
    """What one group becomes: a key and a value [dim, inputs], and for each of its heads the way back [dim, dim]."""

    key: torch.Tensor
    value: torch.Tensor
    key_backs: list[torch.Tensor]
    value_backs: list[torch.Tensor]


class LayerHeads:
    """The heads of one attention, with what they are given on a text."""

    def __init__(self, matrices: HeadMatrices, moment: torch.Tensor, *, aligned: bool) -> None:
        """`moment` [inputs + 1, inputs + 1]: of what the matrices are given, and of the 1 of a bias. `aligned`: a
        group's head is what its heads have most in common, each with a way back into queries and output matrix;
        otherwise it is their mean."""
        scores = matrices.known.scores
        assert isinstance(scores, ScoreSide)
        self.matrices, self.known, self.scores, self.moment = matrices, matrices.known, scores, moment
        self.aligned = aligned
        self.count = len(self.known.values.channels)
        self.keys, self.values = ([matrices.rows(side, h) for h in range(self.count)] for side in self._stored())
        self.energies = [query_energy(matrices, scores, moment, head) for head in range(self.count)]
        columns = [torch.cat([matrices.columns(r) for r in self.known.readers(h)]) for h in range(self.count)]
        self.key_roots = [metric_root(turning(energy, scores)) for energy in self.energies]
        self.value_roots = [metric_root(one.T @ one) for one in columns]
        self.whole = Loss(
            sum(self._energy(root, rows) for root, rows in zip(self.key_roots, self.keys, strict=True)),
            sum(self._energy(root, rows) for root, rows in zip(self.value_roots, self.values, strict=True)),
        )

    def lost(self, groups: Groups) -> Loss:
        """What the layer loses of its keys and of its values if these are fused, as shares."""
        keys = values = 0.0
        for group in groups:
            one = self._fused(group)
            for at, head in enumerate(group):
                keys += self._energy(self.key_roots[head], self.keys[head] - one.key_backs[at] @ one.key)
                values += self._energy(self.value_roots[head], self.values[head] - one.value_backs[at] @ one.value)
        return Loss(keys / max(self.whole.keys, 1e-30), values / max(self.whole.values, 1e-30))

    def groups(self, made: int) -> Groups:
        """`made` groups of alike heads, or neighbours where these lose less."""
        costs = np.zeros((self.count, self.count))
        for a, b in itertools.combinations(range(self.count), 2):
            lost = self.lost(((a, b),))
            costs[a, b] = costs[b, a] = lost.keys + lost.values
        return min((cheapest_groups(costs, made), neighbouring(self.count, made)), key=self._total)

    def written(self, groups: Groups) -> dict[str, torch.Tensor]:
        """The layer's tensors, by their names in it, with one head of keys and values for each group. The heads of a
        group stand side by side, with their queries and columns of the output matrix."""
        own, known, scores = self.matrices, self.known, self.scores
        made = [self._fused(group) for group in groups]
        queries = [own.rows(scores.queries, head) for head in range(len(known.output.channels))]
        columns = [own.columns(head) for head in range(len(known.output.channels))]
        places = iter(range(len(queries)))
        for number, (group, one) in enumerate(zip(groups, made, strict=True)):
            own.put_rows(scores.keys, number, one.key)
            own.put_rows(known.values, number, one.value)
            for at, head in enumerate(group):
                for reader in known.readers(head):
                    place = next(places)
                    own.put_rows(scores.queries, place, one.key_backs[at].T @ queries[reader])
                    own.put_columns(place, columns[reader] @ one.value_backs[at])
        tensors = own.written(scores.queries, scores.keys, known.values, known.output)
        for side in self._stored():
            for name in (f"{side.module}.weight", f"{side.module}.bias"):
                if name in tensors:
                    dim = 1 if side.turned and tensors[name].dim() > 1 else 0
                    size = len(groups) * len(side.channels[0])
                    tensors[name] = tensors[name].narrow(dim, 0, size).clone()
        return tensors

    def _stored(self) -> tuple[Projection, Projection]:
        return self.scores.keys, self.known.values

    def _fused(self, group: Sequence[int]) -> _Fused:
        keys, values = [self.keys[head] for head in group], [self.values[head] for head in group]
        if not self.aligned or len(group) == 1:
            eyes = [
                [torch.eye(len(one), dtype=one.dtype, device=one.device) for one in side] for side in (keys, values)
            ]
            return _Fused(torch.stack(keys).mean(0), torch.stack(values).mean(0), *eyes)
        key, key_backs = common_key(self.scores, keys, [self.energies[h] for h in group], self._moment(keys[0]))
        roots = [self.value_roots[head] for head in group]
        value, value_backs = common_subspace(values, roots, self._moment(values[0]))
        return _Fused(key, value, key_backs, value_backs)

    def _total(self, groups: Groups) -> float:
        lost = self.lost(groups)
        return lost.keys + lost.values

    def _energy(self, root: torch.Tensor, rows: torch.Tensor) -> float:
        weighed = root.to(rows.device) @ rows
        return float((weighed @ self._moment(rows) * weighed).sum())

    def _moment(self, rows: torch.Tensor) -> torch.Tensor:
        size = rows.shape[-1]
        return self.moment[:size, :size].to(rows.device)


def _eyes(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.eye(len(one), dtype=one.dtype, device=one.device) for one in parts]


def _cut(order: Sequence[int], size: int) -> Groups:
    return tuple(tuple(order[at : at + size]) for at in range(0, len(order), size))


def _swapped(order: list[int], a: int, b: int) -> list[int]:
    made = list(order)
    made[a], made[b] = made[b], made[a]
    return made


def _sum(costs: np.ndarray, order: Sequence[int], size: int) -> float:
    return sum(float(costs[np.ix_(group, group)].sum()) / 2 for group in _cut(order, size))
