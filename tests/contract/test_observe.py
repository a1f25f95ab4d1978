"""The pass that measures share: it keeps no state, leaves nothing behind, and says when a state is none."""

from __future__ import annotations

import copy
import gc
import importlib
import weakref
from typing import Any

import pytest
import torch

from shoal.errors import ModelError
from shoal.measures.angular_distance import angular_distance
from shoal.measures.block_influence import block_influence
from shoal.measures.loss_removed import loss_removed
from shoal.models.opened import open_model
from shoal.recording.observe import observe

from .families import DEPTH, tiny
from .planted import hooks_unchanged, random_data


def test_no_hidden_state_is_kept() -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def watch(index: int, x: torch.Tensor, y: torch.Tensor) -> None:
        assert not any(ref() is not None and ref() is not x for ref in seen), "an earlier state is still alive"
        seen.append(weakref.ref(y))

    observe(tiny("llama"), random_data(4, 8).batches(2), watch, before=lambda ids, mask: None)
    gc.collect()
    assert len(seen) == 2 * DEPTH
    assert not any(ref() is not None for ref in seen)


@pytest.mark.parametrize("span", [1, 2, 3])
def test_angular_distance_holds_no_more_inputs_than_its_span(span: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def spying(model: Any, batches: Any, watch: Any, **rest: Any) -> None:
        def both(index: int, x: torch.Tensor, y: torch.Tensor) -> None:
            seen.append(weakref.ref(x))
            watch(index, x, y)
            del x, y
            alive.append(sum(ref() is not None for ref in seen))

        observe(model, batches, both, **rest)

    monkeypatch.setattr(importlib.import_module("shoal.evaluation.observed"), "observe", spying)
    angular_distance(tiny("llama"), random_data(4, 8), span=span, batch=2)
    gc.collect()
    assert max(alive) <= span + 1, "the inputs of a span; the embeddings, which the model itself holds, may be one more"
    assert not any(ref() is not None for ref in seen)


def test_a_watcher_that_fails_leaves_no_hook_and_no_mode_behind() -> None:
    model = copy.deepcopy(tiny("llama")).train()

    def watch(index: int, x: torch.Tensor, y: torch.Tensor) -> None:
        raise KeyboardInterrupt

    with hooks_unchanged(model), pytest.raises(KeyboardInterrupt):
        observe(model, random_data(1, 4).batches(1), watch, before=lambda ids, mask: None)
    assert all(module.training for module in model.modules())


def test_a_state_without_tokens_is_refused() -> None:
    model = tiny("llama")
    handle = model.model.layers[1].register_forward_hook(lambda *_: torch.zeros(2, 32))
    try:
        with pytest.raises(ModelError, match=r"layer 1 hands on a state \[2, 32\] for 1 x 4 tokens") as raised:
            block_influence(model, random_data(1, 4))
    finally:
        handle.remove()
    assert raised.value.code == "M316"


def test_the_head_does_not_run() -> None:
    model, ran = copy.deepcopy(tiny("llama")), []
    assert open_model(model).spec.probed  # what is found out once, by one token
    model.lm_head.register_forward_hook(lambda *_: ran.append(1))
    for measure in (block_influence, angular_distance):
        measure(model, random_data(1, 4))
    assert not ran
    loss_removed(model, random_data(1, 4))
    assert ran
