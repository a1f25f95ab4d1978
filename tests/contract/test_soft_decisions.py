"""Decisions with a weight, by which a gradient reaches who decides; and what a policy is told in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from shoal.deciding.decisions import Soft, straight_through
from shoal.deciding.gating import with_exits, with_gates
from shoal.deciding.learning import Learning
from shoal.deciding.policy import Policy
from shoal.errors import PlanError
from shoal.live import apply, running
from shoal.models.inspect import inspect
from shoal.models.stacks import find_stack
from shoal.plan import Plan

from .families import DEPTH, tiny
from .live_models import IDS, PADDED, logits, own, plan_of
from .policy_cells import LENGTH, batch_of, stepped, whole
from .references import CLOSE, silenced
from .test_training_rows import OTHER_ORDER, checkpointing, learning, passed, same

FEW = ["llama", "gpt2", "gemma2", "falcon"]
GATED = (1, 2)
FILLS = ("project", "mask", "copy")
OTHER_SUM = 1e-5
"""Where the same sum is written in another way; 4e-7 was seen."""


class Weighing(Policy):
    """Gives each gate and exit the weight `weights[layer]`, [batch or 1, tokens]; hard where it is `above` a number."""

    def __init__(self, plan: Plan, weights: dict[int, torch.Tensor], part: str = "layer", above: float = 0.5) -> None:
        super().__init__(plan)
        self.weights, self.above = weights, above
        self.leaves_out = part  # type: ignore[misc, assignment]

    def _answer(self, layer: int, forward: Any) -> Soft:
        weight = self.weights[layer][:, forward.past : forward.past + forward.tokens]
        return Soft(weight > self.above, weight)

    def should_run(self, run: Any, forward: Any, hidden: Any) -> Soft:
        return self._answer(run.layer, forward)

    def should_exit(self, step: Any, forward: Any, view: Any) -> Soft:
        return self._answer(int(step.name.removeprefix("after-")), forward)


class Drawing(Policy):
    """Gates of one number each, opened by Gumbel noise: what a learned router does."""

    def __init__(self, plan: Plan, logits_of: dict[int, nn.Parameter]) -> None:
        super().__init__(plan)
        self.logits_of = logits_of

    def should_run(self, run: Any, forward: Any, hidden: torch.Tensor) -> Soft:
        now = forward.learning
        noise = torch.rand(forward.rows, forward.tokens, generator=now.generator)
        soft = (self.logits_of[run.layer] + (noise / (1 - noise)).log()).sigmoid()
        now.note("open", soft)
        return straight_through(soft > 0.5, soft)


def gated(model: PreTrainedModel, fill: str = "project") -> Plan:
    spec = inspect(model)
    return with_gates(Plan.identity(spec), spec, GATED, "soft", fill)  # type: ignore[arg-type]


def same_for_all(value: float) -> dict[int, torch.Tensor]:
    return {layer: torch.full((1, LENGTH), value) for layer in range(DEPTH)}


@contextmanager
def scaled(model: PreTrainedModel, weights: dict[int, torch.Tensor], part: str = "layer") -> Iterator[None]:
    """The change that each layer, or its mlp, makes is multiplied by hand."""

    def whole_layer(weight: torch.Tensor) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
            before = args[0] if args else kwargs["hidden_states"]
            first = out[0] if isinstance(out, tuple) else out
            mixed = before + weight[..., None] * (first - before)
            return (mixed, *out[1:]) if isinstance(out, tuple) else mixed

        return hook

    def mlp(weight: torch.Tensor) -> Any:
        return lambda _, args, kwargs, out: weight[..., None] * out

    handles = []
    for layer, weight in weights.items():
        module = find_stack(model).layer(layer)
        target = module if part == "layer" else module.mlp
        hook = whole_layer(weight) if part == "layer" else mlp(weight)
        handles.append(target.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("wanted", [False, True], ids=["no gradient", "gradient"])
@pytest.mark.parametrize("part", ["layer", "mlp"])
@pytest.mark.parametrize("family", FEW)
def test_ones_are_the_whole_model_and_zeros_the_plan_without_bit_for_bit(family: str, part: str, wanted: bool) -> None:
    model = own(family, "eager")
    plan, dense = gated(model), logits(model)
    with running(model, "0,1a,2a,3" if part == "mlp" else "0,3"):
        without = logits(model)
    for value, right in ((1.0, dense), (0.0, without)):
        weights = {layer: weight.requires_grad_(wanted) for layer, weight in same_for_all(value).items()}
        with running(model, plan, policy=Weighing(plan, weights, part)), torch.set_grad_enabled(wanted):
            found = model(input_ids=IDS, use_cache=False).logits
        assert torch.equal(found, right), value


@pytest.mark.parametrize("part", ["layer", "mlp"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_weight_multiplies_the_change_and_its_gradient_is_that_of_the_product(family: str, part: str) -> None:
    model, generator = own(family), torch.Generator().manual_seed(2)
    weights = {layer: torch.rand(2, LENGTH, generator=generator).requires_grad_() for layer in GATED}
    plan = gated(model)
    with running(model, plan, policy=Weighing(plan, weights, part, above=0.0)):
        live = passed(model, {str(n): w for n, w in weights.items()})
    cut = {layer: weight[:, : IDS.shape[1]] for layer, weight in weights.items()}
    with scaled(model, cut, part):
        right = passed(model, {str(n): w for n, w in weights.items()})
    same(right, live, atol=OTHER_SUM)
    assert all(live[1][str(layer)].abs().sum() > 0 for layer in GATED)


@pytest.mark.parametrize("part", ["layer", "mlp"])
def test_a_closed_gate_learns_and_is_left_out_where_nothing_is_learned(part: str) -> None:
    model = own("llama")
    plan = gated(model)
    weights = {layer: torch.zeros(1, LENGTH, requires_grad=True) for layer in GATED}
    calls: list[int] = []
    layer = find_stack(model).layer(1)
    with running(model, plan, policy=Weighing(plan, weights, part)):
        (layer if part == "layer" else layer.mlp).register_forward_hook(lambda *_: calls.append(1))
        without = logits(model)
        assert calls == []
        loss, gradients = passed(model, {str(n): w for n, w in weights.items()})
        assert calls == [1]
        assert all(gradients[str(layer)].abs().sum() > 0 for layer in GATED)
        found = model(input_ids=IDS, use_cache=False).logits
    assert torch.equal(found.detach(), without)
    assert loss.isfinite()


@pytest.mark.parametrize("mode", ["checkpointed", "reentrant"])
@pytest.mark.parametrize("fill", FILLS)
def test_gates_that_draw_learn_the_same_under_gradient_checkpointing(fill: str, mode: str) -> None:
    found = []
    for reentrant in (None, mode == "reentrant"):
        model = learning(own("llama"))
        checkpointing(model, reentrant)
        plan = gated(model, fill)
        numbers = {layer: nn.Parameter(torch.tensor(0.3 * layer - 0.4)) for layer in GATED}
        with (
            running(model, plan, policy=Drawing(plan, numbers)) as handle,
            handle.learning(Learning(progress=0.5, seed=11)) as now,
        ):
            found.append(passed(model, {str(n): p for n, p in numbers.items()}, **PADDED))
            assert [tuple(one.shape) for one in now.ledger["open"]] == [(2, IDS.shape[1])] * len(GATED)
    assert {"1", "2"} <= found[0][1].keys()
    same(found[0], found[1], atol=OTHER_ORDER if mode == "reentrant" else 0.0)


def test_the_numbers_that_are_drawn_depend_on_the_seed_alone_and_a_forward_computed_again_draws_the_same() -> None:
    model = learning(own("llama"))
    plan = gated(model)
    numbers = {layer: nn.Parameter(torch.zeros(())) for layer in GATED}

    def drawn(seed: int) -> list[torch.Tensor]:
        with running(model, plan, policy=Drawing(plan, numbers)) as handle, handle.learning(Learning(seed=seed)) as now:
            logits(model)
            return [one.detach() for one in now.ledger["open"]]

    first, again, other = drawn(3), drawn(3), drawn(4)
    assert all(torch.equal(one, same_one) for one, same_one in zip(first, again, strict=True))
    assert not any(torch.equal(one, another) for one, another in zip(first, other, strict=True))
    assert not torch.equal(first[0], first[1])
    losses = {}
    for whole_again in (False, True):
        with running(model, plan, policy=Drawing(plan, numbers)) as handle, handle.learning(Learning(seed=5)):
            for parameter in numbers.values():
                parameter.grad = None

            def loss() -> torch.Tensor:
                return model(input_ids=IDS, labels=IDS, use_cache=False).loss

            value = checkpoint(loss, use_reentrant=False) if whole_again else loss()
            value.backward()
            losses[whole_again] = [value.detach(), *(p.grad.clone() for p in numbers.values())]
    assert all(torch.equal(a, b) for a, b in zip(losses[False], losses[True], strict=True))


def test_without_training_a_policy_is_told_nothing_of_it() -> None:
    model, seen = own("llama"), []
    plan = gated(model)

    class Looking(Policy):
        def should_run(self, run: Any, forward: Any, hidden: Any) -> bool:
            seen.append(forward.learning)
            return True

    with running(model, plan, policy=Looking(plan)) as handle:
        logits(model)
        step = Learning(progress=0.25)
        with handle.learning(step):
            logits(model)
        logits(model)
    assert seen == [None, None, step, step, None, None]
    with running(model, "0-1,3") as handle, handle.learning(step) as now:
        assert now is step


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("fill", FILLS)
def test_weighted_runs_over_a_cache_are_one_pass_without(fill: str, rows: int) -> None:
    model, batch = tiny("llama", "sdpa"), batch_of(rows)
    weights = {n: torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(n))[:rows] for n in GATED}
    plan, seen = gated(model, fill), batch["attention_mask"].bool()
    with running(model, plan, policy=Weighing(plan, weights)):
        right = whole(model, batch)
        torch.testing.assert_close(stepped(model, batch, "dynamic")[seen], right[seen], **CLOSE)
    hard = {n: (w > 0.5).to(w) for n, w in weights.items()}
    with running(model, plan, policy=Weighing(plan, hard)):
        assert not torch.allclose(whole(model, batch), right, atol=1e-3), "the weight counts for those who run"


# exits


def exiting(model: PreTrainedModel, head: str = "base") -> Plan:
    spec = inspect(model)
    return with_exits(Plan.identity(spec), spec, range(DEPTH - 1), "project", head)


@pytest.mark.parametrize("wanted", [False, True], ids=["no gradient", "gradient"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_halting_at_once_is_the_first_layer_and_never_is_the_whole_model(family: str, wanted: bool) -> None:
    model = own(family, "eager")
    plan, dense = exiting(model), logits(model)
    with running(model, "0"):
        first = logits(model)
    for bias, right in ((-30.0, dense), (30.0, first)):
        number = torch.full((), bias, requires_grad=wanted)
        for above in (0.5, 2.0):  # who is sure leaves, or nobody does
            weights = {layer: number.sigmoid().expand(1, LENGTH) for layer in range(DEPTH)}
            with running(model, plan, policy=Weighing(plan, weights, above=above)), torch.set_grad_enabled(wanted):
                found = model(input_ids=IDS, use_cache=False).logits
            assert torch.equal(found, right), (bias, above)


def test_what_is_read_is_the_weighted_sum_and_whoever_leaves_takes_the_rest() -> None:
    model, generator = own("llama"), torch.Generator().manual_seed(8)
    tokens = IDS.shape[1]
    raw = torch.rand(DEPTH - 1, 2, tokens, generator=generator) * 0.3
    raw[1, 0, 4], raw[1, 1, 6] = 0.9, 0.8  # hard: these two leave behind layer 1
    parameters = {layer: nn.Parameter(raw[layer].clone()) for layer in range(DEPTH - 1)}
    plan = exiting(model)
    with running(model, plan, policy=Weighing(plan, parameters, above=0.6)) as handle:
        found = passed(model, {str(n): p for n, p in parameters.items()})
        depths = handle.trace.depths
    assert depths[0][4] == depths[1][6] == 2 and depths[0][3] == DEPTH

    states: list[torch.Tensor] = []
    left, stack = raw[1] > 0.6, find_stack(model)

    def goes_on(_: nn.Module, args: Any, kwargs: Any, out: torch.Tensor) -> torch.Tensor:
        before = args[0] if args else kwargs["hidden_states"]
        states.append(torch.where(left[..., None], before, out) if len(states) > 1 else out)
        return states[-1]

    def mixed(_: nn.Module, args: Any) -> Any:
        given = parameters[0][..., None] * states[0]
        rest = 1 - parameters[0]
        share = torch.where(left, rest, parameters[1])
        given, rest = given + share[..., None] * states[1], rest - share
        share = torch.where(left, 0.0, parameters[2])
        return (given + share[..., None] * states[2] + (rest - share)[..., None] * states[3],)

    hooks = [stack.layer(n).register_forward_hook(goes_on, with_kwargs=True) for n in range(DEPTH)]
    hooks.append(model.model.norm.register_forward_pre_hook(mixed))
    right = passed(model, {str(n): p for n, p in parameters.items()})
    for hook in hooks:
        hook.remove()
    same(right, found, atol=OTHER_SUM)


def test_shares_where_nobody_leaves_are_the_weighted_sum() -> None:
    model, generator = own("gpt2"), torch.Generator().manual_seed(8)
    parameters = {n: nn.Parameter(torch.rand(2, IDS.shape[1], generator=generator) * 0.3) for n in range(DEPTH - 1)}
    plan, named = exiting(model), {str(n): p for n, p in parameters.items()}
    with running(model, plan, policy=Weighing(plan, parameters, above=2.0)):
        found = passed(model, named)
    states: list[torch.Tensor] = []
    stack = find_stack(model)

    def keep(_: nn.Module, __: Any, out: Any) -> None:
        states.append(out[0] if isinstance(out, tuple) else out)

    hooks = [stack.layer(n).register_forward_hook(keep) for n in range(DEPTH)]

    def mixed(_: nn.Module, args: Any) -> Any:
        rest = 1 - sum(p for p in parameters.values())
        return (sum(p[..., None] * states[n] for n, p in parameters.items()) + rest[..., None] * states[-1],)

    hooks.append(model.transformer.ln_f.register_forward_pre_hook(mixed))
    right = passed(model, named)
    for hook in hooks:
        hook.remove()
    same(right, found, atol=OTHER_SUM)


def test_states_that_another_head_reads_are_not_summed() -> None:
    model = own("llama")
    size = model.config.vocab_size, model.config.hidden_size
    weights = {f"own-{n}.weight": torch.zeros(size) for n in range(DEPTH - 1)}
    plan = exiting(model, "own")
    with (
        running(model, plan, weights, policy=Weighing(plan, same_for_all(0.3))),
        pytest.raises(PlanError, match="own-0") as caught,
    ):
        logits(model)
    assert caught.value.code == "P156"


# keys and values that are read under a policy (P133)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_gated_run_reads_keys_that_no_token_skips(kind: str) -> None:
    model, batch = tiny("llama", "sdpa"), batch_of(2)
    spec, seen = inspect(model), batch["attention_mask"].bool()
    plan = with_gates(plan_of(model, "0-1,2@1,3"), spec, (2,), "soft", "project")
    table = {2: (torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(4)) > 0.5).float()}
    with running(model, plan, policy=Weighing(plan, table)):
        right = whole(model, batch)
        got = stepped(model, batch, kind)
    torch.testing.assert_close(got[seen], right[seen], **CLOSE)
    for value, text in ((1.0, "0-1,2@1,3"), (0.0, "0-1,3")):
        with running(model, plan, policy=Weighing(plan, {2: torch.full((1, LENGTH), value)})):
            found = whole(model, batch)
        with running(model, text):
            assert torch.equal(found, whole(model, batch))


@pytest.mark.parametrize(
    ("text", "policy"),
    [("0,1,2@1,3", "skip:listed=1"), ("0-1,2,3@2", "exit:after=0"), ("0-1,2@1,3", "skip:random=2")],
)
def test_keys_that_some_token_skips_are_not_read(text: str, policy: str) -> None:
    with pytest.raises(PlanError, match=r"which some token may skip|keys and values") as caught:
        apply(own("llama"), text, policy=policy)
    assert caught.value.code == "P133"


def test_the_mlp_of_a_layer_that_reads_keys_may_be_left_out() -> None:
    model = own("llama")
    plan = with_gates(plan_of(model, "0-1,2@1,3"), inspect(model), (2,), "soft", None)
    with running(model, plan, policy=Weighing(plan, {2: torch.zeros(1, LENGTH)}, "mlp")):
        found = logits(model)
    with running(model, "0-1,2a@1,3"):
        assert torch.equal(found, logits(model))
    with running(model, "0-1,2@1,3"), silenced(model, 2, "mlp"):
        torch.testing.assert_close(found, logits(model), **CLOSE)
