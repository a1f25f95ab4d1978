"""What is refused of plans in which a layer reads one that runs later."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from shoal.compressing.job import cache_job
from shoal.decoding.fast import FastDecoder
from shoal.errors import PlanError, ShoalError
from shoal.live import apply, running
from shoal.models.opened import open_model
from shoal.models.stacks import find_stack
from shoal.plan import check

from .live_models import IDS, PADDED, own

LCKV = "0,1-2@3,3"


def _step_alone(model: PreTrainedModel) -> None:
    with running(model, LCKV) as handle:
        executor = handle.bound.executor()
        forward, state = executor.prepared(lambda: model(IDS)), torch.ones(2, 9, 32)
        assert executor.run_step(executor.steps[0], state, forward).isfinite().all()
        executor.run_step(executor.steps[1], state, forward)


def _between(model: PreTrainedModel) -> None:
    with running(model, LCKV) as handle, handle.bound.executor().between(2):
        model(IDS)


def _checkpointed(model: PreTrainedModel) -> None:
    getattr(model.train(), "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    with running(model, LCKV):
        model(IDS, use_cache=False)


def _goes_on_elsewhere(model: PreTrainedModel) -> None:
    cache = DynamicCache(config=model.config)
    with running(model, LCKV):
        model(IDS, past_key_values=cache)
    with running(model, "0,1@0,2@0,3"):
        model(IDS, past_key_values=cache)


REFUSED: list[tuple[str, Any]] = [
    ("P163", _step_alone),
    ("P163", _between),
    ("P163", _checkpointed),
    ("P161", lambda model: [apply(model, LCKV), cache_job(model)]),
    ("P133", lambda model: apply(model, LCKV, policy="exit:confidence=0.9")),
    ("U568", lambda model: [apply(model, LCKV), FastDecoder(model, mode="off").generate(IDS, max_new_tokens=2)]),
    ("U680", lambda model: apply(model, LCKV, passes=0)),
    ("U680", lambda model: apply(model, LCKV, passes=True)),
    ("U680", lambda model: apply(model, LCKV, passes=1.5)),  # type: ignore[arg-type]
    ("U680", lambda model: apply(model, "0,1@0,2-3", passes=2)),
    ("P164", lambda model: apply(model, "0,1@v3,2-3")),
    ("P164", lambda model: apply(model, "0,1@k3,2-3")),
    ("P164", lambda model: apply(model, "0,1@v3+,2-3")),
    ("P164", lambda model: apply(model, "0,1@a3,2-3")),
    ("P107", lambda model: apply(model, "0,1@3,2")),
    ("P107", lambda model: apply(model, "0,1@2,2@1,3")),
    ("P107", lambda model: apply(model, "0-2,3@3")),
    ("P123", _goes_on_elsewhere),
]


@pytest.mark.parametrize(("code", "ask"), REFUSED)
def test_what_cannot_be_is_refused_by_name(code: str, ask: Any) -> None:
    model = own("llama")
    with pytest.raises(ShoalError) as no:
        ask(model)
    assert no.value.code == code


@pytest.mark.parametrize("family", ["falcon", "bloom", "gptj", "gpt_neo"])
def test_an_attention_whose_mask_is_its_own_is_refused(family: str) -> None:
    model = own(family, "eager")
    with pytest.raises(PlanError, match="no way is known to the mask of the attention of layer 0") as no:
        apply(model, "0@1,1-3")
    assert no.value.code == "P163"


def test_another_attention_than_sdpa_and_eager_is_refused() -> None:
    model = own("llama")
    attention: Any = find_stack(model).layer(1).self_attn
    with running(model, LCKV):
        attention.config = copy.copy(attention.config)
        attention.config._attn_implementation_internal = "flash_attention_2"
        with pytest.raises(PlanError, match="flash_attention_2 takes no mask of its own") as no:
            model(**PADDED)
    assert no.value.code == "P163"


def test_a_source_of_another_kind_is_refused() -> None:
    spec = open_model(own("gemma3_text")).spec
    assert [(one.code, one.layer) for one in check("0@1,1-3", spec)] == [("P108", 0)]
    assert check("0@2,1-3", spec) == []
