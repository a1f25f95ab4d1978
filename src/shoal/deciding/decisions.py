"""What a policy answers: one bool for the whole pass, or one for each token; with a weight where it learns; and the
logic of such answers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

Decision = bool | torch.Tensor
"""True or False for the whole pass, or bool [batch or 1, tokens]. Only a bool lets a layer not be called at all."""


@dataclass(frozen=True, slots=True, eq=False)
class Soft:
    """A decision that carries a weight, so that a gradient reaches whoever decides.

    `hard` is what the KV fill, the trace and the exits go by. At a run, out = x + weight (f(x) - x): 1 is the layer's
    output and 0 its input, bit for bit. Where the weight needs gradients, the layer is called for all tokens, so that a
    closed gate learns as well; otherwise for those of `hard` alone, and the others keep their state. At an exit the
    weight is the share of the token's last state that comes from here: norm and head read sum w_n x_n, and whoever
    leaves there, or reaches the end, takes all that is left from that state, so the shares add up to 1.
    """

    hard: Decision
    weight: torch.Tensor
    """Float [batch or 1, tokens]."""
    reads: torch.Tensor | None = None
    """At a run that is one of several of which a token takes one: the state that all of them read, [batch, tokens,
    hidden], in place of the one that is carried. Weights are 0 and 1 then: a token of `hard` has f(reads), any other
    keeps what is carried, and the gradient of the weight is that of carried + weight (f(reads) - reads)."""

    @property
    def learns(self) -> bool:
        """Whether a gradient of the weight is wanted."""
        return torch.is_grad_enabled() and self.weight.requires_grad


@dataclass(frozen=True, slots=True, eq=False)
class Reduced:
    """A decision by which those who run use a part of what the run has: fewer neurons, or fewer bits."""

    answer: Decision | Soft
    """Who runs at all."""
    share: torch.Tensor
    """How much of the run each of these uses, float [batch or 1, tokens], 0 to 1: the trace counts so much."""
    around: Callable[[nn.Module], AbstractContextManager[None]]
    """What stands around the call, given the layer as it is called, with the plan's own tensors in it."""
    spared: Callable[[], bool]
    """Whether, in the call that is over, what is not used was not computed either."""


def straight_through(hard: torch.Tensor, soft: torch.Tensor) -> Soft:
    """The decision `hard` (bool) with the gradient of `soft`: the weight is exactly 0 or 1."""
    return Soft(hard, soft + (hard.to(soft.dtype) - soft).detach())


def hard_of(answer: Decision | Soft) -> Decision:
    """Who runs or leaves, a bool where all do or none."""
    return collapse_uniform(answer.hard if isinstance(answer, Soft) else answer)


def logical_not(one: Decision) -> Decision:
    """Not `one`."""
    return not one if isinstance(one, bool) else ~one


def logical_and(one: Decision, other: Decision) -> Decision:
    """`one` and `other`; a bool where that decides it alone."""
    if isinstance(one, bool):
        return other if one else False
    if isinstance(other, bool):
        return one if other else False
    return one & other.to(one.device)


def and_not(one: Decision, other: Decision) -> Decision:
    """`one` and not `other`."""
    return logical_and(one, logical_not(other))


def logical_or(one: Decision, other: Decision) -> Decision:
    """`one` or `other`; a bool where that decides it alone."""
    return logical_not(and_not(logical_not(one), other))


def collapse_uniform(decision: Decision) -> Decision:
    """A bool where the tensor says the same for every token."""
    if isinstance(decision, bool):
        return decision
    return bool(decision.all()) or (decision if bool(decision.any()) else False)


def weight_of(answer: Decision | Soft, active: Decision, left: Decision) -> torch.Tensor | None:
    """What the change of a run is multiplied by, [batch or 1, tokens]: 0 for who has `left`, and for who is not
    `active` unless a gradient is wanted. None for a decision without a weight."""
    if not isinstance(answer, Soft):
        return None
    counted = logical_not(left) if answer.learns else active
    if isinstance(counted, bool):
        return answer.weight if counted else torch.zeros_like(answer.weight)
    return answer.weight * counted.to(answer.weight)


def over_states(decision: Decision, hidden: torch.Tensor) -> torch.Tensor:
    """A decision or weight of each token as [batch or 1, tokens, 1] on the device of `hidden`, to be laid over its
    states."""
    assert isinstance(decision, torch.Tensor)
    return decision.to(hidden.device)[..., None]


def select(where: Decision, then: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """The states `then` for the tokens of the decision and `otherwise` for the others, [..., batch, tokens, hidden].

    The layers of one model may be on several devices: the answer is where `then` is.
    """
    if isinstance(where, bool):
        return then if where else otherwise
    return torch.where(over_states(where, then), then, otherwise.to(then.device))


def taken(
    where: Decision, weight: torch.Tensor, out: torch.Tensor, read: torch.Tensor, carried: torch.Tensor
) -> torch.Tensor:
    """What is carried behind one of several runs that read one state: `out` for the tokens of `where` and `carried` for
    the others, bit for bit, with the gradient that `weight` [batch or 1, tokens] has as the share of `out` - `read`."""
    if not weight.requires_grad or not torch.is_grad_enabled():
        return select(where, out, carried)
    read, carried = read.to(out.device), carried.to(out.device)
    share = (weight - weight.detach()).to(device=out.device, dtype=out.dtype)[..., None]  # 0, with a gradient
    # whoever takes this one has taken none before: carried is read there, and their difference the other gradients
    return select(where, out + (carried - read), carried) + share * (out - read).detach()


def weighted(weight: torch.Tensor, then: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """`otherwise` + weight (`then` - `otherwise`), [..., batch, tokens, hidden] where `then` is; `weight` is [batch or
    1, tokens], and 0 and 1 give one of the two exactly."""
    share = weight.to(device=then.device, dtype=then.dtype)[..., None]
    return torch.lerp(otherwise.to(then.device), then, share)
