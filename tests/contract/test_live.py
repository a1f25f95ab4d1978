"""A live plan put on, run, copied, compiled and taken off again: the model stays the user's."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from typing import Any

import pytest
import torch

from shoal.errors import PlanError
from shoal.live import running
from shoal.models.stacks import find_stack

from .families import tiny
from .live_models import IDS, PADDED, code_of, logits, own, plan_of
from .references import by_hand


@pytest.mark.parametrize("family", ["llama", "gpt2", "jamba"])
def test_restore_is_bit_exact_and_gives_the_very_list_back(family: str) -> None:
    model = own(family)
    stack = find_stack(model)
    layers, before = stack.layers, logits(model)
    with running(model, "0m,1x2,3") as handle:
        assert not torch.equal(logits(model), before)
    assert stack.layers is layers and torch.equal(logits(model), before)
    handle.restore()
    assert stack.layers is layers


def test_an_error_inside_the_block_restores_too() -> None:
    model = own("llama")
    layers, before = model.model.layers, logits(model)

    def fail_in_attention() -> None:
        with running(model, "0,1a,3"):
            handle = layers[1].self_attn.register_forward_pre_hook(lambda *_: 1 / 0)
            try:
                logits(model)
            finally:
                handle.remove()

    with pytest.raises(ZeroDivisionError):
        fail_in_attention()
    assert model.model.layers is layers and torch.equal(logits(model), before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_names_class_and_config_do_not_change(family: str) -> None:
    model = own(family)

    def face() -> Any:
        state = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
        return type(model), [name for name, _ in model.named_modules()], state, model.config.to_dict()

    before, config = face(), model.config
    with running(model, "1x2,3"):
        assert face() == before and model.config is config
        logits(model)
        assert face() == before
    assert face() == before


def test_a_plan_object_and_its_notation_are_the_same() -> None:
    model = tiny("llama")
    plan = plan_of(model, "0,2,1,3")
    with running(model, plan) as handle:
        first = logits(model)
        assert (handle.model, handle.plan) == (model, plan)
    with running(model, "0,2,1,3"):
        assert torch.equal(logits(model), first)


def test_a_second_plan_on_top_is_refused_and_leaves_the_first_alone() -> None:
    model = own("llama")
    with running(model, "0-1,3"):
        first = logits(model)
        assert code_of(model, "0-2") == "P122"
        assert torch.equal(logits(model), first)


def test_a_plan_for_another_model_is_refused() -> None:
    assert code_of(tiny("llama"), plan_of(tiny("gpt2"), "0-1,3")) == "P101"


def test_copies_are_independent_after_and_during_a_plan() -> None:
    model = own("llama")
    with running(model, "0,1x2,3"):
        planned = logits(model)
        during = copy.deepcopy(model)
        with torch.no_grad():
            during.model.layers._modules["1"].mlp.down_proj.weight.zero_()
        assert not torch.equal(logits(during), planned)
        assert torch.equal(logits(model), planned)
    after = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    with running(after, "0,1x2,3"):
        assert torch.equal(logits(after), planned)


def test_nothing_of_a_forward_outlives_it() -> None:
    model = own("llama")
    seen: list[Any] = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
    with running(model, "1,0,2,3@1"):
        logits(model)
        assert seen and all(ref() is None for ref in seen)
    handle.remove()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize(
    ("plan", "calls"),
    [("0-3", (1, 1, 1, 1)), ("1-2", (0, 1, 1, 0)), ("0,1x3,3", (1, 3, 0, 1)), ("0,(1|2),1,3", (1, 2, 1, 1))],
)
def test_layers_are_called_as_often_as_the_plan_says(family: str, plan: str, calls: tuple[int, ...]) -> None:
    model = tiny(family, "eager")
    counted: Counter[int] = Counter()
    layers = list(find_stack(model).layers)
    with running(model, plan):
        handles = [
            layer.register_forward_hook(lambda *_, index=index: counted.update([index]))
            for index, layer in enumerate(layers)
        ]
        logits(model)
    for handle in handles:
        handle.remove()
    assert tuple(counted[i] for i in range(4)) == calls


def test_a_low_rank_map_adds_to_its_input() -> None:
    model, generator = tiny("llama"), torch.Generator().manual_seed(3)
    down, up = torch.randn(4, 32, generator=generator) * 0.3, torch.randn(32, 4, generator=generator) * 0.3
    bias = torch.linspace(-0.1, 0.1, 32)
    expected = by_hand(model, {"input_ids": IDS}, lambda call, h: call(3, (g := call(0, h)) + g @ down.T @ up.T + bias))
    with running(model, "0,~1-2,3", {"map-1-2.down": down, "map-1-2.up": up, "map-1-2.bias": bias}):
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


def test_a_map_can_be_a_feed_forward_net() -> None:
    model, generator = tiny("llama"), torch.Generator().manual_seed(3)
    gate, down = (torch.randn(4, 32, generator=generator) * 0.3 for _ in range(2))
    up = torch.randn(32, 4, generator=generator) * 0.3
    net = {"map-1-2.gate": gate, "map-1-2.up": up}
    for weights, inner in (
        (net, lambda h: torch.nn.functional.silu(h @ gate.T)),
        (net | {"map-1-2.down": down}, lambda h: torch.nn.functional.silu(h @ gate.T) * (h @ down.T)),
    ):
        expected = by_hand(model, {"input_ids": IDS}, lambda call, h, f=inner: call(3, (g := call(0, h)) + f(g) @ up.T))
        with running(model, "0,~1-2,3", weights):
            torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


def test_one_layer_can_run_with_several_weights() -> None:
    model = own("llama")
    layer = model.model.layers[1]
    sets = {name: {k: v * scale for k, v in layer.state_dict().items()} for name, scale in (("a", 1.3), ("b", 0.6))}
    weights = {f"{name}.{k}": v for name, tensors in sets.items() for k, v in tensors.items()}
    others = {name: copy.deepcopy(layer) for name in sets}
    for name, other in others.items():
        other.load_state_dict(sets[name])
    mixed = copy.deepcopy(model)
    mixed.model.layers[1], mixed.model.layers[2] = others["a"], others["b"]
    with running(model, "0,1:a,1:b,3", weights):
        assert torch.equal(logits(model), logits(mixed))
        generated = model.generate(**PADDED, max_new_tokens=5, do_sample=False)
    assert all(torch.equal(v, tiny("llama").model.layers[1].state_dict()[k]) for k, v in layer.state_dict().items())
    for slot in (1, 2):
        mixed.model.layers[slot].self_attn.layer_idx = slot
    assert torch.equal(generated, mixed.generate(**PADDED, max_new_tokens=5, do_sample=False))


@pytest.mark.parametrize("family", ["llama", "qwen2", "bloom"])
def test_a_parallel_group_can_average(family: str) -> None:
    model = tiny(family, "eager")

    def chain(call: Any, h: torch.Tensor) -> torch.Tensor:
        h = call(0, h)
        return call(3, h + ((call(1, h) - h) + (call(2, h) - h)) / 2)

    with running(model, "0,(1|2)mean,3"):
        torch.testing.assert_close(logits(model), by_hand(model, {"input_ids": IDS}, chain), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "plan", "cached"),
    [
        ("llama", "0-1,3", True),
        pytest.param("llama", "0,1x2,2-3", False, marks=pytest.mark.slow),
        pytest.param("llama", "0,1a,2-3", False, marks=pytest.mark.slow),
        pytest.param("llama", "0-2,3@1", False, marks=pytest.mark.slow),
        ("gemma3_text", "0,(1|2),3", False),
        ("gpt2", "0m,2,1,3", False),
    ],
)
def test_compiled_plans_are_captured_whole(family: str, plan: str, cached: bool) -> None:
    model = own(family)
    torch.compiler.reset()
    with running(model, plan):
        expected = logits(model, use_cache=cached)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(logits(compiled, use_cache=cached), expected, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("plan", ["0,1?g,2-3", "0-1,!early?g,2-3", "0-3,!end?g", "0,(1|2?g),3"])
def test_a_gate_that_nobody_decides_is_refused(plan: str) -> None:
    with pytest.raises(PlanError, match=r"P125: step .* is decided at run time"), running(tiny("llama"), plan):
        pass


def test_an_exit_at_the_end_without_a_gate_is_the_end() -> None:
    """Nobody is asked: the model's own head reads the last state."""
    model = tiny("llama")
    want = logits(model)
    with running(model, "0-3,!end"):
        assert torch.equal(logits(model), want)
