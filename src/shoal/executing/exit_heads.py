"""Heads, lenses and probes that a plan's exits have of their own, and what they read of the states of other depths."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from shoal.errors import PlanError
from shoal.executing.depth_sum import Behind, depth_sum
from shoal.executing.exit_readout import chain_of
from shoal.executing.looked_up import Converted
from shoal.executing.weights import Tensors
from shoal.models.kinds import is_causal
from shoal.models.lists import Stack
from shoal.models.opened import OpenedModel
from shoal.plan import Exit, Step
from shoal.plan.heads import KEEPS, LOGITS, PLAUSIBLE, READS, before_exits, depths_in
from shoal.plan.select import exits


class _Now(threading.local):
    """What the head is called for next, in each thread that calls the model."""

    def __init__(self) -> None:
        self.now: list[tuple[torch.Tensor | bool, str]] = []
        self.behind: Behind = {}
        self.alone = False

    def __deepcopy__(self, memo: dict[int, Any]) -> _Now:
        return _Now()


class Heads:
    """Own heads and lenses of a plan's exits.

    `ID.keeps` [1] and `ID.reads.N` ([1], [hidden] or [hidden, hidden]): in place of its state x an exit reads
    keeps x + sum_N reads.N h_N, h_N the state behind layer N, -1 for what came in; without `keeps` x itself is kept.
    `ID.lens` [hidden, hidden] and `ID.lens_bias` [hidden]: an affine map in front of the model's own norm and head (a
    tuned lens). `ID.weight` [vocabulary, hidden] and `ID.bias` [vocabulary]: a head behind the model's own final norm.
    `ID.logits.N` [vocabulary]: in place of logits sum_N logits.N log p_N, p_N what norm and head say of h_N, of the
    layer in front of the exit what they say of the exit's own state. `ID.plausible` [1]: beside these, what the exit's
    own state finds less likely than so many times its likeliest token scores minus infinity.
    `ID.probe` [hidden] and `ID.probe_bias` [1]: how likely it is that the exit is right, from the state alone.
    `ID.halting` [hidden] and `ID.halting_bias` [1]: a halting unit, how much of a token's answer comes from here.
    """

    def __init__(
        self,
        model: Any,
        weights: Tensors,
        paused: Callable[[], bool] = lambda: False,
        chain: list[nn.Module] | None = None,
        ends: Mapping[str, frozenset[int]] | None = None,
    ) -> None:
        """While `paused` says so the model's head answers for all tokens. `chain`: the modules from the last state to
        logits, where heads read logits of several depths; `ends`: by head the layers in front of its exit."""
        self.weights, self._paused, self._chain, self._ends = weights, paused, chain or [], dict(ends or {})
        self._local = _Now()
        self._known: dict[tuple[str, str], tuple[int, ...]] = {}
        self._converted = Converted()
        self.head = model.get_output_embeddings()
        self.handle: Any = None

    @property
    def now(self) -> list[tuple[torch.Tensor | bool, str]]:
        """(which tokens, whose head) for the tokens that the head is called for next."""
        return self._local.now

    @now.setter
    def now(self, heads: list[tuple[torch.Tensor | bool, str]]) -> None:
        self._local.now = heads

    def put(self) -> None:
        """From now on heads of the plan answer where `now` says so."""
        if self.head is not None and self.handle is None:
            self.handle = self.head.register_forward_hook(self._own)

    def remove(self) -> None:
        """Take the hook away."""
        if self.handle is not None:
            self.handle.remove()
        self.handle = None
        self.now, self._local.behind = [], {}

    def answers_for(self, heads: list[tuple[torch.Tensor | bool, str]], behind: Behind) -> None:
        """The head is called next for tokens of these heads; the others are the model's own."""
        self.now = [(where, head) for where, head in heads if self.owned(head)]
        self._local.behind = behind if self.now else {}

    def summed(self, head: str, hidden: torch.Tensor, behind: Behind) -> torch.Tensor:
        """What an exit with this head has for its state: keeps x + sum_N reads.N h_N. Raises P165 in a forward in which
        one of them has no state."""
        (keeps,) = self._near(hidden, head, KEEPS)
        read = []
        for depth in self._named(head, READS):
            (weight,) = self._near(hidden, head, f"{READS}.{depth}")
            assert weight is not None  # it is among the names
            read.append((weight, _state(head, depth, behind)))
        return depth_sum(hidden, keeps, read)

    def lens(self, head: str, hidden: torch.Tensor) -> torch.Tensor:
        """The state that final norm and head read at an exit with this head."""
        lens, bias = self._near(hidden, head, "lens", "lens_bias")
        return hidden if lens is None else nn.functional.linear(hidden, lens, bias)

    def at_the_end(self, head: str, hidden: torch.Tensor, behind: Behind) -> torch.Tensor:
        """The state that final norm and head read at the end of a plan with this head, which answers for all tokens."""
        self.answers_for([(True, head)], behind)
        return self.lens(head, self.summed(head, hidden, behind))

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
        """Whether a head's own matrix is given, or what it makes of logits of several depths."""
        return f"{head}.weight" in self.weights or bool(self._named(head, LOGITS))

    def scoring(self, head: str) -> list[torch.Tensor]:
        """The tensors with which this head makes scores of states."""
        names = [f"{head}.{name}" for name in ("weight", "bias")]
        names += [f"{head}.{LOGITS}.{depth}" for depth in self._named(head, LOGITS)]
        return [self.weights[name] for name in names if name in self.weights]

    def depths(self, head: str) -> tuple[int, ...]:
        """The layers of whose states, beside the exit's own, this head reads logits."""
        found = self._named(head, LOGITS)
        return tuple(depth for depth in found if depth not in self._ends.get(head, ()))

    @contextmanager
    def only(self, head: str, behind: Behind | None = None) -> Iterator[None]:
        """Meanwhile this head answers for all tokens; `behind` has the states of these tokens."""
        before = self.now, self._local.behind
        self.answers_for([(True, head)], behind or {})
        try:
            yield
        finally:
            self.now, self._local.behind = before

    def _named(self, head: str, what: str) -> tuple[int, ...]:
        """The depths of the tensors HEAD.WHAT.N. Names are found once, tensors at each use."""
        if (head, what) not in self._known:
            self._known[head, what] = depths_in(head, what, self.weights)
        return self._known[head, what]

    def _near(self, state: torch.Tensor, head: str, *names: str) -> tuple[torch.Tensor | None, ...]:
        """Tensors of a head where the state is and in its dtype: the layers of one model, and its head, may be on
        several devices."""
        found = ((full, self.weights.get(full)) for full in (f"{head}.{name}" for name in names))
        return tuple(None if t is None else self._converted(n, t, state.device, state.dtype) for n, t in found)

    def _own(self, _: nn.Module, args: tuple[Any, ...], logits: torch.Tensor) -> torch.Tensor | None:
        if self._paused() or self._local.alone or not self.now:
            return None
        for where, head in self.now:
            own = self._answer(head, args[0], logits)
            if isinstance(where, bool):
                logits = own
            else:  # generate asks for the logits of the last columns only
                logits = torch.where(where.to(own.device)[:, -logits.shape[-2] :, None], own, logits)
        return logits

    def _answer(self, head: str, state: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """What this head says, of the exit's own state behind the final norm and the model's logits of it."""
        weight, bias = self._near(state, head, "weight", "bias")
        own = logits if weight is None else nn.functional.linear(state, weight, bias)
        depths = self._named(head, LOGITS)
        if not depths:
            return own
        likely, total = own.float().log_softmax(-1), torch.zeros((), device=own.device)
        for depth in depths:
            scores = likely
            if depth in self.depths(head):
                there = _state(head, depth, self._local.behind)[..., -own.shape[-2] :, :]
                scores = self._said(there, weight, bias).float().log_softmax(-1).to(own.device)
            (share,) = self._near(likely, head, f"{LOGITS}.{depth}")
            assert share is not None  # it is among the names
            total = total + share * scores
        (least,) = self._near(likely, head, PLAUSIBLE)
        if least is not None:
            total = total.masked_fill(likely < likely.amax(-1, keepdim=True) + least.log(), -torch.inf)
        return total.to(own.dtype)

    def _said(self, state: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        """The logits of a state behind some layer."""
        for module in self._chain[:-1]:
            state = module(state)
        if weight is not None:
            return nn.functional.linear(state, weight, bias)
        self._local.alone = True
        try:
            found: torch.Tensor = self._chain[-1](state)
        finally:
            self._local.alone = False
        return found


def heads_of(
    opened: OpenedModel,
    stack: Stack,
    steps: tuple[Step, ...],
    weights: Tensors,
    paused: Callable[[], bool] = lambda: False,
) -> Heads | None:
    """The heads of the exits among these steps; None where none has one of its own. The model must be whole.

    Raises P166 for a matrix of a head, or logits of several depths, where the stack is not a decoder with next-token
    scores, and for logits where the model does more than its final norm and head with the last state.
    """
    own = [step for step in exits(steps) if step.head != "base"]
    if not own:
        return None
    chain: list[nn.Module] | None = None
    model: Any = opened.model
    scores = is_causal(model) and not model.config.is_encoder_decoder and model.get_output_embeddings() is not None
    for step in own:
        several = bool(depths_in(step.head, LOGITS, weights))
        if (several or f"{step.head}.weight" in weights) and not scores:
            raise _unread(step, "the scores of a causal decoder, and this stack has none")
        if several:
            chain = chain_of(opened)
            if chain is None or chain[-1] is not model.get_output_embeddings():
                raise _unread(step, "norm and head as plain modules, and this model does more with its last state")
    return Heads(model, weights, paused, chain, before_exits(steps))


def _unread(step: Exit, why: str) -> PlanError:
    return PlanError(
        f"the head {step.head} of exit {step.name} needs {why}; give it sums of states ({step.head}.{READS}.N) alone",
        code="P166",
    )


def _state(head: str, depth: int, behind: Behind) -> torch.Tensor:
    if depth not in behind:
        raise PlanError(
            f"{head} reads the state behind layer {depth}, and this forward begins behind it, or runs one step alone; "
            "run the plan whole",
            code="P165",
        )
    return behind[depth]


def scaled(hidden: torch.Tensor) -> torch.Tensor:
    """States [..., hidden] in float32, with a root mean square of 1."""
    state = hidden.float()
    found: torch.Tensor = state * state.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
    return found
