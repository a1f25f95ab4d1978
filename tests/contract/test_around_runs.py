"""Tensors around a run and beside its modules: live, cached, kept in a planned checkpoint, refused where they have no
place."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import shoal.auto
from shoal.deciding.policy import Policy
from shoal.errors import PlanError, WriteError
from shoal.executing.bind import bind
from shoal.live import apply, running
from shoal.models.inspect import inspect
from shoal.models.load import Loaded
from shoal.models.opened import open_model
from shoal.models.stacks import find_stack
from shoal.plan import Plan, cost, parse_plan, shapes_of
from shoal.writing.planned_folder import write_planned
from shoal.writing.surgery import rewrite

from .families import VOCAB, tiny
from .references import CLOSE
from .shares import every

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
FAMILIES = [
    "llama", "gpt2", "opt", "qwen2", "gemma3_text", "olmo2", "phi3", "stablelm", "cohere2", "gpt_neox", "granite",
    "mixtral",
]  # fmt: skip
assert shoal.auto


def own(family: str = "llama") -> Any:
    return copy.deepcopy(tiny(family))


def logits(model: Any, ids: torch.Tensor = IDS, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def size_of(model: Any) -> int:
    return inspect(model).stack().hidden


def around(hidden: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {
        "x.keeps": torch.tensor([0.7]),
        "x.reads.-1": torch.randn(hidden, generator=draw) * 0.1,
        "x.reads.0": torch.tensor([0.2]),
        "x.reads.1": torch.randn(hidden, hidden, generator=draw) * 0.05,
        "x.shift": torch.randn(hidden, generator=draw) * 0.1,
        "x.mixer.weight": torch.randn(1, hidden, generator=draw) * 0.3,
        "x.mixer.bias": torch.tensor([0.1]),
    }


def states_of(model: Any, ids: torch.Tensor = IDS) -> list[torch.Tensor]:
    """What goes into every layer."""
    seen: list[torch.Tensor] = []
    stack = find_stack(model)
    handles = [
        stack.layer(n).register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for n in range(stack.depth)
    ]
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", every(4, FAMILIES))
def test_what_stands_around_a_run_is_the_formula(family: str, tmp_path: Path) -> None:
    """Layer 2 is given keeps x + sum of reads.N h_N + shift, and what it does is weighed token by token; cached = whole
    = padded = reloaded, and the cost counts it."""
    model = own(family)
    hidden = size_of(model)
    weights = around(hidden)
    before = states_of(model)
    plan = parse_plan("0-1,2:x,3", Plan.identity(inspect(model)))
    seen: dict[str, torch.Tensor] = {}
    layer, last = find_stack(model).layer(2), find_stack(model).layer(3)

    def note(name: str) -> Any:
        def hook(_: Any, args: Any, kwargs: Any, *out: Any) -> None:
            seen[name] = args[0] if args else kwargs["hidden_states"]
            if out:
                seen["out"] = out[0][0] if isinstance(out[0], tuple) else out[0]

        return hook

    with running(model, plan, weights):
        handles = [
            layer.register_forward_hook(note("in"), with_kwargs=True),
            last.register_forward_pre_hook(note("next"), with_kwargs=True),
        ]
        found = logits(model)
        for handle in handles:
            handle.remove()
        cache = DynamicCache(config=model.config)
        steps = [logits(model, IDS[:, n : n + 1], past_key_values=cache) for n in range(IDS.shape[1])]
        pad = torch.cat([IDS.new_full((2, 2), 1), IDS], 1)
        mask = torch.cat([IDS.new_zeros(2, 2), torch.ones_like(IDS)], 1)
        padded = logits(model, pad, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    given = before[2] * 0.7 + before[0] * weights["x.reads.-1"] + before[1] * 0.2 + weights["x.shift"]
    given = given + before[2] @ weights["x.reads.1"].T
    torch.testing.assert_close(seen["in"], given, **CLOSE)
    share = ((given @ weights["x.mixer.weight"].T + weights["x.mixer.bias"]).tanh() + 1) / 2
    torch.testing.assert_close(seen["next"], given + share * (seen["out"] - given), **CLOSE)
    torch.testing.assert_close(torch.cat(steps, 1), found, **CLOSE)
    torch.testing.assert_close(padded[:, 2:], found, **CLOSE)
    write_planned(Loaded(model, None, "tiny"), plan, tmp_path / "one", weights=weights, prove=False)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    torch.testing.assert_close(logits(made), found, **CLOSE)
    base, priced = inspect(model), cost(plan, inspect(model), weights=shapes_of(weights))
    assert priced.params == base.params + sum(t.numel() for t in weights.values())
    more = 2 * (weights["x.reads.1"].numel() + hidden)
    assert priced.decode_flops == cost(Plan.identity(base), base).decode_flops + more
    with pytest.raises(WriteError) as caught:
        rewrite(model, plan, weights=weights)
    assert caught.value.code == "W287"


@pytest.mark.parametrize("family", every(4, FAMILIES))
def test_the_null_setting_is_the_model_bit_for_bit(family: str) -> None:
    model = own(family)
    hidden = size_of(model)
    null = {"x.keeps": torch.ones(1), "x.reads.0": torch.zeros(1), "x.shift": torch.zeros(hidden)}
    want = logits(model)
    with running(model, "0-1,2:x,3", null):
        assert torch.equal(logits(model), want)
    with running(model, "0-1,2:x,3", {"x.change": torch.ones(1)}):
        torch.testing.assert_close(logits(model), want, **CLOSE)
    with running(model, "0-1,2"):
        dropped = logits(model)
    for nothing in ({"x.change": torch.zeros(hidden)}, {"x.mixer.weight": torch.zeros(1, hidden),
                                                        "x.mixer.bias": torch.full((1,), -40.0)}):  # fmt: skip
        with running(model, "0-2,3:x", nothing):
            torch.testing.assert_close(logits(model), dropped, **CLOSE)


@pytest.mark.parametrize("family", every(3, FAMILIES))
def test_a_scale_and_a_shift_beside_a_module(family: str, tmp_path: Path) -> None:
    """y * scale + shift, live, planned and folded into a stock model where there is a bias to hold the shift."""
    model = own(family)
    layer, by_hand, draw = find_stack(model).layer(2), own(family), torch.Generator().manual_seed(4)
    linear = {
        name: module
        for name, module in layer.named_modules()
        if getattr(module, "weight", None) is not None and module.weight.dim() == 2
        and type(module).__name__ in ("Linear", "Conv1D")
    }  # fmt: skip
    weights = {}
    for name, module in linear.items():
        turned = type(module).__name__ == "Conv1D"
        out = module.weight.shape[1 if turned else 0]
        scale = torch.rand(out, generator=draw) + 0.5
        target = find_stack(by_hand).layer(2).get_submodule(name)
        target.weight.data.mul_(scale if turned else scale[:, None])
        weights[f"x.{name}.scale"] = scale
        if module.bias is not None:
            shift = torch.randn(out, generator=draw) * 0.1
            target.bias.data.mul_(scale).add_(shift)
            weights[f"x.{name}.shift"] = shift
    want, plan = logits(by_hand), parse_plan("0-1,2:x,3", Plan.identity(inspect(model)))
    with running(model, plan, weights):
        torch.testing.assert_close(logits(model), want, **CLOSE)
    torch.testing.assert_close(logits(rewrite(model, plan, weights=weights)), want, **CLOSE)
    write_planned(Loaded(model, None, "tiny"), plan, tmp_path / "one", weights=weights, prove=False)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "one")), want, **CLOSE)
    assert cost(plan, inspect(model), weights=shapes_of(weights)).params == inspect(model).params + sum(
        t.numel() for t in weights.values()
    )


def test_a_loop_that_is_given_the_embeddings_again() -> None:
    """Input injection: `0,1,2:x,1:x,2:x,3`, each run of x with h_-1 added, in a forward and token by token."""
    model = own()
    weights = {"x.reads.-1": torch.tensor([0.3])}
    with running(model, "0,1:x,2:x,1:x,2:x,3", weights):
        found = logits(model)
        cache = DynamicCache()
        steps = [logits(model, IDS[:, n : n + 1], past_key_values=cache) for n in range(IDS.shape[1])]
    torch.testing.assert_close(torch.cat(steps, 1), found, **CLOSE)
    with running(model, "0,1,2,1,2,3"):
        assert not torch.allclose(logits(model), found)


def test_they_learn(tmp_path: Path) -> None:
    """Gradients reach every tensor around a run, under gradient checkpointing too, and agree there."""
    model = own()
    weights = {name: t.clone().requires_grad_() for name, t in around(size_of(model)).items()}
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable()
        model.train(checkpointed)
        for one in weights.values():
            one.grad = None
        with running(model, "0-1,2:x,3", weights):
            model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        found.append({name: one.grad.clone() for name, one in weights.items()})
    for name, grad in found[0].items():
        assert bool(grad.any()), name
        torch.testing.assert_close(found[1][name], grad, **CLOSE)


def test_what_does_not_fit_is_refused_by_name() -> None:
    model = own()
    hidden = size_of(model)
    for tensors, words in (
        ({"x.keeps": torch.ones(3)}, "keeps is [3]"),
        ({"x.shift": torch.ones(1)}, "shift is [1]"),
        ({"x.reads.3": torch.ones(1)}, "behind layer 3, which does not run before"),
        ({"x.reads.2": torch.ones(1)}, "behind layer 2, which does not run before"),
        ({"x.reads.-2": torch.ones(1)}, "no tensor reads.-2"),
        ({"x.mixer.bias": torch.ones(1)}, "mixer.weight"),
        ({"x.change": torch.ones(1), "x.mixer.weight": torch.ones(1, hidden)}, "give one"),
        ({"x.mlp.down_proj.scale": torch.ones(3)}, "down_proj.scale is [3]"),
        ({"x.input_layernorm.scale": torch.ones(hidden)}, "no matrix input_layernorm.weight"),
    ):
        with pytest.raises(PlanError) as caught:
            apply(model, "0-1,2:x,3", tensors)
        assert caught.value.code == "P129"
        assert words in str(caught.value), str(caught.value)
    with pytest.raises(PlanError) as caught:
        apply(model, "0-1,2:x,3", {"x.change": torch.ones(1)}, modules=True)
    assert caught.value.code == "P157"
    with pytest.raises(WriteError) as told:
        rewrite(model, "0-1,2:x,3", weights={"x.mlp.down_proj.shift": torch.ones(hidden)})
    assert told.value.code == "W287"


class _Some(Policy):
    """A gated step runs for the tokens in even columns."""

    def should_run(self, run: Any, forward: Any, hidden: torch.Tensor) -> Any:
        return forward.each(lambda column: column % 2 == 0, hidden.device)


@pytest.mark.parametrize("fill", ["project", "mask", "copy"])
def test_under_a_policy_what_stands_around_a_run_is_for_its_tokens_alone(fill: str) -> None:
    """Tokens that skip the run keep their state, and their keys and values are made of what the run would be given."""
    model = own()
    weights = around(size_of(model))
    plan = parse_plan(f"0-1,2:x?g/{fill},3", Plan.identity(inspect(model)))
    with running(model, plan, weights, policy=_Some(plan)):
        whole = logits(model)
        cache = DynamicCache(config=model.config)
        steps = [logits(model, IDS[:, n : n + 1], past_key_values=cache) for n in range(IDS.shape[1])]
    torch.testing.assert_close(torch.cat(steps, 1), whole, **CLOSE)
    with running(model, "0-1,2:x,3", weights):
        first = logits(model, IDS[:, :1])
    torch.testing.assert_close(whole[:, :1], first, **CLOSE)


def test_beside_a_later_source_a_prompt_is_token_by_token() -> None:
    """States are noted anew in each pass."""
    model = own()
    weights = around(size_of(model))
    with running(model, "0,1@3,2:x,3", weights):
        found = logits(model)
        cache = DynamicCache(config=model.config)
        steps = [logits(model, IDS[:, n : n + 1], past_key_values=cache) for n in range(IDS.shape[1])]
    torch.testing.assert_close(torch.cat(steps, 1), found, **CLOSE)


def test_a_step_that_reads_other_states_does_not_run_alone() -> None:
    """P170, where a fit or a loss block by block asks for it; a step that reads none does."""
    model = own()
    plan = parse_plan("0-1,2:x,3", Plan.identity(inspect(model)))
    for tensors, alone in (({"x.change": torch.ones(1)}, True), ({"x.reads.0": torch.ones(1)}, False)):
        bound = bind(open_model(model), plan, tensors)
        with bound.running(), torch.no_grad():
            executor = bound.executor()
            forward = executor.prepared(lambda: model(input_ids=IDS, use_cache=False))
            state = torch.randn(2, IDS.shape[1], size_of(model))
            with nullcontext() if alone else pytest.raises(PlanError, match="P170"):
                executor.run_step(executor.steps[2], state, forward)
