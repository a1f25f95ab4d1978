"""What a policy answers: one bool for the whole pass, or one for each token; and the logic of such answers."""

from __future__ import annotations

import torch

Decision = bool | torch.Tensor
"""True or False for the whole pass, or bool [batch or 1, tokens]. Only a bool lets a layer not be called at all."""


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


def over_states(decision: Decision, hidden: torch.Tensor) -> torch.Tensor:
    """A decision that is no bool, as [batch or 1, tokens, 1] on the device of `hidden`, to be laid over its states."""
    assert isinstance(decision, torch.Tensor)
    return decision.to(hidden.device)[..., None]


def select(where: Decision, then: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """The states `then` for the tokens of the decision and `otherwise` for the others, [..., batch, tokens, hidden].

    The layers of one model may be on several devices: the answer is where `then` is.
    """
    if isinstance(where, bool):
        return then if where else otherwise
    return torch.where(over_states(where, then), then, otherwise.to(then.device))
