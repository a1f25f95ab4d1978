"""Heads, lenses and probes that a plan's exits have of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from shoal.errors import UsageError
from shoal.executing.looked_up import Converted
from shoal.executing.weights import Tensors
from shoal.plan import Plan
from shoal.plan.select import exits


class Heads:
    """Own heads and lenses of a plan's exits.

    `ID.lens` [hidden, hidden] and `ID.lens_bias` [hidden]: an affine map in front of the model's own norm and head (a
    tuned lens). `ID.weight` [vocabulary, hidden] and `ID.bias` [vocabulary]: a head behind the model's own final norm.
    `ID.probe` [hidden] and `ID.probe_bias` [1]: how likely it is that the exit is right, from the state alone.
    `ID.halting` [hidden] and `ID.halting_bias` [1]: a halting unit, how much of a token's answer comes from here.
    """

    def __init__(self, model: Any, weights: Tensors, paused: Callable[[], bool] = lambda: False) -> None:
        """While `paused` says so the model's head answers for all tokens."""
        self.weights, self._paused = weights, paused
        self.now: list[tuple[torch.Tensor | bool, str]] = []
        """(which tokens, whose head) for the tokens that the head is called for next."""
        self._converted = Converted()
        self.head = model.get_output_embeddings()
        self.handle = self.head.register_forward_hook(self._own) if self.head is not None else None

    def remove(self) -> None:
        """Take the hook away."""
        if self.handle is not None:
            self.handle.remove()

    def lens(self, head: str, hidden: torch.Tensor) -> torch.Tensor:
        """The state that final norm and head read at an exit with this head."""
        lens, bias = self._near(hidden, head, "lens", "lens_bias")
        return hidden if lens is None else nn.functional.linear(hidden, lens, bias)

    def unit(self, head: str, name: str, hidden: torch.Tensor) -> torch.Tensor:
        """[batch, tokens], float32: sigmoid(w . x / rms(x) + b) for the unit "probe", sigmoid(w . x + b) for
        "halting"."""
        state = scaled(hidden) if name == "probe" else hidden.float()
        weight, bias = self._near(hidden, head, name, f"{name}_bias")
        assert weight is not None  # U623 or U684 was raised before anything ran
        assert bias is not None
        found = (state @ weight.float() + bias.float()).sigmoid()
        return found if found.dim() == 2 else found.mean(0)

    def owned(self, head: str) -> bool:
        """Whether a head's own matrix is given."""
        return f"{head}.weight" in self.weights

    @contextmanager
    def only(self, head: str) -> Iterator[None]:
        """Meanwhile this head answers for all tokens."""
        before = self.now
        self.now = [(True, head)] if self.owned(head) else []
        try:
            yield
        finally:
            self.now = before

    def _near(self, state: torch.Tensor, head: str, *names: str) -> tuple[torch.Tensor | None, ...]:
        """Tensors of a head where the state is and in its dtype: the layers of one model, and its head, may be on
        several devices."""
        found = ((full, self.weights.get(full)) for full in (f"{head}.{name}" for name in names))
        return tuple(None if t is None else self._converted(n, t, state.device, state.dtype) for n, t in found)

    def _own(self, _: nn.Module, args: tuple[Any, ...], logits: torch.Tensor) -> torch.Tensor | None:
        if self._paused():
            return None
        for where, head in self.now:
            weight, bias = self._near(args[0], head, "weight", "bias")
            assert weight is not None  # owned
            own = nn.functional.linear(args[0], weight, bias)
            if isinstance(where, bool):
                logits = own
            else:  # generate asks for the logits of the last columns only
                logits = torch.where(where.to(own.device)[:, -logits.shape[-2] :, None], own, logits)
        return logits if self.now else None


def scaled(hidden: torch.Tensor) -> torch.Tensor:
    """States [..., hidden] in float32, with a root mean square of 1."""
    state = hidden.float()
    found: torch.Tensor = state * state.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
    return found


def has_probes(plan: Plan, weights: Tensors) -> bool:
    """Whether every exit of `plan` has a probe."""
    heads = {step.head for step in exits(plan.steps())}
    return bool(heads) and all(_has_unit(head, "probe", weights) for head in heads)


def _has_unit(head: str, name: str, weights: Tensors) -> bool:
    return f"{head}.{name}" in weights and f"{head}.{name}_bias" in weights


def require_units(plan: Plan, weights: Tensors, by: str) -> None:
    """Raise U623 for by=probe at exits without one, U684 for heads without the halting unit that a policy reads."""
    heads = {step.head for step in exits(plan.steps())} - {"base"}
    if by == "halting" and (without := sorted(head for head in heads if not _has_unit(head, by, weights))):
        raise UsageError(
            f"{without[0]} has no halting unit: {without[0]}.halting and {without[0]}.halting_bias are not among the "
            "plan's tensors; give them, or an exit without a head",
            code="U684",
        )
    if by == "probe" and not has_probes(plan, weights):
        raise UsageError(
            "by=probe reads a probe at every exit, and this plan has none; fit them with shoal fit-exits, and give "
            "the plan that it writes",
            code="U623",
        )
