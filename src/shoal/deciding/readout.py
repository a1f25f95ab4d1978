"""What the model would say if it stopped at a hidden state: its own final norm and head, found by probing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from shoal.deciding.gates import Sight
from shoal.errors import UsageError
from shoal.executing.inputs import input_device
from shoal.executing.weights import Tensors
from shoal.models.evaluating import evaluating
from shoal.models.stacks import Stack
from shoal.plan import Exit, Plan

ELEMENTS = 1 << 24
"""Logits held at a time."""


class Readout:
    """logits [batch, tokens, vocabulary] of hidden states [batch, tokens, hidden] as the last layer would hand them on.

    Where the modules behind the last layer, one after the other, give the model's logits bit for bit, they are called.
    Where the forward does more (a scale, a soft cap), the stock forward itself runs with layers that hand on the state.
    """

    def __init__(self, model: Any, stack: Stack, ending: Callable[[torch.Tensor], Any]) -> None:
        """`ending(state)` is a context in which the layers of `model` hand on `state`. Runs `model` on one token."""
        self.model, self.ending = model, ending
        self.chain = _chain(model, stack)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        if self.chain is not None:
            for module in self.chain:
                states = module(states)
            return states
        shape = states.shape[-3:-1]
        ids = torch.zeros(shape, dtype=torch.long, device=states.device)
        with self.ending(states):
            logits: torch.Tensor = self.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
            ).logits
        return logits


def _chain(model: Any, stack: Stack) -> list[nn.Module] | None:
    called: list[tuple[nn.Module, Any, Any]] = []
    last: list[Any] = []

    def note(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if last:
            called.append((module, args[0] if args else None, out))

    def begin(_: nn.Module, __: Any, out: Any) -> None:
        last[:] = [out[0] if isinstance(out, tuple) else out]

    inside = {id(module) for layer in (stack.layer(i) for i in range(stack.depth)) for module in layer.modules()}
    around = [
        module for module in model.modules() if id(module) not in inside and not isinstance(module, nn.ModuleList)
    ]
    handles = [module.register_forward_hook(note) for module in around]
    handles.append(stack.layer(stack.depth - 1).register_forward_hook(begin))
    try:
        ids = torch.zeros((1, 1), dtype=torch.long, device=input_device(model))
        with evaluating(model):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    state, chain = last[0], []
    for module, given, out in called:
        if given is state and isinstance(out, torch.Tensor):
            chain.append(module)
            state = out
    if state.shape != logits.shape or not torch.equal(state, logits):
        return None
    state = last[0]
    with evaluating(model):
        for module in chain:
            state = module(state)
    return chain if torch.equal(state, logits) else None


class Heads:
    """Own heads and lenses of a plan's exits.

    `ID.lens` [hidden, hidden] and `ID.lens_bias` [hidden]: an affine map in front of the model's own norm and head (a
    tuned lens). `ID.weight` [vocabulary, hidden] and `ID.bias` [vocabulary]: a head behind the model's own final norm.
    `ID.probe` [hidden] and `ID.probe_bias` [1]: how likely it is that the exit is right, from the state alone.
    """

    def __init__(self, model: Any, weights: Tensors) -> None:
        self.weights = weights
        self.now: list[tuple[torch.Tensor | bool, str]] = []
        """(which tokens, whose head) for the tokens that the head is called for next."""
        self._placed: dict[tuple[torch.device, torch.dtype], dict[str, torch.Tensor]] = {}
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

    def probe(self, head: str, hidden: torch.Tensor) -> torch.Tensor:
        """sigmoid(w . x / rms(x) + b), [batch, tokens], float32."""
        weight, bias = self._near(hidden, head, "probe", "probe_bias")
        assert weight is not None  # U623 was raised before anything ran
        assert bias is not None
        return (scaled(hidden) @ weight.float() + bias.float()).sigmoid()

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
        several devices. They are brought there once."""
        key = state.device, state.dtype
        if key not in self._placed:
            self._placed[key] = {}
        placed = self._placed[key]
        for name in names:
            full = f"{head}.{name}"
            if full not in placed and full in self.weights:
                placed[full] = self.weights[full].to(state.device, state.dtype)
        return tuple(placed.get(f"{head}.{name}") for name in names)

    def _own(self, _: nn.Module, args: tuple[Any, ...], logits: torch.Tensor) -> torch.Tensor | None:
        for where, head in self.now:
            weight, bias = self._near(args[0], head, "weight", "bias")
            assert weight is not None  # owned
            own = nn.functional.linear(args[0], weight, bias)
            if isinstance(where, bool):
                logits = own
            else:  # generate asks for the logits of the last columns only
                logits = torch.where(where.to(own.device)[:, -logits.shape[-2] :, None], own, logits)
        return logits if self.now else None


class Look(Sight):
    """A sight whose head runs once, in pieces, when somebody asks for something that needs it."""

    def __init__(
        self,
        hidden: torch.Tensor,
        before: torch.Tensor | None,
        read: Callable[[torch.Tensor], torch.Tensor],
        probe: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.hidden, self.before, self._read, self._probe = hidden, before, read, probe
        self._found: dict[str, torch.Tensor] = {}

    def read(self, what: str) -> torch.Tensor:
        if what == "saturation":
            return _cosine(self.before, self.hidden)
        if what == "probe":
            assert self._probe is not None  # U623 was raised before anything ran
            return self._probe(self.hidden)
        if not self._found:
            self._found = self._looked()
        return self._found[what]

    def _looked(self) -> dict[str, torch.Tensor]:
        found: list[dict[str, torch.Tensor]] = []
        tokens, step = self.hidden.shape[-2], 0
        at = 0
        while at < tokens:
            # the first column tells how long a column of logits is
            states = self.hidden[..., at : at + max(1, step), :]
            logits = self._read(states).float()
            found.append(confidence_of(logits))
            at += states.shape[-2]
            step = max(1, ELEMENTS // (logits.shape[0] * logits.shape[-1]))
        return {name: torch.cat([one[name] for one in found], -1) for name in found[0]}


def scaled(hidden: torch.Tensor) -> torch.Tensor:
    """States [..., hidden] in float32, with a root mean square of 1."""
    state = hidden.float()
    found: torch.Tensor = state * state.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
    return found


def has_probes(plan: Plan, weights: Tensors) -> bool:
    """Whether every exit of `plan` has a probe."""
    heads = {step.head for step in plan.steps() if isinstance(step, Exit)}
    return bool(heads) and all(f"{head}.{part}" in weights for head in heads for part in ("probe", "probe_bias"))


def require_probes(plan: Plan, weights: Tensors, by: str) -> None:
    """Raise U623 for by=probe at exits without one."""
    if by == "probe" and not has_probes(plan, weights):
        raise UsageError(
            "by=probe reads a probe at every exit, and this plan has none; fit them with shoal fit-exits, and give "
            "the plan that it writes",
            code="U623",
        )


def confidence_of(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """What policies read off logits [..., vocabulary]: "probability", "margin", "certainty" and "choice", [...]."""
    logs = logits.log_softmax(-1)
    top = logs.topk(2, -1)
    first, second = top.values.exp().unbind(-1)
    entropy = -(logs.exp() * logs).sum(-1)
    return {
        "probability": first,
        "margin": first - second,
        "certainty": 1 - entropy / math.log(logits.shape[-1]),
        "choice": top.indices[..., 0],
    }


def _cosine(before: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor:
    """Cosine of each token's state to the one a layer before, in float32; no layer before: 0."""
    if before is None:
        return hidden.new_zeros(hidden.shape[-3:-1])
    found = nn.functional.cosine_similarity(before.float(), hidden.float(), dim=-1)
    return found if found.dim() == 2 else found.mean(0)
