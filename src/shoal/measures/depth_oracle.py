"""Depth oracle: which layers a sequence, or a token, still needs when its cheapest good plan is known in advance."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch

from shoal.errors import UsageError
from shoal.evaluation.candidates import Candidates, compare_each
from shoal.evaluation.mean_scores import mean_scores
from shoal.evaluation.scoring import logits_of, token_nll
from shoal.evaluation.stats import ratio
from shoal.executing.inputs import require_whole
from shoal.models.kinds import require_causal
from shoal.models.opened import open_model
from shoal.models.precision import in_float64
from shoal.plan import Plan, check, drop, keep
from shoal.scores import Traits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shoal.data import Data
    from shoal.evaluation import Progress
    from shoal.plan import Spec
    from shoal.scores import Scores

TRAITS = Traits(null="none", least=False)
WHAT = "the depth oracle"
Side = tuple[torch.Tensor, torch.Tensor]
"""Of each predicted token its cross-entropy in nats and the first choice, [batch, length - 1] each."""


def depth_oracle(
    model: Any,
    data: Data,
    *,
    menu: Literal["even", "first", "greedy"] = "even",
    by: Literal["sequence", "token"] = "sequence",
    judge: Literal["loss", "choice"] = "loss",
    within: float = 0.0,
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """The share of sequences, or of tokens, whose cheapest plan that is as good as the whole model runs layer i.

    n_i = E_u[ i in S_u ], S_u the plan of the fewest layers in the menu with d_u(S) <= `within`, u a sequence or a
    token; the whole model where there is none. d_u(S), mean over the tokens of u: the rise of the cross-entropy in nats
    (`judge="loss"`), or the share of other first choices than the whole model's (`"choice"`). Menus: `"even"`, for each
    number of layers those at equal distances with both ends; `"first"`, the first so many (early exit); `"greedy"`, for
    each sequence the layers that are left when the one whose removal costs it least goes, as long as d_u stays within
    (a layer that may not go is always needed). The detail holds `layers`, the mean number of layers with its standard
    error, `change`, the mean of d_u(S_u), `fixed`, the fewest layers of one plan for the whole text with d <= `within`
    (greedy: chosen in the same way), and for the two menus without search `curve`, for each plan [layers, d, its error,
    share of u for which it is good enough]. A diagnostic: an oracle knows the answers, so no controller that is as good
    runs less out of the same menu.

    Source: Glavas et al. 2024 (arXiv 2410.20022), the oracle controller per sequence, uniform skipping and early exit.

    How we differ: only the abstract of the paper was at hand; the rise of the cross-entropy on given text judges, not
    the score of generated text, all layers of a plan are left out for the prompt too, and no exit was trained. By token
    each one is judged behind tokens that ran its plan as well, since what they would leave of their own plans depends
    on them all. Cost: one pass for each plan of the menu; greedy, as many for each sequence as the removed layers times
    the depth. Raises U691 for a greedy menu by token, U692 for a `within` that cannot be, M322 for a model without
    next-token scores, U507 while a plan is running.
    """
    if menu == "greedy" and by == "token":
        raise UsageError(
            "a greedy menu by token would be a search for every token; ask for by=sequence, or for menu=even",
            code="U691",
        )
    if not 0 <= within < (1 if judge == "choice" else math.inf):
        raise UsageError(
            f"within={within:g} is out of range for judge={judge}; use 0 or more, in nats for loss, and as a share "
            "less than 1 for choice",
            code="U692",
        )
    require_causal(model, WHAT)
    require_whole(model, WHAT, stack)
    spec, judged = open_model(model).spec, _Judged(model, judge, within)
    name, depth = spec.stack(stack).name, spec.stack(stack).depth
    if menu == "greedy":
        found = _greedy(judged, data, spec, stack, batch, progress)
    else:
        found = _from_menu(judged, data, _menu(spec, menu, stack), depth, by, batch, progress)
    needs, change, counts, units, detail, refused = found
    sums = [own.tolist() for own in needs.unbind(0)]
    layers = ratio(needs.sum(0).tolist(), units)
    detail |= {"layers": list(layers), "change": change}
    one = f"one {by} needs {layers[0]:.1f} of {depth} layers on average, chosen with the answers known"
    same = f"the same plan for all takes {detail['fixed']}"
    return mean_scores(
        "depth-oracle", f"share of {by}s", sums, units, data, stack=name, tokens=sum(counts), removal=False,
        notes=(f"{one}; {same}", *refused), detail=detail,
    )  # fmt: skip


class _Judged:
    """What a plan changes for each token, beside the whole model; and which tokens it is the first to suit."""

    def __init__(self, model: Any, judge: str, within: float) -> None:
        self.model, self.judge, self.within = model, judge, within
        self._dense: Side | None = None
        self._waiting = torch.ones(1, 1, dtype=torch.bool)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None) -> Side:
        logits = logits_of(self.model, ids, mask)
        return token_nll(logits, ids), logits[:, :-1].argmax(-1).cpu()

    def change(self, dense: Side, plan: Side) -> list[torch.Tensor]:
        """d, whether it is within, and whether it is so for the first time among the plans of this batch."""
        if dense is not self._dense:
            self._dense, self._waiting = dense, torch.ones_like(dense[1], dtype=torch.bool)
        d = plan[0] - dense[0] if self.judge == "loss" else in_float64(plan[1] != dense[1])
        good = d <= self.within
        first = good & self._waiting
        self._waiting &= ~good
        return [d, good, first, torch.where(first, d, 0.0)]

    def compare(
        self, data: Data, plans: Candidates, batch: int, progress: Progress | None
    ) -> tuple[torch.Tensor, list[int], tuple[str, ...]]:
        """[plan, figure of `change`, sequence] sums over scored tokens, NaN for a plan that cannot run; how many
        tokens; why not."""
        sums, counts, refused = compare_each(
            self.model, data, plans, self.forward, self.change, what=WHAT, batch=batch, progress=progress
        )
        found = torch.full((len(sums), 4, len(data)), math.nan, dtype=torch.float64)
        for place, own in enumerate(sums):
            found[place] = torch.tensor(own, dtype=torch.float64)
        return found, counts, refused


Found = tuple[torch.Tensor, float, list[int], list[int], dict[str, Any], tuple[str, ...]]
"""[layer, sequence] of how many units need it, mean change, tokens and units by sequence, detail, what was refused."""


def _from_menu(
    judged: _Judged, data: Data, plans: Candidates, depth: int, by: str, batch: int, progress: Progress | None
) -> Found:
    """The plans of a menu for a stack of `depth` layers, from the one of the fewest layers on."""
    figures, counts, refused = judged.compare(data, plans, batch, progress)
    tokens = torch.tensor(counts, dtype=torch.float64)
    means = figures[:, 0] / tokens.clamp(min=1)
    if by == "token":
        units, good, change = counts, figures[:, 1], figures[:, 3].nansum()
        first = figures[:, 2].nan_to_num()
    else:
        units = [int(count > 0) for count in counts]
        good = in_float64((means <= judged.within) & (tokens > 0))
        first = good * (good.cumsum(0) == 1)
        change = (torch.where(first > 0, means, 0.0)).sum()
    runs = torch.zeros(depth, len(plans.plans), dtype=torch.float64)
    for place, plan in enumerate(plans.plans):
        runs[list(plan.layers(plans.stack)) if plan is not None else [], place] = 1
    whole = torch.tensor(units, dtype=torch.float64) - first.sum(0)
    total = figures[:, 0].sum(-1) / tokens.sum()
    sizes = [int(size) for size in runs.sum(0)]
    fixed = min((size for size, d in zip(sizes, total.tolist(), strict=True) if d <= judged.within), default=depth)
    curve = [
        [size, *ratio(own.tolist(), counts), float(enough.sum() / sum(units))]
        for size, own, enough in zip(sizes, figures[:, 0], good, strict=True)
        if not bool(own.isnan().any())
    ]
    return runs @ first + whole, float(change / sum(units)), counts, units, {"fixed": fixed, "curve": curve}, refused


def _greedy(judged: _Judged, data: Data, spec: Spec, stack: str | None, batch: int, progress: Progress | None) -> Found:
    """Each sequence by itself, and then all of them together."""
    depth, changes = spec.stack(stack).depth, []
    needs = torch.zeros(depth, len(data), dtype=torch.float64)
    counts: list[int] = []
    for row in range(len(data)):
        layers, change, scored = _walked(judged, data.only([row]), spec, stack, batch)
        needs[list(layers), row] = 1
        changes.append(change)
        counts += scored
        if progress is not None:
            progress(row + 1, len(data) + 1, WHAT)
    fixed = _walked(judged, data, spec, stack, batch)[0]
    if progress is not None:
        progress(len(data) + 1, len(data) + 1, WHAT)
    detail = {"fixed": len(fixed), "fixed_layers": list(fixed)}
    return needs, math.fsum(changes) / len(data), counts, [1] * len(data), detail, ()


def _walked(
    judged: _Judged, data: Data, spec: Spec, stack: str | None, batch: int
) -> tuple[tuple[int, ...], float, list[int]]:
    """The layers that are left when always the cheapest goes, what that changes, and the scored tokens."""
    plan, change, counts = Plan.identity(spec), 0.0, [0]
    while len(left := plan.layers(stack)) > 1:
        smaller = [drop(plan, [layer], stack=stack) for layer in left]
        legal = _legal(smaller, spec, stack)
        figures, counts, _ = judged.compare(data, legal, batch, None)
        means = (figures[:, 0].sum(-1) / sum(counts)).nan_to_num(nan=math.inf)
        best = int(means.argmin())
        if not means[best] <= judged.within:
            break
        plan, change = smaller[best], float(means[best])
    return plan.layers(stack), change, counts


def _menu(spec: Spec, menu: str, stack: str | None) -> Candidates:
    """For each number of layers below the depth the plan with so many."""
    whole, depth = Plan.identity(spec), spec.stack(stack).depth
    plans = []
    for count in range(1, depth):
        even = [round(i * (depth - 1) / max(1, count - 1)) for i in range(count)]
        plans.append(keep(whole, even if menu == "even" else range(count), stack=stack))
    return _legal(plans, spec, stack)


def _legal(plans: Sequence[Plan], spec: Spec, stack: str | None) -> Candidates:
    """Those that may run, None in the place of the others."""
    problems = [next(iter(check(plan, spec)), None) for plan in plans]
    refused = [f"the plan {plan} was not tried: {why}" for plan, why in zip(plans, problems, strict=True) if why]
    return Candidates(
        spec.stack(stack).name,
        tuple(None if why else plan for plan, why in zip(plans, problems, strict=True)),
        tuple(refused),
    )
