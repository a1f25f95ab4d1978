"""What one forward shows, and the two sides that are shown the same tokens: the student and its teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from shoal.deciding.bound_policy import BoundPolicy, bind_policy
from shoal.deciding.learning import Learning
from shoal.deciding.policy_text import make_policy
from shoal.executing.bind import BoundPlan
from shoal.executing.executor import Executor
from shoal.executing.exit_readout import Readout
from shoal.executing.forward import Forward
from shoal.executing.inputs import backbone_of, inputs_of, run_stack
from shoal.executing.recorder import Recorder, RunRecord
from shoal.executing.weights import Tensors
from shoal.models.opened import OpenedModel
from shoal.plan import Exit, Plan

Around = Callable[[], AbstractContextManager[object]]


class Shown(Recorder):
    """The hidden states of one forward, [batch, tokens, hidden] each."""

    def __init__(self) -> None:
        self.behind: dict[int, torch.Tensor] = {}
        """By base layer what its latest run made."""
        self.first: torch.Tensor
        """What enters the first layer."""
        self.last: torch.Tensor
        """What norm and head are given, and behind it along the last dimension other states that a head reads."""
        self.gated: dict[str, RunRecord] = {}
        """By gate what the run behind it was given and made, where it was called."""
        self.exits: dict[str, torch.Tensor] = {}
        """By exit the state that comes to it."""
        self.depths: dict[int, torch.Tensor] = {}
        """By base layer the states that heads of the plan read."""

    def enters(self, layer: int, hidden: torch.Tensor) -> None:
        if layer == 0:
            self.first = hidden

    def ran(self, record: RunRecord) -> None:
        self.behind[record.run.layer] = record.output
        if record.run.gate is not None:
            self.gated[record.run.gate] = record

    def reaches(self, step: Exit, hidden: torch.Tensor) -> None:
        self.exits[step.name] = hidden

    def noted(self, behind: Mapping[int, torch.Tensor]) -> None:
        self.depths = dict(behind)

    def leaves(self, hidden: torch.Tensor) -> None:
        self.last = hidden

    def entering(self, layer: int) -> torch.Tensor:
        """The state in front of a base layer, of a forward in which every layer runs in order."""
        return self.first if layer == 0 else self.behind[layer - 1]


class Side:
    """A model under a plan that is put on for the length of a call, and taken away behind it."""

    def __init__(
        self, bound: BoundPlan, stack: str, around: Around = nullcontext, deciding: BoundPolicy | None = None
    ) -> None:
        """`around` stands around each call: modes, adapters. `deciding`: who decides about the plan's gates."""
        self.bound, self.stack, self.around, self.deciding = bound, bound.opened.stack(stack), around, deciding
        self.learning = Learning()
        """The training step, as that policy is told of it."""
        self._readout: Readout | None = None

    def remove(self) -> None:
        """The policy does not listen any more."""
        if self.deciding is not None:
            self.deciding.remove()

    @property
    def opened(self) -> OpenedModel:
        """The model with what is known of it."""
        return self.bound.opened

    @property
    def executor(self) -> Executor:
        """What runs the plan's steps."""
        return self.bound.executor(self.stack.name)

    def show(self, ids: torch.Tensor, mask: torch.Tensor | None, written: torch.Tensor | None = None) -> Shown:
        """What a forward over ids and mask [batch, tokens] shows; the head is not run. `written` says a policy which
        tokens count as generated (`ForwardView.written`)."""
        shown = Shown()
        if self.deciding is not None and (gated := self.deciding.executor) is not None:
            gated.inputs, gated.learning, gated.written = (ids, mask), self.learning, written
        with self.around(), self.bound.running(), self.executor.recording(shown):
            run_stack(self.opened.model, self.stack, ids, mask)
        shown.last = torch.cat([shown.last, *(shown.depths[depth] for depth in self._head[1])], -1)
        return shown

    def prepared(self, ids: torch.Tensor, mask: torch.Tensor | None) -> Forward:
        """What the stock forward calls each layer with."""
        backbone = backbone_of(self.opened.model, self.stack)
        more = {"use_cache": False} if self.stack.name == "decoder" else {}
        with self.around(), self.bound.running():
            return self.executor.prepared(lambda: backbone(**inputs_of(backbone, ids, mask), **more))

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """What norm and head make of states as `Shown.last` has them, [batch, tokens, hidden] and more, [batch, tokens,
        vocabulary]."""
        return self._logits(states, *self._head)

    def _logits(self, states: torch.Tensor, head: str, depths: tuple[int, ...]) -> torch.Tensor:
        state, *others = states.chunk(1 + len(depths), -1)
        return self._read(state, head, dict(zip(depths, others, strict=True)))

    def at_exit(self, shown: Shown, step: Exit) -> torch.Tensor:
        """What `exit_logits` is given at an exit: what its head makes of the states of a forward, [batch, tokens,
        hidden], and behind it along the last dimension the other states whose logits it reads."""
        state, heads = shown.exits[step.name], self.executor.heads
        if heads is None:
            return state
        state = heads.lens(step.head, heads.summed(step.head, state, shown.depths))
        return torch.cat([state, *(shown.depths[depth] for depth in heads.depths(step.head))], -1)

    def exit_logits(self, states: torch.Tensor, head: str = "base") -> torch.Tensor:
        """What norm and head, or those of the plan's own `head`, make of states behind any layer, as `at_exit` has
        them: logits [batch, tokens, vocabulary]."""
        return self._logits(states, head, () if self.executor.heads is None else self.executor.heads.depths(head))

    def _read(self, state: torch.Tensor, head: str, behind: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """The logits of a state by a head, which may read others `behind` layers."""
        if self._readout is None:
            self._readout = Readout(self.opened, self._ending)
        heads = self.executor.heads
        if heads is None:
            with self.around():
                return self._readout(state)
        # where the stock forward is run to read the state, it puts the plan on itself
        on = nullcontext() if self._readout.chain is None else self.bound.running()
        with self.around(), on, heads.only(head, dict(behind)):
            return self._readout(state)

    def learning_head(self, head: str | None = None) -> list[torch.Tensor]:
        """The tensors that learn of what makes logits of a state: of this head, None: of that at the end."""
        heads = self.executor.heads
        found = [] if heads is None else heads.scoring(self._head[0] if head is None else head)
        return [tensor for tensor in found if tensor.requires_grad]

    @property
    def _head(self) -> tuple[str, tuple[int, ...]]:
        """The head at the end of the plan, and the depths of which it reads logits beside the last."""
        heads, last = self.executor.heads, self.executor.steps[-1]
        if heads is None or not isinstance(last, Exit) or last.gate is not None:
            return "base", ()
        return last.head, heads.depths(last.head)

    @contextmanager
    def _ending(self, state: torch.Tensor) -> Iterator[None]:
        with self.bound.running(), self.executor.between(begin=self.stack.depth, state=state):
            yield


def side_of(
    opened: OpenedModel, plan: Plan, weights: Tensors, stack: str, policy: str = "", around: Around = nullcontext
) -> Side:
    """A legal plan as a side, with the policy, as typed, that decides at its gates."""
    if not policy:
        return Side(BoundPlan(opened, plan, weights), stack, around)
    bound, deciding = bind_policy(opened, plan, weights, make_policy(policy, plan, opened.spec))
    bound.rest()
    return Side(bound, stack, around, deciding)
