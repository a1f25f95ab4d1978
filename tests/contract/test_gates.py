"""Gates that learn: on a layer that half of the tokens do not need, by every recipe; saved, cached and read again."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.api.heal import Healed, heal
from shoal.api.heal_publish import publish_healed
from shoal.data import Data
from shoal.deciding.learning import Learning
from shoal.deciding.policies.routed import Routed
from shoal.deciding.policy_text import make_policy
from shoal.errors import UsageError
from shoal.executing.weights import load_weights
from shoal.fitting.result import Job
from shoal.live import apply, running
from shoal.models.load import Loaded
from shoal.models.opened import open_model
from shoal.models.stacks import find_stack
from shoal.plan import Plan, load_plan
from shoal.transforms.close_gates import close_gates

from .families import VOCAB, tiny
from .planted import data_of
from .shares import every
from .test_policies import stepped, whole

USEFUL = 2
"""The layer that half of the tokens need."""
HALF = VOCAB // 2
SEED = 0


@cache
def half_useful(marked: bool = False) -> Any:
    """A model whose layer `USEFUL` changes the tokens of the upper half of the vocabulary, much, and no other.

    The first number of a state says which half its token is of; the layer's mlp is shut where it is negative. `marked`:
    a token is followed by one of its own half.
    """
    model: Any = copy.deepcopy(tiny("llama"))
    hidden = model.config.hidden_size
    model.tie_weights = lambda *_, **__: None
    with torch.no_grad():
        embedded = model.get_input_embeddings().weight
        embedded[:, 0] = torch.where(torch.arange(VOCAB) < HALF, -4.0, 4.0)
        for number, layer in enumerate(find_stack(model).layers):
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                weight = layer.get_submodule(name).weight
                weight.mul_(0.1)
                weight[0] = 0.0  # nobody changes the mark
            if number == USEFUL:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.gate_proj.weight.zero_()
                layer.mlp.gate_proj.weight[:, 0] = 20.0
                drawn = torch.randn(
                    hidden, layer.mlp.down_proj.in_features, generator=torch.Generator().manual_seed(SEED)
                )
                layer.mlp.down_proj.weight.copy_(drawn * 0.3)
                layer.mlp.down_proj.weight[0] = 0.0
        if marked:
            model.lm_head.weight[:, 0] = torch.where(torch.arange(VOCAB) < HALF, -1.5, 1.5)
    return model


def foreseen(count: int) -> Data:
    """What the model writes, each sequence in one half: of the upper half nothing is right without the layer."""
    begun = torch.randint(3, VOCAB, (count, 1), generator=torch.Generator().manual_seed(9))
    written = half_useful(marked=True).generate(begun, max_new_tokens=15, do_sample=False)
    assert (upper(written) == upper(begun)).all()
    return data_of(written)


def upper(ids: torch.Tensor) -> torch.Tensor:
    return ids >= HALF


def text(count: int = 24, length: int = 16) -> Data:
    return data_of(torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(7)))


def healed(recipe: str, tokens: int = 6000, *, rows: bool = False, data: Data | None = None, **settings: Any) -> Healed:
    loaded = Loaded(half_useful(marked=data is not None), None, "planted")
    return heal(
        loaded, Plan.identity(loaded.opened.spec), recipe, settings=settings, tokens=tokens, batch=4, held=32,
        data=data or text(400), watch=text(4),
    )  # fmt: skip


def open_at(found: Healed, data: Data) -> torch.Tensor:
    """Which tokens run the planted layer."""
    seen: list[torch.Tensor] = []
    with running(found.loaded.model, found.plan, found.weights, policy=found.policy) as handle, torch.no_grad():
        policy = handle.policy
        assert policy is not None
        real = policy.should_run

        def noted(run: Any, forward: Any, hidden: torch.Tensor) -> Any:
            answer = real(run, forward, hidden)
            if run.layer == USEFUL and run.part != "attention":
                hard: Any = getattr(answer, "hard", answer)
                seen.append(hard.expand(len(data.ids), -1))
            return answer

        policy.should_run = noted  # type: ignore[method-assign]
        found.loaded.model(data.ids)
        policy.should_run = real  # type: ignore[method-assign]
        depth = handle.trace.counts.asked / handle.trace.counts.tokens
    assert depth <= 4
    return seen[0]


ONE = {"layers": str(USEFUL), "rate": 0.05}
TOKENS: dict[str, dict[str, Any]] = {
    "skip-layer": {**ONE, "target": 0.875, "recover": "gates"},
    "mod": {**ONE, "capacity": 0.5, "learn": "gates"},
    "dlo": {**ONE, "capacity": 0.5, "learn": "gates"},
    "skip-gpt": {"rate": 0.05, "target": 0.9375, "recover": "gates", "initial_bias": 2},
}
"""Recipes that choose tokens; half of them are not to run one layer of four, or its mlp."""
ROWS: dict[str, dict[str, Any]] = {
    "first": {**ONE, "skip": 0.3, "recover": "gates", "initial_bias": 2},
    "had-skip": {**ONE, "most": 0.875, "learn": "gates", "initial_bias": 2},
    "conv-aig": {**ONE, "target": 0.5, "strength": 1.0, "initial_bias": 2},
    "skip-net": {**ONE, "cost": 0.3, "initial_bias": 2},
    "block-drop": {**ONE, "cost": 0.3, "initial_bias": 2},
}
"""Recipes that choose sequences."""


@pytest.mark.parametrize("recipe", every(3, sorted({**TOKENS, **ROWS})))
def test_a_gate_finds_the_tokens_that_need_its_layer(recipe: str) -> None:
    """And leaves out the others: the density is theirs."""
    given, held = (foreseen(400), foreseen(64)) if recipe in ROWS else (None, text(64))
    found = healed(recipe, 12_000, data=given, **{**TOKENS, **ROWS}[recipe])
    asked, wanted = open_at(found, held).float(), upper(held.ids).float()
    assert (asked == wanted).float().mean() > 0.95
    assert abs(asked.mean() - wanted.mean()) < (0.03 if recipe == "mod" else 0.02)


def test_what_has_learned_is_read_again_and_cached(tmp_path: Path) -> None:
    """The folder has plan, tensors and policy; a pass is a prefill and steps; another plan or other tensors are
    refused."""
    found = healed("skip-layer", 3000, **TOKENS["skip-layer"])
    place = publish_healed(found, tmp_path / "routed", anyway=True)
    assert isinstance(place, Path)
    policy, model = str(place / "shoal" / "policy.json"), found.loaded.model
    plan, tensors = load_plan(place), load_weights(place)
    assert plan == found.plan and tensors.keys() == found.weights.keys()
    batch = {"input_ids": text(2, 12).ids, "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    with running(model, plan, tensors, policy=policy):
        one, steps = whole(model, batch), stepped(model, batch, "dynamic")
    assert (one - steps).abs().max() < 1e-5
    with running(model, found.plan, found.weights, policy=found.policy):
        assert torch.equal(whole(model, batch), one)
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    with pytest.raises(UsageError, match="U605"):
        apply(model, plan, other, policy=policy)
    with pytest.raises(UsageError, match="U605"):
        apply(model, "0-1,3", policy=policy)
    with pytest.raises(UsageError, match=r"U604.*no thresholds"):
        apply(model, plan, tensors, policy=f"calibrated:file={policy}")


@pytest.mark.parametrize("grain", ["token", "row", "none"])
@pytest.mark.parametrize("net", ["linear", "mlp"])
def test_open_gates_are_the_dense_model_and_closed_ones_the_plan_without_their_layers(grain: str, net: str) -> None:
    """Bit for bit, with tensors that have learned nothing but that."""
    model, batch = tiny("llama"), {"input_ids": text(2, 12).ids}
    asked = f"routed:layers=1-2,grain={grain},net={net}"
    policy = make_policy(asked, Plan.identity(open_model(model).spec), open_model(model).spec)
    tensors = policy.start(open_model(model).spec)
    for bias, static in ((20.0, "0-3"), (-20.0, "0,3")):
        own = {name: torch.tensor([bias]) if name.endswith("bias") else one for name, one in tensors.items()}
        with torch.no_grad(), running(model, "0-3", own, policy=asked):
            got = model(**batch).logits
        with torch.no_grad(), running(model, static):
            assert torch.equal(got, model(**batch).logits), (grain, net, static)


class Ranked(Routed):
    """Mixture-of-Depths as it is trained: behind training too a row's tokens are ranked."""

    def _hard(self, scores: torch.Tensor, causal: torch.Tensor | None) -> Any:
        hard = torch.zeros_like(scores, dtype=torch.bool)
        return hard.scatter(-1, scores.topk(max(1, scores.shape[-1] // 2), -1).indices, value=True)


def test_a_ranking_of_all_tokens_is_not_causal_and_its_predictor_is() -> None:
    found = healed("mod", 3000, **TOKENS["mod"])
    model, batch = found.loaded.model, {"input_ids": text(2, 12).ids}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    made = make_policy(found.policy, found.plan, found.loaded.opened.spec)
    assert isinstance(made, Routed)
    errors = []
    for policy in (made, Ranked(made.plan, made.options)):
        with running(model, found.plan, found.weights, policy=policy):
            errors.append((whole(model, batch) - stepped(model, batch, "dynamic")).abs().max().item())
    assert errors[0] < 1e-5
    assert errors[1] > 0.1


def test_gates_are_modules_that_learn() -> None:
    """As `shoal.apply(..., modules=True)` makes them: parameters of the model, with their gradients."""
    model, spec = tiny("llama"), open_model(tiny("llama")).spec
    tensors = make_policy("routed", Plan.identity(spec), spec).start(spec)
    with running(model, "0-3", tensors, policy="routed", modules=True) as handle:
        with handle.learning(Learning(progress=0.5)):
            model(text(2).ids).logits.sum().backward()
        own = {name: one for name, one in handle.tensors.items() if name.startswith("route-")}
        assert own.keys() == tensors.keys()
        assert all(one.grad is not None and float(one.grad.abs().max()) > 0 for one in own.values())
    model.zero_grad()


def test_gates_that_read_nothing_become_a_static_plan() -> None:
    found = healed("fold-gates", 6000, target=0.75, rate=0.3, recover="all")
    assert len(found.plan.layers()) == 3 and not found.policy
    assert [stage.get("transform") for stage in found.stages] == [None, "close-gates", None]


@pytest.mark.parametrize("closed", [(), (1,), (1, 3)])
def test_closing_gates_changes_no_bit(closed: tuple[int, ...]) -> None:
    """The static plan computes what the gated one did; a gate that reads its input, or none, is refused."""
    model, spec, ids = tiny("llama"), open_model(tiny("llama")).spec, text(2, 12).ids
    policy = make_policy("routed:grain=none", Plan.identity(spec), spec)
    tensors = {f"route-{layer}.bias": torch.tensor([-1.0 if layer in closed else 1.0]) for layer in (1, 2, 3)}
    made = close_gates(Job(model, text(2), policy.plan, tensors))
    assert made.plan.dropped() == closed
    with torch.no_grad(), running(model, policy.plan, tensors, policy="routed:grain=none"):
        gated = model(ids).logits
    with torch.no_grad(), running(model, made.plan):
        assert torch.equal(model(ids).logits, gated)
    reading = {**tensors, "route-2.weight": torch.zeros(1, 32)}
    with pytest.raises(UsageError, match=r"U712.*route-2"):
        close_gates(Job(model, text(2), policy.plan, reading))
    with pytest.raises(UsageError, match=r"U712.*no gates"):
        close_gates(Job(model, text(2), made.plan, {}))


def test_no_gate_learns_without_a_policy() -> None:
    with pytest.raises(UsageError, match=r"U675.*no policy"):
        healed_by_hand(learn=["gates"])
    with pytest.raises(UsageError, match=r"U675.*density"):
        healed_by_hand(terms=["density"])


def healed_by_hand(**asked: Any) -> Healed:
    return heal(Loaded(half_useful(), None, "planted"), "0-1,3", tokens=100, data=text(), watch=text(4), **asked)


def test_what_is_drawn_is_the_same_after_a_stop(tmp_path: Path) -> None:
    """Gumbel noise and the mean density of the step before among it."""
    asked = {**TOKENS["skip-layer"], "target": 0.8}
    loaded = Loaded(half_useful(), None, "planted")
    told: dict[str, Any] = {"settings": asked, "tokens": 1600, "batch": 2, "accumulate": 2, "held": 4,
                            "data": text(200), "watch": text(4)}  # fmt: skip
    steps: list[int] = []

    def stop() -> bool:
        steps.append(1)
        return len(steps) == 9

    plan = Plan.identity(loaded.opened.spec)
    straight = heal(loaded, plan, "skip-layer", **told)
    half = heal(loaded, plan, "skip-layer", folder=tmp_path / "run", stop=stop, **told)
    assert half.stopped
    again = heal(loaded, plan, "skip-layer", folder=tmp_path / "run", resume=True, **told)
    assert again.weights.keys() == straight.weights.keys()
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in straight.weights.items())
