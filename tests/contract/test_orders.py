"""Gates that choose what comes next: an order for each sequence (IOT), modules for each token (Mixture-of-Modules,
Radial Networks), and layers that learn to run in any order (LayerShuffle)."""

from __future__ import annotations

import copy
import itertools
from functools import cache
from typing import Any

import pytest
import torch

from shoal.api.heal import Healed, heal
from shoal.deciding.learning import Learning
from shoal.deciding.policy_text import make_policy
from shoal.errors import UsageError
from shoal.live import running
from shoal.models.load import Loaded
from shoal.models.opened import open_model
from shoal.models.stacks import find_stack
from shoal.plan import Plan, Run
from shoal.plan.notation import parse_steps

from .families import VOCAB, tiny
from .healing import batch_of as windows_of
from .healing import deep, gradients, learner_of
from .planted import data_of
from .policy_cells import PREFILL, batch_of, stepped, whole
from .shares import every

ORDERS = {"1-3": "0-3", "3,2,1": "0,3,2,1", "1m,1a,2,3": "0,1m,1a,2,3", "1,3": "0,1,3", "2,1,2,3": "0,2,1,2,3"}
"""Orders of the layers 1 to 3, and the plans that run them alone."""
ASKED = f"ordered:orders={'+'.join(ORDERS)}"
FAMILIES = ["llama", "gpt2", "gemma3_text", "olmo2", "opt"]


def drawn(asked: str, model: Any, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Random tensors for who chooses."""
    spec = open_model(model).spec
    draw = torch.Generator().manual_seed(5)
    started = make_policy(asked, Plan.identity(spec), spec).start(spec)
    return {name: scale * torch.randn(one.shape, generator=draw) for name, one in started.items()}


def memory_of(handle: Any) -> torch.Tensor:
    """The scores of orders by which sequences have chosen, [batch, 1, orders]."""
    assert handle.deciding is not None
    found: torch.Tensor = handle.deciding.memory["scores"]["order"]
    return found


@pytest.mark.parametrize("family", every(2, FAMILIES))
def test_each_order_alone_is_its_plan_bit_for_bit(family: str) -> None:
    """In one pass and with a cache; so is an order that every sequence of a batch chooses."""
    model, batch = tiny(family), batch_of(2)
    for number, plan in enumerate(ORDERS.values()):
        with running(model, plan):
            right, right_steps = whole(model, batch), stepped(model, batch, "dynamic")
        with running(model, "0-3", policy=f"{ASKED},choose={number}") as handle:
            assert torch.equal(whole(model, batch), right), plan
            assert torch.equal(stepped(model, batch, "dynamic"), right_steps), plan
            assert handle.trace.counts.to_dict()["simulated"] == 0
        tensors = {name: torch.zeros_like(one) for name, one in drawn(ASKED, model).items()}
        tensors[f"order-{number}.bias"] += 1
        with running(model, "0-3", tensors, policy=ASKED):
            assert torch.equal(whole(model, batch), right), plan


def test_one_order_is_the_dense_model() -> None:
    model, batch = tiny("llama"), batch_of(2)
    dense = whole(model, batch)
    for asked in ("ordered:orders=1-3", "ordered:orders=0-3", "ordered:orders=2"):
        with running(model, "0-3", drawn(asked, model), policy=asked):
            assert torch.equal(whole(model, batch), dense), asked


@pytest.mark.parametrize("family", every(2, FAMILIES))
def test_a_sequence_keeps_the_order_that_its_prompt_chose(family: str) -> None:
    """Rows of a left-padded batch choose for themselves, as they do alone, and one pass is a prefill and steps."""
    model, batch = tiny(family), batch_of(2)
    seen = batch["attention_mask"].bool()
    spec = open_model(model).spec
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        made = make_policy(ASKED, Plan.identity(spec), spec)
        tensors = {name: torch.randn(one.shape, generator=draw) for name, one in made.start(spec).items()}
        with running(model, "0-3", tensors, policy=ASKED) as handle:
            handle.prompt = PREFILL
            right = whole(model, batch)
            scores = memory_of(handle)
            handle.prompt = None
            chosen = scores[:, 0].argmax(-1).tolist()
            if len(set(chosen)) < 2:
                continue
            for cache, chunk in (("dynamic", 1), ("dynamic", 2), ("static", 1)):
                assert (stepped(model, batch, cache, chunk) - right)[seen].abs().max() <= 1e-5
                assert memory_of(handle)[:, 0].argmax(-1).tolist() == chosen
        for row, number in enumerate(chosen):
            with running(model, list(ORDERS.values())[number]):
                assert (whole(model, batch) - right)[row][seen[row]].abs().max() <= 1e-5
        return
    pytest.fail("the rows never chose two orders")


HALF = VOCAB // 2
TURNED = "0,2,1,3"


@cache
def two_orders(strength: float = 2.0) -> Any:
    """A model whose layers 1 and 2, of this `strength`, do not commute. The first number of a state says which half of
    the vocabulary its token is of; nobody changes it, and a token is followed by one of its own half."""
    model: Any = copy.deepcopy(tiny("llama"))
    model.tie_weights = lambda *_, **__: None
    mark = torch.where(torch.arange(VOCAB) < HALF, -1.0, 1.0)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 4 * mark
        for number, layer in enumerate(find_stack(model).layers):
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                weight = layer.get_submodule(name).weight
                weight.mul_(strength if number in (1, 2) else 1.0)
                weight[0] = 0.0
        model.lm_head.weight.mul_(3.0)
        model.lm_head.weight[:, 0] = 6 * mark
    return model


def written(count: int, seed: int, plans: tuple[str, str] = ("0-3", TURNED), strength: float = 2.0) -> torch.Tensor:
    """Texts in the lower half as the first plan writes them, and in the upper half as the second does."""
    model = two_orders(strength)
    ids = torch.randint(3, VOCAB, (count, 1), generator=torch.Generator().manual_seed(seed)).repeat(1, 16)
    upper = ids[:, 0] >= HALF
    for rows, plan in zip((~upper, upper), plans, strict=True):
        with running(model, plan):
            ids[rows] = model.generate(ids[rows, :1], max_new_tokens=15, do_sample=False)
    assert ((ids >= HALF) == upper[:, None]).all()
    return ids


def loss_of(
    ids: torch.Tensor, plan: Any, tensors: Any = None, policy: str | None = None, strength: float = 2.0
) -> torch.Tensor:
    """Of each row, [batch]."""
    model = two_orders(strength)
    with torch.no_grad(), running(model, plan, tensors, policy=policy):
        scores = model(ids).logits[:, :-1].log_softmax(-1)
    return -scores.gather(-1, ids[:, 1:, None])[..., 0].mean(-1)


def iot(data: torch.Tensor, tokens: int = 8000, **settings: Any) -> Healed:
    loaded = Loaded(two_orders(), None, "planted")
    asked = {"orders": "1-2+2,1", "learn": "gates", "rate": 0.05, **settings}
    return heal(
        loaded, Plan.identity(loaded.opened.spec), "iot", settings=asked, tokens=tokens, batch=4, held=32,
        data=data_of(data), watch=data_of(data[:4]),
    )  # fmt: skip


def scores_of(found: Healed, ids: torch.Tensor) -> torch.Tensor:
    """[batch, orders]"""
    with torch.no_grad(), running(two_orders(), found.plan, found.weights, policy=found.policy) as handle:
        two_orders()(ids)
        scores: torch.Tensor = memory_of(handle)
    return scores[:, 0].softmax(-1)


def test_planted_each_text_gets_the_order_that_it_needs() -> None:
    found, held = iot(written(400, 9)), written(64, 10)
    upper = (held[:, 0] >= HALF).long()
    assert (scores_of(found, held).argmax(-1) == upper).float().mean() > 0.95
    own = loss_of(held, found.plan, found.weights, found.policy).mean()
    fixed = {plan: loss_of(held, plan).mean() for plan in ("0-3", TURNED)}
    right = torch.where(upper.bool(), loss_of(held, TURNED), loss_of(held, "0-3")).mean()
    assert own - right < 0.1 * (min(fixed.values()) - right), (own, right, fixed)


# modules that each token picks

WAYS = (
    "", "part=layer", "part=layer,fill=mask", "reach=1,router=shared", "ends=true,part=layer,router=shared",
    "steps=4,reach=1,part=layer", "steps=2,skip=false", "grain=row", "layers=1-2,fill=mask,ends=true",
)  # fmt: skip


def asked_for(way: str) -> str:
    return f"assembled:{way}" if way else "assembled"


@pytest.mark.parametrize("family", every(2, FAMILIES))
def test_routers_begin_as_the_dense_model_bit_for_bit(family: str) -> None:
    """Step t -> module t, with a cache too; with SKIP for all it is the plan without the pool."""
    model, batch, spec = tiny(family), batch_of(2), open_model(tiny(family)).spec
    sides = {}
    for plan in ("0-3", "0"):
        with running(model, plan):
            sides[plan] = whole(model, batch), stepped(model, batch, "dynamic")
    for way in ("", "part=layer", "router=shared,ends=true", "grain=row,reach=1"):
        tensors = make_policy(asked_for(way), Plan.identity(spec), spec).start(spec)
        closed = {name: one - 100 if name.endswith("bias") else one for name, one in tensors.items()}
        for plan, own in (("0-3", tensors), ("0", closed)):
            with running(model, "0-3", own, policy=asked_for(way)):
                assert torch.equal(whole(model, batch), sides[plan][0]), (way, plan)
                assert torch.equal(stepped(model, batch, "dynamic"), sides[plan][1]), (way, plan)


@pytest.mark.parametrize("way", every(2, WAYS))
def test_what_tokens_pick_is_the_same_token_by_token(way: str) -> None:
    model, asked = tiny("llama"), asked_for(way)
    tensors = drawn(asked, model)
    for rows in (1, 2):
        batch = batch_of(rows)
        seen = batch["attention_mask"].bool()
        with running(model, "0-3", tensors, policy=asked) as handle:
            handle.prompt = PREFILL
            right = whole(model, batch)
            assert handle.trace.counts.to_dict()["simulated"] > 0 or "row" in way, "tokens pick differently"
            handle.prompt = None
            for cache, chunk in (("dynamic", 1), ("dynamic", 2), ("static", 1)):
                assert (stepped(model, batch, cache, chunk) - right)[seen].abs().max() <= 1e-4, (rows, cache, chunk)


def test_the_gradient_of_a_choice_is_that_of_the_mixture_of_all_modules() -> None:
    """By hand: x + sum_m w_m (f_m(x) - x), w one-hot with the gradient of softmax(s / T). All modules read one x."""
    model, ids, asked = tiny("llama"), batch_of(2)["input_ids"], "assembled:layers=1-2,steps=1,part=layer,temperature=2"
    tensors = drawn(asked, model)
    with running(model, "0-3", tensors, policy=asked, modules=True) as handle:
        with handle.learning(Learning()):
            logits = model(ids).logits
            logits.square().sum().backward()
        found = {name: one.grad.clone() for name, one in handle.tensors.items() if one.grad is not None}
    model.zero_grad()
    states = []
    for plan in ("0,3", "0,1,3", "0,2,3"):
        hook = (
            find_stack(model)
            .layer(3)
            .register_forward_pre_hook(
                lambda _, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
        )
        with torch.no_grad(), running(model, plan):
            model(ids)
        hook.remove()
    x, *made = states
    own = {name: one.clone().requires_grad_() for name, one in tensors.items()}
    scaled = x.float() * x.float().square().mean(-1, keepdim=True).rsqrt()
    gates = [f"pick-0l-{number}" for number in (0, 1)]
    scores = [scaled @ own[f"{gate}.weight"][0] + own[f"{gate}.bias"] for gate in gates]
    scores = torch.stack([*scores, torch.zeros_like(scores[0])], -1)
    soft = (scores / 2).softmax(-1)
    hot = torch.nn.functional.one_hot(scores.argmax(-1), 3)
    assert {0, 1, 2} == set(scores.argmax(-1).flatten().tolist())
    weights = hot + soft - soft.detach()
    state = x + sum(weights[..., [number]] * (one - x) for number, one in enumerate(made))
    with running(model, "0-3") as whole_model, whole_model.bound.executor().between(3, state):
        right = model(ids).logits
    torch.testing.assert_close(logits, right)
    right.square().sum().backward()
    model.zero_grad()
    for name, one in own.items():
        torch.testing.assert_close(found[name], one.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_who_took_the_way_out_takes_nothing_more() -> None:
    model, ids, asked = tiny("llama"), batch_of(2)["input_ids"], "assembled:part=layer"
    for ends in (False, True):
        own = f"{asked},ends={str(ends).lower()}"
        with torch.no_grad(), running(model, "0-3", drawn(asked, model), policy=own) as handle:
            model(ids)
            assert handle.deciding is not None and handle.deciding.executor is not None
            last = handle.deciding.executor.last
            assert last is not None
            none = torch.stack([last.notes[f"pick-{step}l"].number == 3 for step in range(3)]).int()
        assert bool((none.diff(dim=0) >= 0).all()) is ends, "without ends somebody comes back here"


def test_planted_each_token_gets_the_module_that_it_needs() -> None:
    """Texts of the lower half are written by layer 1, those of the upper half by layer 2; each has a step's attention
    and mlp to pick."""
    plans, model = ("0,1,3", "0,2,3"), two_orders(4.0)
    data, held = written(400, 9, plans, 4.0), written(64, 10, plans, 4.0)
    loaded = Loaded(model, None, "planted")
    asked = {"layers": "1-2", "steps": 1, "learn": "gates", "rate": 0.05, "temperature": 0.5}
    found = heal(
        loaded, Plan.identity(loaded.opened.spec), "mom", tokens=8000, batch=4, held=32, data=data_of(data),
        watch=data_of(data[:4]), settings=asked,
    )  # fmt: skip
    with torch.no_grad(), running(model, found.plan, found.weights, policy=found.policy) as handle:
        model(held)
        assert handle.deciding is not None and handle.deciding.executor is not None
        notes = handle.deciding.executor.last.notes  # type: ignore[union-attr]
    wanted = held >= HALF
    for place in ("pick-0a", "pick-0m"):
        assert (notes[place].number == wanted).float().mean() > 0.95, place
    lost = loss_of(held, found.plan, found.weights, found.policy, 4.0).mean()
    fixed = [loss_of(held, plan, strength=4.0) for plan in plans]
    best = torch.where(wanted[:, 0], fixed[1], fixed[0]).mean()
    assert lost - best < 0.1 * (min(one.mean() for one in fixed) - best)


# layers in any order


def test_all_orders_are_drawn_alike() -> None:
    """Chi-square over the 24 orders of four layers; 23 degrees of freedom exceed 49.7 once in a thousand."""
    with learner_of(deep(), "cross-entropy", shuffle="1-4", plan="0-5") as learner:
        assert learner.shuffling is not None
        drawn_orders = [tuple(learner.shuffling.order(1_000_003 + seed)) for seed in range(2400)]
        plan = str(learner.shuffling.plan(3))
    counts = torch.tensor([drawn_orders.count(one) for one in set(drawn_orders)]).float()
    assert len(counts) == 24
    assert float(((counts - 100).square() / 100).sum()) < 49.7
    assert plan.startswith("0,") and plan.endswith(",5") and plan != "0-5"


def test_a_drawn_order_is_its_plan_and_one_layer_has_one_order() -> None:
    model, batch = deep(), windows_of()
    losses, grads = {}, {}
    for shuffle in ("", "4", "all"):
        with learner_of(model, "cross-entropy", shuffle=shuffle) as learner:
            losses[shuffle] = learner(**batch)["loss"]
            order = learner.shuffling.plan(0) if learner.shuffling is not None else None
            grads[shuffle] = gradients(learner, batch, 4)
    assert torch.equal(losses["4"], losses[""]) and not torch.equal(losses["all"], losses[""])
    assert all(torch.equal(one, grads[""][name]) for name, one in grads["4"].items())
    with learner_of(model, "cross-entropy", plan=str(order)) as learner:
        assert torch.equal(learner(**batch)["loss"], losses["all"])


def test_layers_that_cannot_be_shuffled_are_refused() -> None:
    for shuffle, more, words in (
        ("2", {}, "layer 2"), ("all", {"policy": "dropped"}, "dropped"), ("all", {"fade": True}, "fade"),
    ):  # fmt: skip
        with (
            pytest.raises(UsageError, match=rf"U717.*{words}"),
            learner_of(deep(), "cross-entropy", shuffle=shuffle, **more),
        ):
            pass
    for term in ("order-mixture", "choice-use"):
        with (
            learner_of(deep(), term, policy="routed", learn=("gates",)) as learner,
            pytest.raises(UsageError, match="U675"),
        ):
            learner(**windows_of())


def test_what_was_shuffled_runs_in_any_order_and_without_a_layer(tmp_path: Any) -> None:
    """On texts of the model's own; and a run that was stopped goes on with the same bits."""
    data, held = written(300, 9, ("0-3", "0-3")), written(48, 10, ("0-3", "0-3"))
    loaded = Loaded(two_orders(), None, "planted")
    steps: list[int] = []

    def stop() -> bool:
        steps.append(1)
        return len(steps) == 40

    told: dict[str, Any] = {
        "tokens": 8000, "batch": 4, "held": 32, "data": data_of(data), "watch": data_of(data[:4]),
        "settings": {"learn": "all", "rate": 3e-3},
    }  # fmt: skip
    plan = Plan.identity(loaded.opened.spec)
    found = heal(loaded, plan, "shuffled", **told)
    assert heal(loaded, plan, "shuffled", folder=tmp_path / "run", stop=stop, **told).stopped
    again = heal(loaded, plan, "shuffled", folder=tmp_path / "run", resume=True, **told)
    assert all(torch.equal(again.weights[name], one) for name, one in found.weights.items())
    orders = [",".join(map(str, order)) for order in itertools.permutations(range(4)) if order != (0, 1, 2, 3)]
    cut = ["1-3", "0,2-3", "0-1,3", "0-2"]
    for plans in (orders, cut):
        before = torch.stack([loss_of(held, plan).mean() for plan in plans]).mean()
        after = torch.stack([loss_of(held, *with_own(found, plan)).mean() for plan in plans]).mean()
        assert after < 0.7 * before, (before, after)


def with_own(found: Healed, order: str) -> tuple[Plan, dict[str, torch.Tensor]]:
    """What has learned, in another order."""
    own = {run.layer: run for run in found.plan.steps() if isinstance(run, Run)}
    return found.plan.with_steps(tuple(own[run.layer] for run in parse_steps(order))), found.weights  # type: ignore[union-attr]
