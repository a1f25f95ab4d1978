"""A live plan under everything that people do to a model: generate, train, adapt, offload, compile, copy, give up."""

from __future__ import annotations

import copy
import inspect as python_inspect
import warnings
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from shoal.errors import PlanError
from shoal.executing.live import apply, running
from shoal.models.inspect import inspect
from shoal.models.stacks import find_stack
from shoal.plan import Plan, parse_plan
from shoal.writing.surgery import rewrite

from .families import VOCAB, tiny
from .references import by_hand

KV_SOURCE = {
    "llama": "0-2,3@1",
    "gpt2": "0-2,3@1",
    "qwen2": "0-1,2@0,3",
    "gemma3_text": "0-1,2@0,3",
    "jamba": "0-2,3@1",
}
PLANS = ("0-1,3", "1-3", "0,1x2,2-3", "0m,1-3", "KV source")
IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
PADDED = {"input_ids": IDS.clone(), "attention_mask": torch.ones_like(IDS)}
PADDED["input_ids"][1, :3], PADDED["attention_mask"][1, :3] = 0, 0


def own(family: str, attention: str = "sdpa") -> PreTrainedModel:
    """A copy that a test may change."""
    return copy.deepcopy(tiny(family, attention))


def plan_of(model: nn.Module, notation: str) -> Plan:
    return parse_plan(notation, Plan.identity(inspect(model)))


@torch.no_grad()
def logits(model: nn.Module, **kwargs: Any) -> torch.Tensor:
    return model(**({"input_ids": IDS, "use_cache": False} | kwargs)).logits


def code_of(model: nn.Module, plan: Plan | str, weights: Any = None, **kwargs: Any) -> str:
    with pytest.raises(PlanError) as caught, running(model, plan, weights):
        logits(model, **kwargs)
    return caught.value.code


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


@torch.no_grad()
def greedy_without_cache(model: PreTrainedModel, tokens: int) -> torch.Tensor:
    """[b, t + tokens] by whole forwards, positions counted from the first real token as `generate` does."""
    ids, mask = PADDED["input_ids"], PADDED["attention_mask"]
    positioned = "position_ids" in python_inspect.signature(model.forward).parameters
    for _ in range(tokens):
        places = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if positioned else {}
        best = model(input_ids=ids, attention_mask=mask, use_cache=False, **places).logits[:, -1].argmax(-1)
        ids, mask = torch.cat([ids, best[:, None]], 1), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", KV_SOURCE)
def test_generate_equals_a_greedy_loop_without_cache(family: str, plan: str) -> None:
    model = tiny(family)
    with running(model, KV_SOURCE[family] if plan == "KV source" else plan):
        expected = greedy_without_cache(model, 8)
        for kind in ("dynamic", "static"):
            found = model.generate(**PADDED, max_new_tokens=8, do_sample=False, cache_implementation=kind)
            assert torch.equal(found, expected), kind


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "qwen2"])
@pytest.mark.parametrize("plan", ["0-1,3", "0,1x2,2-3"])
def test_beams_and_prompt_lookup_equal_the_rewritten_stock_model(family: str, plan: str) -> None:
    model = tiny(family)
    stock = rewrite(model, plan_of(model, plan))
    repetitive = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    beams: dict[str, Any] = {**PADDED, "num_beams": 2}
    lookup: dict[str, Any] = {"input_ids": repetitive, "attention_mask": torch.ones_like(repetitive)}
    lookup["prompt_lookup_num_tokens"] = 3
    for settings in (beams, lookup):
        expected = stock.generate(**settings, max_new_tokens=10, do_sample=False)
        with running(model, plan):
            assert torch.equal(model.generate(**settings, max_new_tokens=10, do_sample=False), expected)


def test_an_own_cache_grows_right_with_and_without_a_config() -> None:
    model = tiny("llama")
    with running(model, "0,1x2,3"):
        whole = logits(model)
        for cache in (DynamicCache(), DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=12)):
            pieces = [IDS[:, :5], IDS[:, 5:6], IDS[:, 6:]]
            parts = [logits(model, input_ids=piece, past_key_values=cache, use_cache=True) for piece in pieces]
            torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
            assert [int(row.get_seq_length()) for row in cache.layers] == [9] * 4


def test_a_cache_that_is_not_empty_is_refused() -> None:
    model = tiny("llama")
    cache = DynamicCache(config=model.config)
    logits(model, past_key_values=cache, use_cache=True)
    assert code_of(model, "0-1,3", past_key_values=cache, use_cache=True) == "P123"
    cache = DynamicCache(config=model.config)
    with running(model, "0-1,3"):
        logits(model, past_key_values=cache, use_cache=True)
    assert code_of(model, "0,1x2,3", past_key_values=cache, use_cache=True) == "P123"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "jamba"])
@pytest.mark.parametrize("plan", ["0-1,3", "0,1x2,2-3"])
def test_hidden_states_have_one_entry_for_each_run(family: str, plan: str) -> None:
    model = tiny(family, "eager")
    inputs: list[torch.Tensor] = []
    layers = list(find_stack(model).layers)
    with torch.no_grad(), running(model, plan) as handle:
        handles = [layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for layer in layers]
        out = model(IDS, output_hidden_states=True)
    for hook in handles:
        hook.remove()
    assert len(out.hidden_states) == len(handle.plan.layers()) + 1
    assert all(torch.equal(got, put) for got, put in zip(out.hidden_states[:-1], inputs, strict=True))
    assert torch.equal(model.get_output_embeddings()(out.hidden_states[-1]), out.logits)


@pytest.mark.parametrize("family", ["bloom", "falcon", "gptj", "gpt_neo"])
def test_families_that_collect_in_their_loop_report_one_state_for_each_base_layer(family: str) -> None:
    """Their own loop appends the state at every tap: what a plan left out shows its input again, and of a repeat only
    what goes in shows. The last entry is right, and so is what a layer that runs in its own place is given."""
    model = tiny(family, "eager")
    with torch.no_grad():
        with running(model, "0-1,3"):
            dropped = model(IDS, output_hidden_states=True).hidden_states
        with running(model, "0,1x2,2-3"):
            out = model(IDS, output_hidden_states=True)
    repeated = out.hidden_states
    torch.testing.assert_close(model.get_output_embeddings()(repeated[-1]), out.logits, atol=1e-5, rtol=1e-5)
    assert len(dropped) == len(repeated) == 5
    assert torch.equal(dropped[2], dropped[3])
    assert torch.equal(repeated[1], dropped[1]) and not torch.equal(repeated[2], dropped[2])


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("plan", ["0-1,3", "0,1x2,2-3"])
def test_attentions_equal_those_of_the_rewritten_model(family: str, plan: str) -> None:
    model = tiny(family, "eager")
    stock = rewrite(model, plan_of(model, plan))
    stock.set_attn_implementation("eager")
    with torch.no_grad():
        expected = stock(IDS, output_attentions=True).attentions
        with running(model, plan):
            found = model(IDS, output_attentions=True).attentions
    assert len(found) == len(expected) > 2
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def in_training(family: str) -> PreTrainedModel:
    model = own(family)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if "dropout" in module.__dict__ and isinstance(module.dropout, float):
            module.dropout = 0.0
    return model.train()


def checkpointing(model: PreTrainedModel) -> None:
    # the older name is the one that transformers 5.20 knows
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


@pytest.mark.parametrize("family", ["llama", "gpt2", "jamba"])
@pytest.mark.parametrize(
    ("plan", "silent"),
    [("0-1,3", ("2.",)), ("0,1a,2-3", ("1.mlp.", "1.feed_forward.")), ("0,1x2,2-3", ()), ("0m,1-3", ("0.attn.",))],
)
def test_checkpointing_changes_no_gradient(family: str, plan: str, silent: tuple[str, ...]) -> None:
    model = in_training(family)
    prefix = find_stack(model).path + "."
    silent = (*silent, "0.self_attn.", "0.mamba.") if plan.startswith("0m") else silent
    with running(model, plan):
        plain = gradients(model)
        checkpointing(model)
        calls: list[int] = []
        child = next(c for n, c in find_stack(model).layer(1).named_children() if n in ("self_attn", "attn"))
        handle = child.register_forward_pre_hook(lambda *_: calls.append(1))
        again = gradients(model)
        handle.remove()
    assert len(calls) == (4 if "x2" in plan else 2), "the layer is replayed in backward"
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-5)
    missing = [n.removeprefix(prefix) for n, _ in model.named_parameters() if n not in plain and n.startswith(prefix)]
    norms = ("input_layernorm", "post_attention_layernorm", "pre_ff_layernorm", "ln_1", "ln_2")
    assert bool(missing) == bool(silent)
    assert all(name.startswith(silent) or name.split(".")[1] in norms for name in missing)
    ran = [n for n in plain if n.removeprefix(prefix).startswith(silent or "nothing")]
    assert ran == []


def test_a_kv_source_and_checkpointing_exclude_each_other() -> None:
    model = in_training("llama")
    with running(model, "0-2,3@1"):
        assert gradients(model)
        checkpointing(model)
        with pytest.raises(PlanError) as caught:
            gradients(model)
    assert caught.value.code == "P121"


def adapted(model: PreTrainedModel) -> Any:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    torch.manual_seed(0)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("plan", ["0-1,3", "0,1x2,2-3", "0,1a,2-3", "0-2,3@1"])
def test_lora_before_and_after_the_plan(plan: str) -> None:
    first, second = own("llama"), own("llama")
    with running(first, plan):
        bare = logits(first)
    planned_first = apply(first, plan)
    before, after = adapted(first), adapted(second)
    with running(after, plan):
        assert torch.equal(logits(before), logits(after))
        assert not torch.equal(logits(after), bare)
        for model in (before, after):
            with model.disable_adapter():
                assert torch.equal(logits(model), bare)
        found = [gradients(model) for model in (before, after)]
    planned_first.restore()
    assert found[0].keys() == found[1].keys()
    assert all("lora_" in name and gradient.abs().max() > 0 for name, gradient in found[0].items())
    trained = {int(name.split(".layers.")[1].partition(".")[0]) for name in found[0]}
    assert trained == set(plan_of(after, plan).layers())
    assert torch.equal(logits(before), logits(after))


def offloaded(model: PreTrainedModel, how: str, folder: Path) -> Any:
    if how == "cpu":
        return accelerate.cpu_offload(model, torch.device("cpu"))
    if how == "disk":
        return accelerate.disk_offload(model, str(folder), torch.device("cpu"))
    stack = find_stack(model)
    places = {name: "cpu" for name, child in model.named_modules() if not list(child.children())}
    inside = tuple(f"{stack.path}.{i}" for i in range(stack.depth))
    places = {name: place for name, place in places.items() if not name.startswith(inside)}
    places |= {name: "disk" if name[-1] in "12" else "cpu" for name in inside}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("how", ["cpu", "disk", "dispatch"])
@pytest.mark.parametrize("family", ["llama", "bloom", "jamba"])
def test_offloaded_models_run_plans(family: str, how: str, tmp_path: Path) -> None:
    base, model = tiny(family, "eager"), offloaded(own(family, "eager"), how, tmp_path)
    assert inspect(model).stacks == inspect(base).stacks
    plans = ("0-1,3", "1-3", "0,1x2,2-3", "0,1a,2-3", "0m,1-3", "0,2,1,3", "0-2,3@1", "0,~1-2,3")
    single = IDS[:1]
    for plan in plans:
        weights = {"map-1-2.weight": torch.eye(32) * 1.5} if "~" in plan else None
        with running(base, plan, weights), running(model, plan, weights):
            assert torch.equal(logits(model, input_ids=single), logits(base, input_ids=single)), plan


def test_replaced_weights_of_an_offloaded_layer_are_refused(tmp_path: Path) -> None:
    model = offloaded(own("llama"), "dispatch", tmp_path)
    weights = {f"a.{name}": tensor * 1.3 for name, tensor in tiny("llama").model.layers[1].state_dict().items()}
    layers = model.model.layers
    assert code_of(model, "0,1:a,2-3", weights) == "P124"
    assert model.model.layers is layers
    with running(model, "0:a,1-3", weights), running(base := tiny("llama"), "0:a,1-3", weights):
        assert torch.equal(logits(model), logits(base))


@pytest.mark.parametrize(
    ("family", "plan", "cached"),
    [
        ("llama", "0-1,3", True),
        ("llama", "0,1x2,2-3", False),
        ("llama", "0,1a,2-3", False),
        ("llama", "0-2,3@1", False),
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


@pytest.mark.parametrize("plan", ["0,1?g,2-3", "0-1,!early?g,2-3", "0-3,!end", "0,(1|2?g),3"])
def test_a_gate_that_nobody_decides_is_refused(plan: str) -> None:
    with pytest.raises(PlanError, match=r"P125: step .* is decided at run time"), running(tiny("llama"), plan):
        pass
