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
SETTINGS = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
KEPT = "_cached_continuous_batching_manager"


def one_by_one(model: Any, new: int = 8) -> list[list[int]]:
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        found.append(made[0, len(prompt) :].tolist())
    return found


def batched(model: Any, new: int = 8, **options: Any) -> list[list[int]]:
    settings = GenerationConfig(**SETTINGS.to_diff_dict() | {"max_new_tokens": new})
    sizes = ContinuousBatchingConfig(**SIZES)
    made = model.generate_batch(
        PROMPTS, generation_config=settings, continuous_batching_config=sizes, **options
    ).values()
    return [one.generated_tokens for one in made]


@pytest.mark.parametrize("plan", every(2, ["0,2-3", "0,2,1,3", "0,1a,2m,3,2m", "0-1,2@0,3", "0,(1|2),3", "1m,0-3",
                                           "0,2x2,3", "0-3,1", "0,1a,1,2-3", "0-2,2@0,3", "0,(1|1a),3", "0,[1-2]x3,3",
                                           "0,1,2@0,0,2@0,3"]))  # fmt: skip
def test_plans_give_the_tokens_of_generate(plan: str) -> None:
    model = tiny("qwen2")
    with running(model, plan):
        assert batched(model) == one_by_one(model)
    assert batched(model, 2) == one_by_one(model, 2), "the rows go with the plan"


def test_layers_of_several_kinds_of_attention_run_twice() -> None:
    """The row of a run has its layer's window."""
    model = tiny("gemma3_text")
    with running(model, "0-1,[2-3]x2,0"):
        assert batched(model, 12) == one_by_one(model, 12)


def test_a_plan_has_as_many_rows_as_store() -> None:
    model = tiny("qwen2")
    for plan, rows in (
        ("0,2-3", 3),
        ("0,2x2,3", 4),
        ("0-1,2@0,3", 3),
        ("0,1a,2m,3", 3),
        ("0,1,2@0,0,2@0,3", 4),
        ("0-2,3@1", 4),
    ):
        with (
            running(model, plan),
            model.continuous_batching_context_manager(
                generation_config=SETTINGS, continuous_batching_config=ContinuousBatchingConfig(**SIZES)
            ) as manager,
        ):
            assert len(manager.batch_processor.cache.layer_to_allocator) == rows, plan


def test_pages_that_were_made_before_the_plan_are_refused_where_two_runs_would_share_a_row() -> None:
    model = tiny("qwen2")
    manager = model.init_continuous_batching(SETTINGS, ContinuousBatchingConfig(**SIZES))
    manager.warmup()
    call = {"input_ids": torch.tensor([PROMPTS[0]]), "cache": manager.batch_processor.cache}
    with running(model, "0,2x2,3"), pytest.raises(PlanError, match=r"P140.*before the plan"):
        model(**call)
    with running(model, "0,2,3"):
        sized = model.init_continuous_batching(SETTINGS, ContinuousBatchingConfig(**SIZES))
        other = sized.batch_processor.cache
    with running(model, "0,1,3"), pytest.raises(PlanError, match=r"P140.*before the plan"):
        model(**call | {"cache": other})
    manager.destroy()


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
