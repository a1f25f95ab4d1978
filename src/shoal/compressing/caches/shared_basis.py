"""One basis for the keys, and one for the values, of a group of rows: joint singular vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shoal.compressing.groups import RowGroup, Stored
from shoal.compressing.job import CacheJob
from shoal.errors import UsageError
from shoal.evaluation.distances import at_least_float32
from shoal.examples import CacheExamples, Refusal

EXAMPLES = CacheExamples(
    texts=("shared-basis:rank=2", "shared-basis:start=1,group=2,rank=3,value_rank=2", "shared-basis:group=1,rank=2"),
    null=("shared-basis:rank=64", "shared-basis:group=2,rank=500"),
    refused=(
        Refusal("no rank", "shared-basis:rank=0", "U659", "rank of 0"),
        Refusal("no rank of values", "shared-basis:value_rank=-2", "U659", "rank of -2"),
        Refusal("no group", "shared-basis:group=0", "U659", "groups of 0"),
        Refusal("start beyond the rows", "shared-basis:start=9", "U659", "rows 0 to 3"),
        Refusal("windows", "shared-basis", "P161", "window of 6 tokens", family="mistral"),
    ),
)


def shared_basis(
    job: CacheJob, *, start: int = 0, group: int = 4, rank: int = 64, value_rank: int | None = None
) -> list[Any]:
    """Hold, for `group` rows at a time, coefficients that they share and a basis of each: a joint truncated SVD.

    The keys of the rows g of a group after the prefill, [tokens, heads x dim] each, side by side:
        [X_1 ... X_G] ~ U_r S_r [V_1 ... V_G]^T,
    of which A = U_r S_r [tokens, rank] is held once and each V_g [heads x dim, rank] for its row, which is restored as
    A V_g^T; the values likewise, with `value_rank` where it is given. Groups begin at the row `start` of the plan; the
    last may be smaller. Where this would hold more than the rows do, as for a short prompt, they stay as they are.
    Tokens behind the prefill are held as they come.

    Source: xKV (Chang et al. 2025, arXiv 2503.18893): one set of singular vectors for the caches of grouped layers.

    How we differ: keys are taken as the cache of transformers is given them, turned by rope, where the paper takes them
    before; turned keys are further from low rank. Ranks are numbers, the same for every group. The SVD is exact and
    made anew for each prompt, in float32 at least. Rows with windows, a recurrent state or other shapes are refused
    (P161).
    """
    first = job.first_row("shared-basis", start)
    if group < 1:
        raise UsageError(f"shared-basis cannot make groups of {group} rows; use 1 or more", code="U659")
    ranks = {"keys": rank, "values": rank if value_rank is None else value_rank}
    for one in ranks.values():
        if one < 1:
            raise UsageError(f"shared-basis cannot hold a rank of {one}; use 1 or more", code="U659")
    rows = list(job.rows)
    for begin in range(first, len(rows), group):
        members = range(begin, min(begin + group, len(rows)))
        job.require_plain("shared-basis", members)
        job.require_alike("shared-basis", members)
        rows[begin : members.stop] = RowGroup(_Basis(ranks), len(members), job.real).rows
    return rows


@dataclass(frozen=True)
class _Basis:
    ranks: dict[str, int]

    def encode(self, half: str, states: Sequence[torch.Tensor], real: torch.Tensor | None) -> Stored | None:
        joint = torch.stack([at_least_float32(one) for one in states], dim=1)  # [batch, rows, heads, tokens, dim]
        batch, rows, heads, tokens, dim = joint.shape
        width, rank = rows * heads * dim, self.ranks[half]
        if rank * (tokens + width) >= tokens * width:
            return None
        matrix = joint.permute(0, 3, 1, 2, 4).reshape(batch, tokens, width)
        if real is not None:  # padding must not take up singular vectors
            matrix = matrix * real[..., None]
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        basis = right[:, :rank].reshape(batch, rank, rows, heads, dim)
        stored = {"coefficients": left[..., :rank] * values[:, None, :rank], "basis": basis}
        return {name: tensor.to(states[0].dtype).clone() for name, tensor in stored.items()}

    def decode(self, stored: Stored, place: int) -> torch.Tensor:
        return torch.einsum("btr,brhd->bhtd", stored["coefficients"], stored["basis"][:, :, place])

    def append(self, stored: Stored, states: Sequence[torch.Tensor]) -> Stored | None:
        return None
