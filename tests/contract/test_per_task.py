"""Layers by the name of a task: each is its plan, and a sequence keeps the task with which it began."""

from __future__ import annotations

import pytest
import torch

from shoal.deciding.policies.per_task import PerTask
from shoal.errors import UsageError
from shoal.live import running

from .families import tiny
from .planted import random_data

ASKED = "per-task:plans=all:0-3+few:0,3+odd:0-1,3"
DEPTHS = {"all": 4.0, "few": 2.0, "odd": 3.0}
PLANS = {"all": "0-3", "few": "0,3", "odd": "0-1,3"}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_each_task_is_its_plan_bit_for_bit_and_calls_no_other_layer(family: str) -> None:
    model, ids = tiny(family), random_data(2, 9).ids
    with running(model, "0-3", policy=ASKED) as handle, torch.no_grad():
        policy = handle.policy
        assert isinstance(policy, PerTask)
        got, depths = {}, {}
        for task in ("few", "all", "odd", "few"):
            policy.use(task)
            got[task] = model(ids).logits
            depths[task] = set(handle.trace.depths[0])
        with pytest.raises(UsageError, match="U584"):
            policy.use("other")
    for task, plan in PLANS.items():
        with running(model, plan), torch.no_grad():
            assert torch.equal(got[task], model(ids).logits), task
        assert depths[task] == {DEPTHS[task]}


def test_a_sequence_keeps_the_task_with_which_it_began() -> None:
    model, ids = tiny("llama"), random_data(1, 9).ids
    with running(model, "0,3"), torch.no_grad():
        want = model.generate(ids, max_new_tokens=6, do_sample=False)
    with running(model, "0-3", policy=f"{ASKED},use=few") as handle, torch.no_grad():
        assert isinstance(handle.policy, PerTask)
        begun = model(ids, use_cache=True)
        handle.policy.use("all")
        token = begun.logits[:, -1:].argmax(-1)
        written = [token]
        for _ in range(5):
            begun = model(token, past_key_values=begun.past_key_values, use_cache=True)
            token = begun.logits[:, -1:].argmax(-1)
            written.append(token)
            assert handle.trace.depths[0][-1] == 2
    assert torch.equal(torch.cat([ids, *written], -1), want)
