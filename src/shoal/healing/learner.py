"""The module that is trained: its forward is the whole objective, so that hooks of DDP and FSDP see one forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import nn

from shoal.data import Data
from shoal.deciding.gating import ungated
from shoal.deciding.policy_text import make_policy
from shoal.errors import UsageError
from shoal.executing.bind import bind
from shoal.healing.averages import Averages
from shoal.healing.fading import Fading, with_removed
from shoal.healing.moving import LearnJob, Moving, Tensors, nothing_moves
from shoal.healing.seen import Seen
from shoal.healing.shown import Around, Side, side_of
from shoal.healing.shuffling import Shuffling
from shoal.healing.stage import Selection, Term
from shoal.healing.windows import NOT_COUNTED
from shoal.models.evaluating import evaluating, keeping_modes
from shoal.models.opened import OpenedModel
from shoal.plan import Plan
from shoal.plan.steps import decides


class Learner(nn.Module):
    """A plan that learns on a model whose own tensors stand still; its teacher is the same model without the plan and
    without adapters, or another one of the same vocabulary."""

    accepts_loss_kwargs = True
    """transformers' Trainer hands `num_items_in_batch` to the forward."""

    def __init__(
        self,
        student: Side,
        teacher: Side,
        movings: Sequence[Moving],
        terms: Sequence[Term],
        own_terms: Sequence[Term] = (),
    ) -> None:
        super().__init__()
        self.model: nn.Module = student.opened.model
        own = {name: p for moving in movings for name, p in moving.parameters.items()}
        inside = {id(p) for p in self.model.parameters()}
        self.own = nn.ParameterList([p for p in own.values() if id(p) not in inside])
        self.moving_tensors, self.movings, self.terms = own, list(movings), list(terms)
        self.own_terms = list(own_terms)
        """Those of the windows that the plan wrote itself; none: `terms`, as of the others."""
        self.start: Tensors = {}
        """The tensors that the plan named before."""
        self.sides = (student, teacher)
        self.fading: Fading | None = None
        self.shuffling: Shuffling | None = None
        self.averages = Averages()
        self.policy = ""
        """Who decides about what has learned, as typed; "" for nobody."""
        self.decided = False
        """Whether the plan had gates or exits before, which stay."""
        self.parts: dict[str, torch.Tensor] = {}
        """Each term's share of the last loss, weighted."""

    def forward(
        self,
        ids: torch.Tensor,
        shift_labels: torch.Tensor,
        labels: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        own: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> dict[str, torch.Tensor]:
        """`loss`: the weighted sum of the terms over the columns of ids [batch, tokens] that count, divided by
        `num_items_in_batch`, the columns that count in all micro-batches and processes of the step (None: in these).

        `shift_labels` [batch, tokens] holds what each column predicts, -100 where it does not count; `own` [batch] says
        which windows the plan wrote itself.
        """
        items = shift_labels.ne(NOT_COUNTED).sum() if num_items_in_batch is None else num_items_in_batch
        sums = dict[str, Any]()
        for terms, rows in self._parted(own):
            cut = None if mask is None else mask[rows]
            seen = Seen(*self.sides, ids[rows], cut, shift_labels[rows], self.averages)
            with self.precision(), self._order(ids):
                for term in terms:
                    value = term.weight * term.function(seen, **term.options)
                    sums[term.text] = sums[term.text] + value if term.text in sums else value
        self.parts = {name: (value / items).detach() for name, value in sums.items()}
        total: torch.Tensor = sum(sums.values())
        return {"loss": total / items}

    def _parted(self, own: torch.Tensor | None) -> list[tuple[list[Term], Any]]:
        """Terms, with the rows of the batch that they read."""
        if own is None or not self.own_terms or not bool(own.any()):
            return [(self.terms, slice(None))]
        return [(self.own_terms, own), *([] if bool(own.all()) else [(self.terms, ~own)])]

    def _order(self, ids: torch.Tensor) -> AbstractContextManager[None]:
        """The order in which layers run: drawn for each micro-batch in training, and by its tokens on held-out text, so
        that the objective is one of any order, and the same whenever it is looked at."""
        if self.shuffling is None:
            return nullcontext()
        return self.shuffling.drawn(self.sides[0].learning.seed if torch.is_grad_enabled() else int(ids.sum()))

    def precision(self) -> AbstractContextManager[Any]:
        """What learns is float32: autocast on an accelerator that has bfloat16, and where the base is smaller."""
        model, device = self.sides[0].opened.model, self.sides[0].opened.device
        small = model.dtype in (torch.bfloat16, torch.float16)
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        if not small and not fast:
            return nullcontext()
        return torch.autocast(device.type, model.dtype if small else torch.bfloat16)

    def copies(self) -> dict[str, torch.Tensor]:
        """What moves, as it is now, on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.moving_tensors.items()}

    @torch.no_grad()
    def put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give what moves these values. Raises U643 for other names or shapes."""
        if {n: t.shape for n, t in tensors.items()} != {n: p.shape for n, p in self.moving_tensors.items()}:
            raise UsageError(
                "the checkpoint holds other tensors than those that learn here; remove its folder, or go on with the "
                "plan and recipe that it is of",
                code="U643",
            )
        for name, parameter in self.moving_tensors.items():
            parameter.copy_(tensors[name].to(parameter.device))

    def finished(self) -> tuple[Plan, dict[str, torch.Tensor]]:
        """The plan with the tensors as they are now, those of all learners."""
        plan, tensors = self.sides[0].bound.plan, dict(self.start)
        for moving in self.movings:
            plan, tensors = moving.finish(tensors)
        return plan if self.policy or self.decided else ungated(plan), tensors


@contextmanager
def learning(
    opened: OpenedModel,
    plan: Plan,
    weights: Tensors,
    selections: Sequence[Selection],
    terms: Sequence[Term],
    own_terms: Sequence[Term] = (),
    *,
    stack: str,
    data: Data | None = None,
    teacher: OpenedModel | None = None,
    batch: int = 1,
    seed: int = 0,
    fade: bool = False,
    policy: str = "",
    shuffle: str = "",
) -> Iterator[Learner]:
    """A learner on the opened model, whose parameters, modules and modes are at the end as they were.

    `teacher`: another model in place of the whole student. `fade`: what the plan removes fades out meanwhile.
    `policy`: who decides at gates meanwhile, as typed. `shuffle`: all, or the layers whose order is drawn meanwhile.
    Raises U675 where nothing learns, U717 for layers that cannot be shuffled, and what the learners raise.
    """
    if shuffle and (fade or policy):
        raise UsageError(
            f"shuffle={shuffle} cannot go with {'layers that fade' if fade else f'the policy {policy}'}, whose places "
            "are those of the plan; make a stage of each",
            code="U717",
        )
    asked = [parameter for parameter in opened.model.parameters() if parameter.requires_grad]
    with ExitStack() as after:
        for parameter in asked:
            parameter.requires_grad_(False)
        after.enter_context(keeping_modes(opened.model))
        after.callback(_put_back, opened.model, asked)
        whole = bind(opened)  # before adapters are put in: they make it another model
        who = make_policy(policy, plan, opened.spec) if policy else None
        job = LearnJob(opened, plan if who is None else who.plan, weights, stack, data, batch, seed, who)
        movings = _movings(job, selections, after)
        last = movings[-1]
        running = with_removed(last.plan, stack) if fade else last.plan
        student = side_of(opened, running, last.weights, stack, policy)
        after.callback(student.remove)
        base = whole if teacher is None else bind(teacher)
        apart: list[Around] = [one.without for one in movings] if teacher is None else []
        fading = None
        if fade:
            fading = Fading([job.layer(index) for index in plan.dropped(stack)])
            after.enter_context(fading.installed())
            apart.append(fading.off)
        side = Side(base, stack, lambda: _several([lambda: evaluating(base.model, gradients=True), *apart]))
        learner = Learner(student, side, movings, terms, own_terms)
        learner.fading, learner.start = fading, weights
        learner.shuffling = Shuffling(student, shuffle) if shuffle else None
        learner.policy = "" if who is None or who.only_training else policy
        learner.decided = decides(plan.steps(stack))
        yield learner


def _movings(job: LearnJob, selections: Sequence[Selection], after: ExitStack) -> list[Moving]:
    """What each learner moves, the plan of one being the start of the next; the last one's plan has all of them."""
    found: list[Moving] = []
    for selection in sorted(selections, key=_comes_last):
        made: Moving = selection.entry.load()(job, **selection.options)
        after.callback(made.detach)
        if not made.parameters:
            raise nothing_moves(selection.text)
        found.append(replace(made, rate=selection.rate))
        job = replace(job, plan=made.plan, weights=made.weights)
    for moving in found:
        for parameter in moving.parameters.values():
            parameter.requires_grad_(True)
    return found


def _comes_last(selection: Selection) -> bool:
    """Whether its file says `COMES_LAST = True`: it adds to what the others move."""
    return bool(getattr(import_module(selection.entry.module), "COMES_LAST", False))


@contextmanager
def _several(makers: Sequence[Around]) -> Iterator[None]:
    with ExitStack() as stack:
        for make in makers:
            stack.enter_context(make())
        yield


def _put_back(model: nn.Module, asked: list[nn.Parameter]) -> None:
    wanted = {id(p) for p in asked}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)
        parameter.grad = None
