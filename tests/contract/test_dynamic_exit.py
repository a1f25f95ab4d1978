"""A draft whose exit is chosen by what every exit would have drafted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from shoal.live import running
from shoal.models.inspect import inspect
from shoal.plan import Plan, Run, Spec, keep
from shoal.speculating.chooser import Anew, Chooser
from shoal.speculating.draft_context import DraftContext
from shoal.speculating.drafts.dynamic_exit import _worth_most
from shoal.speculating.parse import Recipe
from shoal.speculating.speculator import Speculator

from .drafting import FAMILIES, prompt, weak
from .shares import pairs

GREEDY: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}


class Looking(Chooser):
    """Drafts by the first `layers` layers and writes down what is watched."""

    watches = (0, 1, 2)

    def __init__(self, layers: int, most: int | None) -> None:
        self.layers, self.most = layers, most
        self.found: list[torch.Tensor] = []

    def begin(self, spec: Spec) -> tuple[Run, ...]:
        return tuple(Run(i) for i in range(self.layers))

    def again(self, context: DraftContext) -> None:
        if (found := context.exit_matches()) is not None:
            self.found.append(found)


@pytest.mark.parametrize(("most", "share"), pairs(2, [0, 3], [True, False]))
@pytest.mark.parametrize("family", [*FAMILIES, "gemma3n_text"])
def test_what_is_watched_is_what_the_first_layers_alone_would_have_written(family: str, most: int, share: bool) -> None:
    model, ids = weak(family), prompt()
    looking = Looking(2, most)
    speculator = Speculator(model, Recipe("looking", looking), length=3, confidence=None, share=share)
    text = speculator.generate(ids, **GREEDY)
    assert torch.equal(text, model.generate(ids, **GREEDY))
    seen = torch.cat(looking.found, -1)
    assert seen.shape[1] >= 16  # neither the first token, which the prefill wrote, nor those of the last round
    begin = ids.shape[1]
    for layers in (1, 2, 3):
        plan = keep(Plan.identity(inspect(model)), range(layers))
        with torch.no_grad(), running(model, plan):
            would = model(text, use_cache=False).logits[0, begin : begin + seen.shape[1]].argmax(-1)
        assert torch.equal(seen[layers - 1], would == text[0, begin + 1 : begin + 1 + seen.shape[1]])
    assert seen.any()
    assert not seen.all() or family == "bloom"  # whose tied embeddings make every exit repeat the last token


def test_the_exit_and_length_with_the_most_tokens_for_a_layer() -> None:
    # one token for 10 layers; two exits that draft right always: 1 + d tokens for 10 + d e layers
    assert _worth_most([2, 5], [1.0, 1.0], 4, 10, 0.0) == (2, 4)
    # (1 + 0.9 + 0.81) / 20 is more than (1 + 0.9) / 15, (1 + 0.1) / 12 and 1 / 10
    assert _worth_most([2, 5], [0.1, 0.9], 2, 10, 0.0) == (5, 2)
    # an exit that is hardly ever right is worth no draft, nor is one with a head as dear as the layers
    assert _worth_most([5], [0.2], 4, 10, 0.0)[1] == 0
    assert _worth_most([2], [0.5], 4, 10, 10.0)[1] == 0


def test_it_finds_the_exit_that_is_always_right() -> None:
    model = copy.deepcopy(weak("llama"))
    with torch.no_grad():
        for layer in model.model.layers[2:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    speculator = Speculator(model, "dynamic-exit:places=4", length=3, confidence=None)
    assert torch.equal(speculator.generate(prompt(), **GREEDY), model.generate(prompt(), **GREEDY))
    stats = speculator.stats
    assert stats.draft == "0-1"
    assert stats.acceptance == 1
    assert stats.rounds == 12  # 8 tokens one by one, then 15 of which 3 are drafted in each round


def test_a_draft_written_under_the_former_names_still_drafts() -> None:
    class Former(Anew):
        every = 4

        def chosen(self, scene: Any) -> tuple[Run, ...]:
            with pytest.warns(DeprecationWarning, match="bench of a draft's context is now layer_trial"):
                assert scene.bench().start.shape[:2] == (1, 1)
            with pytest.warns(DeprecationWarning, match="stage of a draft's context is now runner"):
                return tuple(Run(i) for i in range(scene.stage.depth - 1))

    model, ids = weak("llama"), prompt()
    text = Speculator(model, Recipe("former", Former()), length=3).generate(ids, **GREEDY)
    assert torch.equal(text, model.generate(ids, **GREEDY))
