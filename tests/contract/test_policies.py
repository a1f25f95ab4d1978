"""Policies on many families: every rule gives what the stock layers give by hand, or is refused by its code."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shoal.errors import ShoalError
from shoal.plan import Plan
from shoal.models.inspect import inspect
from shoal.run.live import running
from shoal.run.place import with_exits, with_gates

from .families import DEPTH, FAMILIES, tiny
from .policy_cells import KINDS, PREFILL, Written, batch_of, expected, policy_for, stepped, tables, whole

NO_SDPA = ("gemma2", "gpt_oss", "bloom", "gptj", "gpt_neo")
NO_STATIC = ("bloom", "gpt_neo")
RECURRENT = ("mamba2", "jamba", "nemotron_h")
USED = [family for family in FAMILIES if family not in RECURRENT]


def attention_of(family: str) -> str:
    return "eager" if family in NO_SDPA else "sdpa"


@pytest.mark.parametrize("family", USED)
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
    assert found == {}


_ = (DEPTH, Plan, inspect, with_exits, with_gates, PREFILL, Written, tables, torch)
