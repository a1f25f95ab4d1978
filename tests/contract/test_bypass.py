"""Parallel groups with a bypass: an mlp sees its own attention and the earlier ones, whatever the cache and the
padding."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from shoal.live import running
from shoal.models.inspect import inspect
from shoal.models.stacks import find_stack
from shoal.plan import Parallel, Plan, Run, capabilities, check, drop, parse_plan, strip

from .families import tiny

FAMILIES = ("llama", "gpt2", "gemma3_text", "gpt_neox", "qwen2")


def plan_of(family: str, text: str) -> Plan:
    return parse_plan(text, Plan.identity(inspect(tiny(family))))


@torch.no_grad()
def test_the_first_mlp_does_not_see_the_later_attention() -> None:
    """Layer 2's attention writes what layer 1's mlp would notice: in float64, by hand, h [1, 6, hidden]."""
    model: Any = copy.deepcopy(tiny("llama")).double()
    ids = torch.arange(3, 9)[None]
    calls: dict[str, torch.Tensor] = {}
    layers = find_stack(model).layers
    handles = [
        layers[n].mlp.register_forward_pre_hook(lambda _, args, n=n: calls.__setitem__(f"mlp {n}", args[0].clone()))
        for n in (1, 2)
    ]
    with running(model, "0,(1|2)bypass,3"):
        found = model(input_ids=ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    x: Any = None

    def keep(_: Any, args: Any, kwargs: Any) -> None:
        nonlocal x
        x = args[0] if args else kwargs["hidden_states"]

    handle = layers[1].register_forward_pre_hook(keep, with_kwargs=True)
    model(input_ids=ids, use_cache=False)
    handle.remove()
    position = model.model.rotary_emb(x, torch.arange(6)[None])
    mask = torch.full((1, 1, 6, 6), float("-inf"), dtype=torch.float64).triu(1)
    attended = [
        one.self_attn(one.input_layernorm(x), position_embeddings=position, attention_mask=mask)[0]
        for one in (layers[1], layers[2])
    ]
    seen = x + attended[0], x + attended[0] + attended[1]
    for n, state in zip((1, 2), seen, strict=True):
        torch.testing.assert_close(calls[f"mlp {n}"], layers[n].post_attention_layernorm(state), rtol=1e-9, atol=1e-12)
    last = seen[1] + layers[1].mlp(calls["mlp 1"]) + layers[2].mlp(calls["mlp 2"])
    behind = layers[3](last, attention_mask=mask, position_embeddings=position)
    behind = behind[0] if isinstance(behind, tuple) else behind
    torch.testing.assert_close(found, model.lm_head(model.model.norm(behind)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_prefill_and_steps_are_one_pass_alone_and_padded(family: str) -> None:
    model: Any = tiny(family)
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with running(model, "0,(1|2),3"):
        plain = model(input_ids=ids, use_cache=False).logits
    with running(model, "0,(1|2)bypass,3"):
        assert not torch.allclose(model(input_ids=ids, use_cache=False).logits, plain, atol=1e-3)
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        given = {"attention_mask": mask, "position_ids": places}
        whole = model(input_ids=ids, use_cache=False, **given).logits
        out = model(input_ids=ids[:, :5], attention_mask=mask[:, :5], position_ids=places[:, :5], use_cache=True)
        steps = [out.logits]
        for n in range(5, 9):
            out = model(
                input_ids=ids[:, n : n + 1],
                attention_mask=mask[:, : n + 1],
                position_ids=places[:, n : n + 1],
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            steps.append(out.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(steps, 1)[real], whole[real], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "code"), [("0,(1a|2)bypass,3", "P149"), ("0,(1|2m)bypass,3", "P149"), ("0,(1|2)bypass,3", None)]
)
def test_a_bypass_is_between_whole_layers(text: str, code: str | None) -> None:
    found = check(plan_of("llama", text), inspect(tiny("llama")))
    assert [problem.code for problem in found] == ([] if code is None else [code])


def test_a_bypass_is_written_and_read_and_shown() -> None:
    plan = plan_of("llama", " 0 , (1|2)bypass,3")
    assert plan.steps()[1] == Parallel((Run(1), Run(2)), "bypass") and str(plan) == "0,(1|2)bypass,3"
    assert plan.hash != plan_of("llama", "0,(1|2),3").hash and strip(plan) == "█∥∥█"
    assert str(drop(plan, [2])) == "0-1,3"
    found = [trait for trait, _, _ in capabilities.traits(plan.steps())]
    assert found.count("part") == 2, "its layers run in parts, so what parts cannot do it cannot"
    weighted = replace(plan.steps()[1], branches=(Run(1, weights="w"), Run(2)))
    assert str(plan.with_steps((weighted,))) == "(1:w|2)bypass"


def test_layers_without_parts_have_no_bypass() -> None:
    spec = inspect(tiny("gemma3n_text", "eager"))
    (first, *_) = check(parse_plan("0,(1|2)bypass,3", Plan.identity(spec)), spec)
    assert first.code == "P105"
