"""transformers' continuous batching under a plan: the tokens of `generate`, or a refusal before the first one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from shoal.decoding.fast import FastDecoder
from shoal.errors import PlanError, UsageError
from shoal.live import running
from shoal.speculating.speculator import Speculator

from .families import tiny
from .paged import SIZES, paged_logits
from .shares import every

PROMPTS = [[5, 9, 20, 33, 7, 11, 40, 8], [3, 17, 22]]
KEPT = "_cached_continuous_batching_manager"


def one_by_one(model: Any, new: int = 8) -> list[list[int]]:
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        found.append(made[0, len(prompt) :].tolist())
    return found


def batched(model: Any, new: int = 8, **options: Any) -> list[list[int]]:
    settings = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    sizes = ContinuousBatchingConfig(**SIZES)
    made = model.generate_batch(
        PROMPTS, generation_config=settings, continuous_batching_config=sizes, **options
    ).values()
    return [one.generated_tokens for one in made]


@pytest.mark.parametrize("plan", every(2, ["0,2-3", "0,2,1,3", "0,1a,2m,3,2m", "0-1,2@0,3", "0,(1|2),3", "1m,0-3"]))
def test_plans_that_attend_once_a_layer_give_the_tokens_of_generate(plan: str) -> None:
    model = tiny("qwen2")
    with running(model, plan):
        assert batched(model) == one_by_one(model)


@pytest.mark.parametrize("plan", every(2, ["0,2x2,3", "0-3,1", "0,1a,1,2-3", "0-2,2@0,3", "0,(1|1a),3"]))
def test_plans_in_which_two_runs_would_share_a_row_are_refused_where_they_are_called(plan: str) -> None:
    model = tiny("qwen2")
    with running(model, plan):
        with pytest.raises(PlanError, match=r"P140: layer \d attends more than once"):
            batched(model)
        ids = torch.tensor([PROMPTS[0]])
        with pytest.raises(PlanError, match="P140"):
            model.generate(ids, max_new_tokens=2, cache_implementation="paged")
        with pytest.raises(PlanError, match="P140"):  # a manager of one's own, which nothing refused when it was made
            paged_logits(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, [4, 8])
    assert batched(model, 2) == one_by_one(model, 2), "the refusal goes with the plan"


def test_policies_are_refused() -> None:
    model = tiny("llama")
    with running(model, "0-3", policy="exit:confidence=0.02"):
        with pytest.raises(PlanError, match="P140: a policy decides token by token"):
            batched(model)
        ids = torch.tensor([PROMPTS[0]])
        with pytest.raises(PlanError, match="P140"):
            paged_logits(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, [4, 8])


def test_speculation_and_the_fast_path_are_never_left_in_silence() -> None:
    model = tiny("llama")
    ids = torch.tensor([PROMPTS[0]])
    with pytest.raises(UsageError, match="U612"):
        Speculator(model, "exit:2").generate(ids, max_new_tokens=2, cache_implementation="paged")
    with pytest.raises(UsageError, match="U562"):
        FastDecoder(model, mode="off").generate(ids, max_new_tokens=2, cache_implementation="paged")


def test_pages_that_other_layers_filled_are_not_read() -> None:
    model = copy.deepcopy(tiny("llama"))
    whole = batched(model, persistent_manager=True)
    with running(model, "0,2-3"), pytest.raises(PlanError, match="P123: the paged KV cache"):
        batched(model)
    model.destroy_cached_continuous_batching_manager()
    with running(model, "0,2-3"):
        few = batched(model, persistent_manager=True)
        assert batched(model, persistent_manager=True) == few == one_by_one(model)
    assert not hasattr(model, KEPT), "what was kept under the plan went with it"
    assert batched(model) == whole == one_by_one(model) != few
