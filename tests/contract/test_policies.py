"""Policies on many families: every rule gives what the stock layers give by hand, or is refused by its code."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shoal.errors import ShoalError
from shoal.examples import PolicyExamples
from shoal.live import running
from shoal.models.inspect import inspect
from shoal.plan import Plan, parse_plan
from shoal.plan.price import layers_run
from shoal.plan.steps import runs
from shoal.registry import entries

from .families import DEPTH, FAMILIES, tiny
from .policy_cells import KINDS, LENGTH, PREFILL, batch_of, expected, policy_for, stepped, whole
from .shares import every, only

NO_SDPA = ("gemma2", "gpt_oss", "bloom", "gptj", "gpt_neo")
NO_STATIC = ("bloom", "gpt_neo")
RECURRENT = ("mamba2", "jamba", "nemotron_h")
WINDOWS = {"skip/copy": "P136", "exit/copy": "P136", "exit/defer": "P135"}
# what is refused, family by family; a refusal that is not in this table is a regression
REFUSED: dict[str, dict[str, str]] = {
    **dict.fromkeys(("qwen2", "gemma2", "gemma3_text", "gpt_oss", "cohere2", "llama4_text"), WINDOWS),
    "mistral": {"exit/defer": "P135"},
    "gemma3n_text": {
        **dict.fromkeys(("skip/project", "skip/copy", "skip/mask", "exit/mask"), "P133"),
        "exit/copy": "P136",
        "exit/defer": "P135",
        "mlp": "P105",
    },
}
USED = [family for family in FAMILIES if family not in RECURRENT]
FEW = (
    "llama", "gpt2", "gemma2", "gemma3_text", "falcon", "deepseek_v3", "gemma3n_text",
)  # fmt: skip
"""The families of every run; the others run with -m slow."""


def attention_of(family: str) -> str:
    return "eager" if family in NO_SDPA else "sdpa"


@pytest.mark.parametrize("family", only(FEW, USED))
def test_every_rule_is_what_the_layers_give_by_hand(family: str) -> None:
    """One pass without a cache, and a prefill, a chunk of two and single tokens, alone and in a left-padded batch whose
    rows decide for themselves, with a dynamic and a static cache."""
    found: dict[Any, str] = {}
    model = tiny(family, attention_of(family))
    for kind in KINDS:
        try:
            policy = policy_for(family, attention_of(family), kind)
            with running(model, policy.plan, policy=policy):
                pass
        except ShoalError as error:
            found[kind] = error.code
            continue
        for rows in (1, 2):
            batch, right = batch_of(rows), expected(family, kind, rows)
            seen = batch["attention_mask"].bool()
            with running(model, policy.plan, policy=policy):
                got = {"whole": whole(model, batch), "dynamic": stepped(model, batch, "dynamic")}
                if family not in NO_STATIC:
                    got["static"] = stepped(model, batch, "static")
            for what, logits in got.items():
                error = (logits - right)[seen].abs().max().item()
                if not error <= 1e-4:
                    found[kind, rows, what] = f"differs by {error:.1e}"
    assert found == REFUSED.get(family, {})


POLICIES = {name: entry.examples for name, entry in entries("policies").items()}
NEVER = [(own.plan, text) for own in POLICIES.values() for text in own.never]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "falcon"])
def test_a_policy_that_skips_nothing_is_bit_exact(family: str) -> None:
    model, batch = tiny(family), batch_of(2)
    stock = whole(model, batch)
    dense = {}
    for plan in {plan for plan, _ in NEVER}:
        with running(model, plan):
            dense[plan] = whole(model, batch), stepped(model, batch, "dynamic")
    assert torch.equal(dense["0-3"][0], stock)
    for plan, policy in NEVER:
        if family == "falcon" and "halves" in policy:  # refused by name: its halves stand side by side
            continue
        with running(model, plan, policy=policy) as handle:
            handle.prompt = 0
            assert torch.equal(whole(model, batch), dense[plan][0]), policy
            handle.prompt = None
            assert torch.equal(stepped(model, batch, "dynamic"), dense[plan][1]), policy
            counts = handle.trace.counts.to_dict()
        layers = layers_run(runs(parse_plan(plan, Plan.identity(inspect(model))).steps()))
        assert counts["executed"] == counts["asked"] == counts["tokens"] * layers
        assert counts["simulated"] == counts["late"] == counts["projected"] == 0
    assert torch.equal(whole(model, batch), stock)


ALWAYS = {text: (own.plan, plan) for own in POLICIES.values() for text, plan in own.always.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_a_fixed_choice_is_the_static_plan(family: str) -> None:
    """In value, and in what hooks on the real layers count."""
    model, refused = tiny(family, attention_of(family)), set[str]()
    for policy, (base, plan) in ALWAYS.items():
        try:
            with running(model, base, policy=policy):
                pass
        except ShoalError as error:
            refused.add(error.code)
            continue
        batch = batch_of(2)
        seen = batch["attention_mask"].bool()
        with running(model, plan):
            right = [whole(model, batch), *(stepped(model, batch, cache) for cache in ("dynamic", "static"))]
        with running(model, base, policy=policy) as handle:
            got = [whole(model, batch), *(stepped(model, batch, cache) for cache in ("dynamic", "static"))]
            counts = handle.trace.counts
        for one, other in zip(right, got, strict=True):
            assert (one - other)[seen].abs().max() <= 1e-5, policy
        left = tuple(runs(parse_plan(plan, Plan.identity(inspect(model))).steps()))
        assert counts.layers == {run.layer: 3 * 2 * LENGTH for run in left}, policy
        assert counts.asked == 3 * 2 * LENGTH * layers_run(left)
        assert counts.to_dict()["simulated"] == 0
    assert refused == ({"P136"} if "gemma" in family else set())


DECIDING = [(own.plan, text) for own in POLICIES.values() for text in own.deciding]


@pytest.mark.parametrize("family", every(2, ["llama", "gpt2"]))
def test_one_pass_is_a_prefill_and_steps(family: str) -> None:
    """Every policy decides the same token by token, whether its text comes at once or as it is written."""
    model = tiny(family)
    depths = {}
    for plan, policy in DECIDING:
        for rows in (1, 2):
            batch = batch_of(rows)
            seen = batch["attention_mask"].bool()
            with running(model, plan, policy=policy) as handle:
                handle.prompt = PREFILL
                right, deep = whole(model, batch), handle.trace.depths
                handle.prompt = None
                for cache, chunk in (("dynamic", 1), ("dynamic", 2), ("static", 1)):
                    got = stepped(model, batch, cache, chunk)
                    assert (got - right)[seen].abs().max() <= 1e-4, (policy, rows, cache, chunk)
                    assert handle.trace.depths == deep, (policy, rows, cache, chunk)
            depths[policy, rows] = deep
            assert any(depth < DEPTH for depth in deep[0][PREFILL:]), f"{policy} skips nothing here"


def test_every_policy_says_what_it_is_tried_with() -> None:
    assert [name for name, own in POLICIES.items() if not isinstance(own, PolicyExamples)] == []
    for name, own in POLICIES.items():
        texts = [*own.deciding, *own.never, *own.always, *(one.text for one in own.refused)]
        assert {text.partition(":")[0] for text in texts} == {name}
    assert [name for name, own in POLICIES.items() if not own.deciding] == [
        "dropped",
        "loops",
        "per-prompt",
        "sampled",
    ], "its file says why"
