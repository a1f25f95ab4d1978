"""Interactions: how many combinations of tokens the state behind a layer tells of, by the model's own head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from shoal.errors import UsageError
from shoal.evaluation.mean_scores import mean_scores
from shoal.evaluation.scoring import logits_of, require_context
from shoal.executing.bind import bind
from shoal.executing.inputs import require_whole
from shoal.executing.recorder import Recorder, RunRecord
from shoal.models.evaluating import evaluating
from shoal.models.kinds import require_causal
from shoal.models.opened import open_model
from shoal.recording.observe import require_token_axis
from shoal.scores import Traits

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluation import Progress
    from shoal.executing.bind import BoundPlan
    from shoal.scores import Scores

TRAITS = Traits(null="none", least=False)
WHAT = "interactions"
MOST = 10


def interactions(
    model: Any,
    data: Data,
    *,
    tokens: int = 6,
    salient: float = 0.05,
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """How many sets of tokens have an effect of their own on what final norm and head make of the output of layer i.

    N holds the last `tokens` tokens of a sequence in front of the one that predicts its last token y; of S in N the
    others are hidden from attention. v_i(S) = ln(p / (1 - p)), p the probability of y that the model's own norm and
    head give behind layer i; I_i(S) = sum over T in S of (-1)^(|S| - |T|) v_i(T), so that v_i(N) is the sum of all
    I_i. c_i = E_s[ number of S, not empty, with |I_i(S)| >= `salient` * max_S' |I_i(S')| ] over sequences s. The detail
    holds `new` and `forgotten`, how many of these sets are not salient behind the layer below, or were there and are
    not any more; `kept`, the share of them that is salient behind the last layer; `order`, the mean number of tokens of
    a salient set. A diagnostic of what layers add and throw away, not of which may go.

    Source: Cheng et al. 2024 (ICML, arXiv 2409.08712), after the Harsanyi dividend.

    How we differ: AND interactions alone, where the paper splits v into an AND and an OR part by a sparse fit; the
    model's own head behind each layer, where it trains a linear classifier; counts, where it adds up strengths; a
    hidden token is left out of attention, where it puts a mask token. Up to 10 tokens, since the cost is exponential:
    2^tokens forwards for each sequence, and the head for each of them behind each layer; `batch` of them run at a time,
    64 at least. Raises U698 for more tokens or a share that cannot be, and for sequences of less than 4 tokens, M316
    for streams side by side, M322 for a model without next-token scores, U507 while a plan is running.
    """
    if not 1 <= tokens <= MOST or not 0 < salient <= 1:
        raise UsageError(
            f"tokens={tokens}, salient={salient:g}: each sequence takes 2^tokens forwards, and a set counts from a "
            f"share of the largest effect on; use 1 to {MOST} tokens and a share above 0, at most 1",
            code="U698",
        )
    require_causal(model, WHAT)
    require_whole(model, WHAT, stack)
    require_context(model, data.ids.shape[1])
    whole, found = bind(model), open_model(model).stack(stack)
    seen: list[torch.Tensor] = []
    orders: list[torch.Tensor] = []
    for row, ids in enumerate(data.ids):
        own = ids if data.mask is None else ids[data.mask[row].bool()]
        if len(own) < 4:
            raise UsageError(
                f"interactions need a token to predict, one that predicts it and two in front, and sequence {row} has "
                f"{len(own)}; give longer sequences",
                code="U698",
            )
        subsets = _subsets(min(tokens, len(own) - 3))  # the first one stays: it counts positions
        with evaluating(model), whole.running():
            effects = _dividends(_worth(whole, own, subsets, found.name, max(batch, 64)))[:, 1:].abs()
        most = effects.amax(-1, keepdim=True)
        there = (effects >= salient * most) & (most > 0)
        seen.append(_counted(there))
        orders.append((there * subsets[1:].sum(-1)).sum(-1))
        if progress is not None:
            progress(row + 1, len(data), WHAT)
    counted = torch.stack(seen, -1)
    number, new, forgotten, kept = counted
    total = number.sum(-1).clamp(min=1)
    return mean_scores(
        "interactions", "salient sets of tokens", number.tolist(), [1] * len(data), data, stack=found.name,
        tokens=len(data), removal=False,
        notes=(f"of up to {2**tokens - 1} sets of {tokens} tokens in front of one prediction in each sequence",),
        detail={
            "new": new.mean(-1).tolist(), "forgotten": forgotten.mean(-1).tolist(),
            "kept": (kept.sum(-1) / total).tolist(), "order": (torch.stack(orders, -1).sum(-1) / total).tolist(),
        },
    )  # fmt: skip


def _dividends(worth: torch.Tensor) -> torch.Tensor:
    """I(S) from v(S), [..., 2^n] each; token k is in the set of number s where bit k of s is 1."""
    found = worth.clone()
    for bit in range(worth.shape[-1].bit_length() - 1):
        halves = found.unflatten(-1, (-1, 2, 1 << bit))
        halves[..., 1, :] -= halves[..., 0, :]
    return found


def _subsets(count: int) -> torch.Tensor:
    """[2^count, count]: which tokens are in each set."""
    return (torch.arange(1 << count)[:, None] >> torch.arange(count)) & 1


def _worth(whole: BoundPlan, ids: torch.Tensor, subsets: torch.Tensor, stack: str, rows: int) -> torch.Tensor:
    """ln(p / (1 - p)) of the last of `ids` behind each layer, float64 [depth, sets]."""
    executor, last = whole.executor(stack), len(ids) - 2
    text, target = ids[None, :-1], int(ids[-1])
    parts = []
    for some in subsets.split(rows):
        mask = torch.ones(len(some), len(ids) - 1, dtype=torch.long)
        mask[:, last - some.shape[1] : last] = some
        seen = _LastStates((len(some), len(ids) - 1))
        with executor.recording(seen):
            logits_of(whole.model, text.expand(len(some), -1), mask)
        behind = []
        for layer in range(executor.depth):
            with executor.between(executor.depth, seen.states[layer]):
                logits = logits_of(whole.model, text[:, -1:].expand(len(some), -1), None)[:, -1].cpu().double()
            own = logits[:, target].clone()
            logits[:, target] = -torch.inf
            behind.append(own - logits.logsumexp(-1))  # 1 - p has no digits left where p is nearly 1
        parts.append(torch.stack(behind))
    return torch.cat(parts, -1)


def _counted(there: torch.Tensor) -> torch.Tensor:
    """Of each layer how many sets are salient, new, forgotten and there to the end, float64 [4, depth]."""
    below = torch.cat([torch.zeros_like(there[:1]), there[:-1]])
    kinds = (there, there & ~below, below & ~there, there & there[-1:])
    return torch.stack([kind.sum(-1, dtype=torch.float64) for kind in kinds])


class _LastStates(Recorder):
    """Keeps what each layer makes at the last place, [batch, 1, hidden]."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self.states: dict[int, torch.Tensor] = {}

    def ran(self, record: RunRecord) -> None:
        require_token_axis(record.output, self.size, record.run.layer)
        self.states[record.run.layer] = record.output[:, -1:].clone()
