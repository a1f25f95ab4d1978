"""MiniCache: neighbouring rows keep one direction for both, each its own lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from shoal.compressing.groups import RowGroup, Stored
from shoal.compressing.job import CacheJob, share
from shoal.errors import UsageError
from shoal.evaluation.distances import angle, at_least_float32
from shoal.examples import CacheExamples, Refusal

EXAMPLES = CacheExamples(
    texts=("minicache:start=0", "minicache:start=2,keep=0.1,later=keep", "minicache:at=0,2,gamma=0.1"),
    null=("minicache:start=0,keep=1", "minicache:start=3"),
    refused=(
        Refusal("start beyond the rows", "minicache:start=4", "U659", "rows 0 to 3"),
        Refusal("a pair beyond the rows", "minicache:at=1,3", "U659", "rows 0 to 3"),
        Refusal("a row in two pairs", "minicache:at=1,2", "U659", "belongs to one pair"),
        Refusal("keep above 1", "minicache:keep=1.5", "U659", "keep from 0 to 1"),
        Refusal("t below 0", "minicache:t=-0.1", "U659", "t from 0 to 1"),
        Refusal("gamma above 1", "minicache:gamma=2", "U659", "gamma from 0 to 1"),
        Refusal("no such rule", "minicache:rule=far", "U502", "distinct, similar"),
        Refusal("windows", "minicache", "P161", "window of 6 tokens", family="gemma3_text"),
    ),
)


def minicache(
    job: CacheJob,
    *,
    start: int | None = None,
    at: tuple[int, ...] | None = None,
    keep: float = 0.05,
    t: float = 0.6,
    gamma: float | None = None,
    rule: Literal["distinct", "similar"] = "distinct",
    later: Literal["merge", "keep"] = "merge",
) -> list[Any]:
    """Hold one direction for the keys, and one for the values, of two neighbouring rows, and the lengths of both.

    For x, y [batch, heads, tokens, dim] of rows l and l + 1, u = x / |x| and v = y / |y|, and Omega the angle between
    them, what is held of a token is
        e = (sin((1 - t) Omega) u + sin(t Omega) v) / sin Omega,  |x|  and  |y|,
    and the rows are restored as e |x| and e |y|. The pairs are start and start + 1, start + 2 and start + 3, ...; a
    last row without a partner stays as it is. `start`: a row of the plan, by default the middle. `at`: the lower rows
    of the pairs one by one, as at=4,9,25, in place of `start`.

    Tokens whose two states differ most are held unmerged beside e, for keys and for values apart: by the angle d, mean
    over the heads, `keep` is their share. With `gamma` they are those with d > d_max - gamma (d_max - d_min), the
    paper's threshold. `rule=similar` keeps the least different ones instead. `later=keep` holds what comes after the
    prefill as it is; `merge` merges each forward by itself, and a token alone stays unmerged only if keep > 0.5.

    Source: MiniCache (Liu et al. 2024, arXiv 2405.14366): directions between two layers' at t = 0.6, lengths restored,
    tokens that differ most retained.

    How we differ: the share of retained tokens is given directly, the threshold is an option. It is written for the
    angle. The baseline of that name in the repository of xKV applies the inequality of a similarity to the angle and so
    retains the most similar tokens (`gamma=0.05,rule=similar`); it also holds both rows in full, while here e is one
    tensor for both. e is held for retained tokens too. The prompt attends to its own keys and values as they are. A
    pair whose rows have windows, a recurrent state or other shapes is refused (P161).
    """
    pairs = _neighbours(job, start) if at is None else _chosen(job, at)
    codec = _Merging(share("minicache", "t", t), _Unmerged(keep, gamma, rule), later == "merge")
    rows = list(job.rows)
    for lower in pairs:
        pair = (lower, lower + 1)
        job.require_plain("minicache", pair)
        job.require_alike("minicache", pair)
        rows[lower : lower + 2] = RowGroup(codec, 2, job.real).rows
    return rows


def _neighbours(job: CacheJob, start: int | None) -> range:
    return range(job.first_row("minicache", start), len(job.rows) - 1, 2)


def _chosen(job: CacheJob, at: tuple[int, ...]) -> tuple[int, ...]:
    members = [row for lower in at for row in (lower, lower + 1)]
    if not all(0 <= row < len(job.rows) for row in members) or len(set(members)) < len(members):
        raise UsageError(
            f"minicache cannot pair each of the rows {', '.join(map(str, at))} with the next one: a row belongs to one "
            f"pair, and the cache has the rows 0 to {len(job.rows) - 1}",
            code="U659",
        )
    return at


class _Unmerged:
    """Which tokens are held unmerged."""

    def __init__(self, keep: float, gamma: float | None, rule: str) -> None:
        self.keep = share("minicache", "keep", keep)
        self.gamma = None if gamma is None else share("minicache", "gamma", gamma)
        self.similar = rule == "similar"

    def choose(self, distances: torch.Tensor, real: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices [batch, n] of tokens for `distances` [batch, tokens], and which of them are meant, bool [batch, n]:
        n is the largest number of any sequence."""
        real = torch.ones_like(distances, dtype=torch.bool) if real is None else real
        far = -distances if self.similar else distances
        order = far.masked_fill(~real, -torch.inf).argsort(dim=1, descending=True, stable=True)
        if self.gamma is None:
            counts = (self.keep * real.sum(1)).round().long()
        else:
            most = far.masked_fill(~real, -torch.inf).amax(1, keepdim=True)
            least = far.masked_fill(~real, torch.inf).amin(1, keepdim=True)
            counts = ((far > most - self.gamma * (most - least)) & real).sum(1)
        n = int(counts.max())
        return order[:, :n].clone(), torch.arange(n, device=far.device)[None] < counts[:, None]


@dataclass(frozen=True)
class _Merging:
    t: float
    unmerged: _Unmerged
    merges_later: bool

    def encode(self, half: str, states: Sequence[torch.Tensor], real: torch.Tensor | None) -> Stored:
        return self._merged(states, real)

    def _merged(self, states: Sequence[torch.Tensor], real: torch.Tensor | None) -> Stored:
        x, y = (at_least_float32(one) for one in states)
        lengths = torch.stack([x.norm(dim=-1), y.norm(dim=-1)], dim=1)
        stored = {"direction": _between(x, y, self.t), "lengths": lengths}
        stored = {name: tensor.to(states[0].dtype) for name, tensor in stored.items()}
        # angles of vectors without a direction are those of zeros: nothing is lost by merging them
        index, meant = self.unmerged.choose(angle(x, y).mean(dim=1), real)
        at = index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1])
        kept = [one.gather(2, at) for one in states]
        merged = [_restored(stored, place).gather(2, at) for place in (0, 1)]
        chosen = [torch.where(meant[:, None, :, None], *both) for both in zip(kept, merged, strict=True)]
        return stored | {"unmerged": torch.stack(chosen, dim=1), "index": index}

    def decode(self, stored: Stored, place: int) -> torch.Tensor:
        unmerged = stored["unmerged"][:, place]
        at = stored["index"][:, None, :, None].expand_as(unmerged)
        return _restored(stored, place).scatter(2, at, unmerged)

    def append(self, stored: Stored, states: Sequence[torch.Tensor]) -> Stored | None:
        if not self.merges_later:
            return None
        more = self._merged(states, None)
        more["index"] = more["index"] + stored["direction"].shape[2]
        axes = {"direction": 2, "lengths": 3, "unmerged": 3, "index": 1}
        return {name: torch.cat([stored[name], more[name]], dim=axis) for name, axis in axes.items()}


def _restored(stored: Stored, place: int) -> torch.Tensor:
    """What the row at `place` of the pair is restored to, were no token unmerged."""
    return stored["direction"] * stored["lengths"][:, place, :, :, None]


def _between(x: torch.Tensor, y: torch.Tensor, t: float) -> torch.Tensor:
    """The unit vector at `t` on the way from the direction of `x` to that of `y`, over the last dimension."""
    u, v = (torch.nn.functional.normalize(one, dim=-1) for one in (x, y))
    omega = angle(x, y)[..., None]
    sine = torch.sin(omega)
    straight = u + t * (v - u)  # the limit for one direction, exact for equal ones; opposite ones have no way between
    nearer = v if t >= 0.5 else u
    curved = (torch.sin((1 - t) * omega) * u + torch.sin(t * omega) * v) / sine.clamp(min=1e-4)
    return torch.where(sine > 1e-4, curved, torch.where(omega < 1, straight, nearer))
