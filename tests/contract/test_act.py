"""ACT: halting probabilities, the mean of the loops' states, and the keys and values of tokens that have halted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from shoal.deciding.policies.act import act
from shoal.decoding.fast import FastDecoder
from shoal.errors import ShoalError
from shoal.live import apply, running
from shoal.models.inspect import inspect
from shoal.plan.select import exits
from shoal.writing.surgery import rewrite

from .families import tiny
from .live_models import own, plan_of
from .policy_cells import LENGTH, PREFILL, batch_of, stepped, whole
from .references import CLOSE, Batch, by_hand

FAMILIES = ["llama", "gpt2", "qwen2", "opt", "mixtral", "gemma2"]
LOOPS = {"0-1,0-1,0-1": [(0, 1)] * 3, "2,0x4": [(2,), (0,), (0,), (0,), (0,)]}
PRELUDE = {"0-1,0-1,0-1": 0, "2,0x4": 1}
SIZE = 32
Unit = dict[str, torch.Tensor]


def model_of(family: str) -> PreTrainedModel:
    return tiny(family, "eager" if family == "gemma2" else "sdpa")


@torch.no_grad()
def states(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return model(ids, output_hidden_states=True).hidden_states


def unit_of(family: str, bias: float = -0.6) -> Unit:
    """A halting unit by which the tokens of one column halt behind different loops."""
    weight = torch.randn(SIZE, generator=torch.Generator().manual_seed(4))
    # a copy: transformers leaves hooks on a model that is asked for its states
    size = states(copy.deepcopy(model_of(family)), batch_of(1)["input_ids"])[1].std().item()
    return {"halt.halting": weight * (0.35 / max(size, 0.1)), "halt.halting_bias": torch.tensor([bias])}


def halting_by_hand(
    model: PreTrainedModel, batch: Batch, plan: str, unit: Unit, fill: str, threshold: float = 0.99
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of stock layers called by hand, and N, how many loops each token made, [batch, tokens]."""
    made: list[torch.Tensor] = []
    before, loops = LOOPS[plan][: PRELUDE[plan]], LOOPS[plan][PRELUDE[plan] :]

    def chain(call: Callable[[int, torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        for layers in before:
            for layer in layers:
                hidden = call(layer, hidden)
        halted = torch.zeros(hidden.shape[:2], dtype=torch.bool)
        spent, number, mean = torch.zeros(hidden.shape[:2]), torch.zeros(hidden.shape[:2]), torch.zeros_like(hidden)
        for n, layers in enumerate(loops, 1):
            for layer in layers:
                after = call(layer, hidden)
                hidden = torch.where(halted[..., None], hidden, after) if fill == "project" else after
            p = (hidden @ unit["halt.halting"] + unit["halt.halting_bias"]).sigmoid()
            now = ~halted & ((spent + p >= threshold) | torch.tensor(n == len(loops)))
            weight = torch.where(halted, 0.0, torch.where(now, 1 - spent, p))
            mean, spent = mean + weight[..., None] * hidden, spent + weight
            number, halted = number + ~halted, halted | now
            made[:] = [number]
        assert torch.equal(halted, torch.ones_like(halted))
        torch.testing.assert_close(spent, torch.ones_like(spent), atol=1e-6, rtol=0)
        return mean

    return by_hand(model, batch, chain), made[0]


@pytest.mark.parametrize("fill", ["project", "defer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_mean_of_stock_layers_called_by_hand(family: str, fill: str) -> None:
    """One pass, a prefill and single tokens, dynamic and static, alone and in a left-padded batch."""
    model, unit = model_of(family), unit_of(family)
    plan = "0-1,0-1,0-1" if fill == "project" or family not in ("qwen2", "gemma2") else "2,0x4"
    if family == "gemma2" and fill == "defer":
        with pytest.raises(ShoalError, match="P135"):
            apply(model, plan, unit, policy=f"act:unit=halt,fill={fill}")
        return
    for rows in (1, 2):
        batch = batch_of(rows)
        seen = batch["attention_mask"].bool()
        right, number = halting_by_hand(model, batch, plan, unit, fill)
        assert len(number[seen].unique()) >= 2
        size = len(LOOPS[plan][-1])
        with running(model, plan, unit, policy=f"act:unit=halt,fill={fill}") as handle:
            for got in (whole(model, batch), stepped(model, batch, "dynamic"), stepped(model, batch, "static")):
                torch.testing.assert_close(got[seen], right[seen], atol=1e-4, rtol=0)
                deep = torch.tensor(handle.trace.depths)
                assert torch.equal(deep[seen], (number * size + PRELUDE[plan])[seen].long())
    assert ((number[0] != number[1]) & seen[1]).any(), "two sequences leave at different loops"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("plan", "one"), [("0-1,0-1", "0-1"), ("3,0-1,0-1,0-1", "3,0-1"), ("0,1x3", "0,1")])
def test_a_threshold_of_0_leaves_behind_one_loop(family: str, plan: str, one: str) -> None:
    model, batch, unit = model_of(family), batch_of(2), unit_of(family)
    with running(model, one):
        right = whole(model, batch), stepped(model, batch, "dynamic")
    for policy, tensors in (("act:unit=halt,threshold=0", unit), ("act:threshold=0", None), ("act:bias=30", None)):
        with running(model, plan, tensors, policy=policy) as handle:
            got = whole(model, batch), stepped(model, batch, "dynamic")
            counts = handle.trace.counts.to_dict()
        seen = batch["attention_mask"].bool()
        for found, wanted in zip(got, right, strict=True):
            torch.testing.assert_close(found[seen], wanted[seen], **CLOSE)
        assert counts["executed"] == counts["asked"] and counts["simulated"] == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plan", ["0-1,0-1", "3,0x3", "0-1,2-3=0-1"])
def test_never_halting_is_the_unrolled_plan_bit_for_bit(family: str, plan: str) -> None:
    model, batch = model_of(family), batch_of(2)
    never = unit_of(family) | {"halt.halting_bias": torch.tensor([-float("inf")])}
    with running(model, plan):
        right = whole(model, batch), stepped(model, batch, "dynamic")
    for policy, tensors in (("act:bias=-200", None), ("act:unit=halt", never)):
        with running(model, plan, tensors, policy=policy):
            assert torch.equal(whole(model, batch), right[0])
            assert torch.equal(stepped(model, batch, "dynamic"), right[1])


# a planted model: layer 0 adds one vector to every token, and coordinate 0 says when a token halts


@contextmanager
def read(model: Any) -> Iterator[list[torch.Tensor]]:
    """What the final norm reads."""
    found: list[torch.Tensor] = []
    handle = model.transformer.ln_f.register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    try:
        yield found
    finally:
        handle.remove()


def planted() -> tuple[Any, torch.Tensor]:
    """A model whose layer 0 adds the vector that comes with it, in coordinates from 2 on."""
    model: Any = own("gpt2")
    step = torch.arange(SIZE, dtype=torch.float32) / SIZE
    step[:2] = 0
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
        for layer in model.transformer.h:
            for module in (layer.attn.c_proj, layer.mlp.c_proj):
                module.weight.zero_()
                module.bias.zero_()
            layer.mlp.c_proj.bias.copy_(step)
    return model, step


PLANTED = {  # by token: its halting probability, N, and the weights of four loops
    3: (0.6, 2, (0.6, 0.4, 0, 0)),
    4: (0.995, 1, (1, 0, 0, 0)),
    5: (0.3, 4, (0.3, 0.3, 0.3, 0.1)),
    6: (0.01, 4, (0.01, 0.01, 0.01, 0.97)),
    7: (0.45, 3, (0.45, 0.45, 0.1, 0)),
}


def released(p: float, what: str) -> tuple[float, ...]:
    """The weights of four loops as tensor2tensor's code has them."""
    spent, weights = 0.0, []
    for _ in range(4):
        running_still = spent < 1
        halts = running_still and spent + p > 0.99
        weights.append((1 - spent if halts else p) if running_still else 0.0)
        spent += weights[-1]
    if what == "interpolated":  # as the comment beside its basic form says: new x w + old x (1 - w)
        kept = [1.0]
        for weight in reversed(weights[1:]):
            kept.insert(0, kept[0] * (1 - weight))
        weights = [weight * keep for weight, keep in zip(weights, kept, strict=True)]
    return tuple(weights)


@pytest.mark.parametrize("cached", [False, True])
def test_known_tokens_halt_behind_known_loops_with_the_mean_by_hand(cached: bool) -> None:
    model, step = planted()
    tokens = torch.tensor([[3, 4, 5, 6, 7, 3, 6], [6, 6, 4, 4, 3, 5, 7]])
    with torch.no_grad():
        for token, (p, _, _) in PLANTED.items():
            model.transformer.wte.weight[token, 0] = torch.tensor(p).logit()
    first = model.transformer.wte.weight.detach()[tokens]
    unit = {"halt.halting": torch.eye(SIZE)[0], "halt.halting_bias": torch.zeros(1)}
    with running(model, "0x4", unit, policy="act:unit=halt") as handle, read(model) as found:
        if cached:
            past = None
            for at in range(tokens.shape[1]):
                past = model(tokens[:, at : at + 1], past_key_values=past, use_cache=True).past_key_values
        else:
            model(tokens, use_cache=False)
        assert handle.trace.depths == [[PLANTED[int(token)][1] for token in row] for row in tokens]
        assert handle.trace.counts.heads == 0

    def mean(weights: Callable[[int], tuple[float, ...]]) -> torch.Tensor:
        loops = [[sum(n * w for n, w in enumerate(weights(int(t)), 1)) for t in row] for row in tokens]
        share = [[sum(weights(int(t))) for t in row] for row in tokens]
        return torch.tensor(share)[..., None] * first + torch.tensor(loops)[..., None] * step

    got = torch.cat(found, 1)
    torch.testing.assert_close(got, mean(lambda token: PLANTED[token][2]), **CLOSE)
    for what in ("no remainder at the end", "interpolated"):
        assert not torch.allclose(got, mean(lambda token, what=what: released(PLANTED[token][0], what)), atol=0.01)
    sums = torch.tensor([[sum(released(PLANTED[int(t)][0], "")) for t in row] for row in tokens])
    basic = mean(lambda token: released(PLANTED[token][0], "")) - sums[..., None]
    assert not torch.allclose(got, basic, atol=0.01), "its basic form: new x w + (old x 1 - w)"
    late = mean(lambda token: (0.0,) * (PLANTED[token][1] - 1) + (1.0,))
    assert not torch.allclose(got, late, atol=0.01), "the last state alone is not ACT"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_weights_of_every_token_add_up_to_1(dtype: torch.dtype) -> None:
    """Coordinate 1 is 1 in every state, so in their mean it is the sum of the weights."""
    model: Any = own("gpt2")
    with torch.no_grad():
        model.transformer.wpe.weight[:, 1] = 0
        model.transformer.wte.weight[:, 1] = 1
        for layer in model.transformer.h:
            for module in (layer.attn.c_proj, layer.mlp.c_proj):
                module.weight[:, 1], module.bias[1] = 0, 0
    model.to(dtype)
    ids = torch.randint(3, 64, (4, 60), generator=torch.Generator().manual_seed(1))
    number = set[int]()
    for bias in (-4.0, -3.0, 6.0):
        unit = unit_of("gpt2", bias)
        unit["halt.halting"] *= 0.4
        with running(model, "0-1,0-1,0-1,0-1", unit, policy="act:unit=halt") as handle, read(model) as found:
            model(ids, use_cache=False)
            number |= {depth for row in handle.trace.depths for depth in row}
        assert (found[0][..., 1].double() - 1).abs().max() <= (0 if dtype == torch.bfloat16 else 1e-6)
    assert number == {2, 4, 6, 8}


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_writes_what_one_pass_reads(cache: str | None) -> None:
    model, batch, unit = tiny("llama"), batch_of(2), unit_of("llama")
    options: dict[str, Any] = {} if cache is None else {"cache_implementation": cache}
    with running(model, "0-1,0-1,0-1", unit, policy="act:unit=halt") as handle, torch.no_grad():
        ids = model.generate(**batch, max_new_tokens=9, do_sample=False, **options)
        depths = handle.trace.depths
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 9, dtype=torch.long)], 1)
        logits = whole(model, {"input_ids": ids, "attention_mask": mask})
        assert handle.trace.depths == [row + handle.trace.depths[n][-1:] for n, row in enumerate(depths)]
    assert torch.equal(logits[:, LENGTH - 1 : -1].argmax(-1), ids[:, LENGTH:])
    assert len({depth for row in depths for depth in row[LENGTH:]}) > 1


def test_a_sequence_in_a_batch_halts_as_it_does_alone() -> None:
    model, batch, unit = tiny("llama"), batch_of(2), unit_of("llama")
    with running(model, "0-1,0-1,0-1", unit, policy="act:unit=halt"):
        both = stepped(model, batch, "dynamic")
        for row, begin in ((0, 0), (1, 3)):
            alone = whole(model, {name: one[row : row + 1, begin:] for name, one in batch.items()})
            torch.testing.assert_close(both[row : row + 1, begin:], alone, atol=1e-4, rtol=0)


# plans


@pytest.mark.parametrize(
    ("plan", "made"),
    [
        ("0-1,0-1", "0-1,!loop-1?act,0-1/project"),
        ("0x4", "0,!loop-1?act,0/project,!loop-2?act,0/project,!loop-3?act,0/project"),
        ("0,1,1,0,1,1", "0-1,1,!loop-1?act,0-1/project,1/project"),
        ("3,0-1,0-1", "3,0-1,!loop-1?act,0-1/project"),
        ("0-1,2-3=0-1", "0-1,!loop-1?act,2-3=0-1/project"),
        ("0a,0m,0a,0m", "0a,0m,!loop-1?act,0a/project,0m"),
        ("0-1,!mine?x,0-1/mask", "0-1,!mine?x,0-1/mask"),
    ],
)
def test_exits_are_put_behind_each_loop_but_the_last(plan: str, made: str) -> None:
    model = tiny("llama")
    base = plan_of(model, plan)
    assert act(base, inspect(model)).plan == plan_of(model, made)
    heads = {step.head for step in exits(act(base, inspect(model), unit="halt").plan.steps())}
    assert heads == ({"base"} if "!" in plan else {"halt"})


def test_exits_of_the_plan_may_have_units_of_their_own() -> None:
    model, batch = tiny("llama"), batch_of(2)
    one, other = unit_of("llama", -0.6), unit_of("llama", 0.3)
    both = one | {name.replace("halt.", "late."): tensor for name, tensor in other.items()}
    typed = "0,!a=halt?x,0/project,!b={}?x,0/project"
    with running(model, "0x3", one, policy="act:unit=halt"):
        right = whole(model, batch)
    with running(model, typed.format("halt"), one, policy="act"):
        assert torch.equal(whole(model, batch), right)
    with running(model, typed.format("late"), both, policy="act"):
        assert not torch.allclose(whole(model, batch), right, atol=1e-3)


def test_what_does_not_fit_is_refused_by_name() -> None:
    model, unit = tiny("llama"), unit_of("llama")
    bad: tuple[tuple[Any, str], ...] = (
        ({"halt.probe": torch.zeros(SIZE)}, r"U684: halt has no halting unit"),
        (unit | {"halt.halting": torch.zeros(SIZE + 1)}, r"P113: .*halt\.halting"),
        (unit | {"halt.halted": torch.zeros(SIZE)}, r"P113: halt\.halted"),
    )
    for weights, words in bad:
        with pytest.raises(ShoalError, match=words):
            apply(model, "0-1,0-1", weights, policy="act:unit=halt")
    with running(model, "0-1,0-1", policy="act"):
        with pytest.raises(ShoalError, match="U580"):
            model.generate(**batch_of(1), max_new_tokens=2, num_beams=2)
        with pytest.raises(ShoalError, match="P140"):
            model.generate(**batch_of(1), max_new_tokens=2, cache_implementation="paged")
        with pytest.raises(ShoalError, match="U567"):
            FastDecoder(model).generate(**batch_of(1), max_new_tokens=2)
    with pytest.raises(ShoalError, match="W205"):
        rewrite(model, act(plan_of(model, "0-1,0-1"), inspect(model)).plan)


def test_a_unit_that_learns_gets_a_gradient_from_every_loop() -> None:
    """Its training is not here yet; what is read is differentiable."""
    model, batch = tiny("llama"), batch_of(2)
    unit = {name: nn.Parameter(tensor) for name, tensor in unit_of("llama").items()}
    with running(model, "0-1,0-1,0-1", unit, policy="act:unit=halt"):
        model(**batch, use_cache=False).logits[:, PREFILL:].logsumexp(-1).sum().backward()
    assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in unit.values())
