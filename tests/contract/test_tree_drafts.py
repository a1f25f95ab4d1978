"""Trees of drafted tokens: one pass verifies all branches, and the text stays that of plain decoding."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.generation import LogitsProcessorList

from shoal.errors import ShoalError
from shoal.live import running
from shoal.models.stacks import find_stack
from shoal.plan import Run, Spec
from shoal.speculating.accept import Candidate, accept_one_of, accept_or_resample, candidates
from shoal.speculating.chooser import Chooser
from shoal.speculating.draft_context import DraftContext
from shoal.speculating.draft_runner import Draft, DraftRunner
from shoal.speculating.forward_inputs import ForwardInputs
from shoal.speculating.parse import ParsedDraft
from shoal.speculating.speculator import Speculator
from shoal.speculating.token_tree import TokenTree, TreeInputs, TreeShape

from .drafting import EAGER, prompt, weak
from .families import FAMILIES, tiny, tiny_of
from .shares import pairs
from .test_speculate_sampling import _scores as scores_of
from .test_speculate_sampling import expected, p_value, small

GREEDY: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
WINDOWS = {"qwen2", "mistral", "gemma2", "gemma3_text", "gpt_oss", "cohere2", "gpt_neo", "llama4_text", "gemma3n_text"}
REFUSED = WINDOWS | {"bloom"}
STATES = {"mamba2", "jamba", "nemotron_h"}
ALLOWED = [family for family in FAMILIES if family not in REFUSED | STATES]
SHAPES = ["exit:2+tree:3x2x1", "skip:0,2-3+tree:2x2", "exit:3+tree"]


@pytest.mark.parametrize(("family", "draft"), pairs(3, ALLOWED, SHAPES))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_text_is_that_of_plain_decoding(family: str, draft: str, attention: str) -> None:
    model = tiny(family, "eager" if family in EAGER else attention)
    speculator = Speculator(model, draft, length=3, confidence=None)
    assert torch.equal(speculator.generate(prompt(), **GREEDY), model.generate(prompt(), **GREEDY))
    stats = speculator.stats
    assert stats.accepted + stats.rounds == stats.tokens - 1 == 23
    assert stats.drafted > 2 * stats.rounds
    assert stats.accepted > 0


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_a_model_that_cannot_verify_a_tree_is_refused_by_name(family: str) -> None:
    model = tiny(family, "eager" if family in EAGER | {"gpt_neo"} else "sdpa")
    words = "look back a few tokens" if family in WINDOWS else "does not run under a mask"
    with pytest.raises(ShoalError, match=words) as refused:
        Speculator(model, "exit:2+tree:2")
    assert refused.value.code == "U705"
    Speculator(model, "exit:2")


@pytest.mark.parametrize("draft", ["exit:2", "skip:0,2-3", "swift:window=4", "lookup:1+exit:3"])
@pytest.mark.parametrize("confidence", [None, "auto", 0.3])
def test_a_tree_of_width_one_is_the_chain(draft: str, confidence: Any) -> None:
    found = []
    for text in (draft, f"{draft}+tree:1x1x1"):
        speculator = Speculator(weak("llama"), text, length=3, confidence=confidence)
        ids = speculator.generate(prompt(), **GREEDY)
        stats = speculator.stats
        found.append((ids.tolist(), stats.rounds, stats.drafted, stats.accepted, stats.looked_up, stats.layers))
    assert found[0] == found[1]


def test_a_sampled_tree_of_width_one_draws_and_judges_as_the_chain_does() -> None:
    drawn = []
    for draft in ("exit:2", "exit:2+tree:1x1x1"):
        torch.manual_seed(5)
        speculator = Speculator(weak("llama"), draft, length=3, confidence=None)
        ids = speculator.generate(prompt(), max_new_tokens=40, do_sample=True, temperature=0.9)
        drawn.append((ids.tolist(), speculator.stats.accepted))
    assert drawn[0] == drawn[1] and 0 < drawn[0][1] < 40


@pytest.fixture
def swapped(monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """A draft whose second choice is always the base model's first, and never its first one: that of the whole model
    (skip:0-3), with its two best logits exchanged."""
    behind = Draft.behind

    def exchanged(self: Draft, ids: torch.Tensor, new: int) -> torch.Tensor:
        logits = behind(self, ids, new)
        values, tokens = logits.topk(2)
        return logits.scatter(-1, tokens, values.flip(-1))

    monkeypatch.setattr(Draft, "behind", exchanged)
    return weak("llama")


@pytest.mark.parametrize(
    ("tree", "accepted"),
    [("", 0), ("+tree:1x1x1", 0), ("+tree:2", 1), ("+tree:2x2", 2), ("+tree:2x2x2", 3), ("+tree", 1)],
)
def test_second_choices_are_accepted_as_deep_as_the_tree_follows_them(
    swapped: PreTrainedModel, tree: str, accepted: int
) -> None:
    speculator = Speculator(swapped, f"skip:0-3{tree}", length=3, confidence=None)
    asked = GREEDY | {"max_new_tokens": 25}
    assert torch.equal(speculator.generate(prompt(), **asked), swapped.generate(prompt(), **asked))
    assert speculator.stats.tokens_per_round == accepted + 1
    assert speculator.stats.draft == f"0-3{tree if tree != '+tree' else '+tree:swift'}"


def test_the_branch_that_stands_is_what_the_cache_holds(swapped: PreTrainedModel) -> None:
    asked = GREEDY | {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    plain = swapped.generate(prompt(), **asked)
    for draft in ("skip:0-3+tree:2x2x2", "skip:0-2,3+tree:3x2"):
        ours = Speculator(swapped, draft, length=3, confidence=None).generate(prompt(), **asked)
        for name in ("scores", "logits"):
            torch.testing.assert_close(torch.cat(ours[name]), torch.cat(plain[name]), atol=1e-4, rtol=1e-4)
        for mine, stock in zip(ours.past_key_values.layers, plain.past_key_values.layers, strict=True):
            torch.testing.assert_close(mine.keys, stock.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(mine.values, stock.values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
def test_a_tree_never_accepts_less_than_the_line_in_it(family: str) -> None:
    rounds: Counter[str] = Counter()
    for seed in range(4):
        for tree in ("", "+tree:3x2x1", "+tree"):
            speculator = Speculator(weak(family), f"exit:2{tree}", length=3, confidence=None)
            speculator.generate(prompt(seed=seed), **GREEDY)
            rounds[tree] += speculator.stats.rounds
    assert rounds["+tree:3x2x1"] < rounds[""] and rounds["+tree"] < rounds[""]


def test_shared_layers_see_every_token_of_the_tree_once() -> None:
    speculator = Speculator(weak("llama"), "exit:2+tree:3x2x1", length=3, confidence=None)
    speculator.generate(prompt(), **GREEDY)
    stats = speculator.stats
    assert stats.layers["draft"][:2] == [sum(stats.layers["draft"]) // 2] * 2
    for index in range(4):
        assert stats.layers["draft"][index] + stats.layers["verify"][index] == stats.drafted + stats.rounds


def test_left_padding_is_kept() -> None:
    ids = prompt()
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(13) >= 3).long()[None]
    for family, attention in (("opt", "sdpa"), ("llama", "eager")):
        model = tiny(family, attention)
        for draft in ("exit:2+tree:2x2", "skip:1-3+tree:2x2"):
            ours = Speculator(model, draft, confidence=None).generate(padded, attention_mask=mask, **GREEDY)
            assert torch.equal(ours, model.generate(padded, attention_mask=mask, **GREEDY))


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"eos_token_id": list(range(3, 64, 5))},
        {"max_new_tokens": 2},
    ],
    ids=str,
)
def test_what_generate_is_told_holds_in_every_branch(settings: dict[str, Any]) -> None:
    model, asked = weak("llama"), GREEDY | settings
    for draft in ("exit:3+tree:3x2x1", "lookup:1+exit:2+tree"):
        speculator = Speculator(model, draft, confidence=None)
        assert torch.equal(speculator.generate(prompt(), **asked), model.generate(prompt(), **asked))


@dataclass(frozen=True)
class _Watching(Chooser):
    watches: Any = (1, 3)
    seen: list[list[torch.Tensor]] = field(default_factory=list)

    def begin(self, spec: Spec) -> tuple[Run, ...]:
        return tuple(Run(i) for i in range(4))

    def again(self, context: DraftContext) -> None:
        assert context.outputs is not None
        if (states := context.outputs.take()) is not None:
            self.seen.append(states)


@pytest.mark.parametrize("share", [True, False])
def test_what_a_chooser_watches_are_the_states_of_the_branch_that_stands(swapped: PreTrainedModel, share: bool) -> None:
    chooser = _Watching()
    draft = ParsedDraft("watching+tree:2x2", chooser, tree=TreeShape("2x2", (2, 2)))
    ids = Speculator(swapped, draft, length=2, confidence=None, share=share).generate(prompt(), **GREEDY)
    true = {}
    handles = [
        find_stack(swapped).layer(i).register_forward_hook(lambda _, __, out, i=i: true.update({i: out}))
        for i in (1, 3)
    ]
    swapped(ids)
    for handle in handles:
        handle.remove()
    for place, layer in enumerate((1, 3)):
        found = torch.cat([states[place] for states in chooser.seen], -2)
        assert found.shape[-2] > 10
        torch.testing.assert_close(found, true[layer][:, 10 : 10 + found.shape[-2]], atol=1e-4, rtol=1e-4)


def test_sampled_candidates_leave_the_base_models_distribution() -> None:
    """Three tokens drawn without replacement and judged in turn; a judge who keeps p as it was is found."""
    model = small()
    with torch.no_grad():
        target = scores_of(model, LogitsProcessorList())
        with running(model, "0"):
            draft = scores_of(model, LogitsProcessorList())
    chances = expected(target, 1)
    torch.manual_seed(0)
    right, wrong = Counter[tuple[int, ...]](), Counter[tuple[int, ...]]()
    stood = 0
    for _ in range(8000):
        drafted = candidates(draft[()], 3, True)
        token, which = accept_one_of(target[()], drafted, True)
        right[token,] += 1
        stood += which is not None
        assert len({one for one, _ in drafted}) == 3 and (which is None or drafted[which][0] == token)
    for _ in range(5000):
        wrong[_forgetful(target[()], candidates(draft[()], 3, True)),] += 1
    assert p_value(right, chances) > 0.001
    assert p_value(wrong, chances) < 1e-6
    alone = sum(accept_or_resample(target[()], *candidates(draft[()], 1, True)[0], True)[1] for _ in range(8000))
    assert stood > 1.02 * alone


def _forgetful(scores: torch.Tensor, drafted: list[Candidate]) -> int:
    """Judges every token by the whole distribution."""
    token = 0
    for one in drafted:
        token, stands = accept_or_resample(scores, *one, True)
        if stands:
            return token
    return token


def test_what_generate_samples_has_the_base_models_distribution() -> None:
    model = small()
    chances = expected(scores_of(model, LogitsProcessorList()), 3)
    torch.manual_seed(3)
    counts = Counter[tuple[int, ...]]()
    speculator = Speculator(model, "exit:1+tree:2x2", length=2, confidence=None, count=False)
    start = torch.tensor([[1, 3, 2]])
    for _ in range(700):
        counts[tuple(speculator.generate(start, max_new_tokens=3, do_sample=True, top_k=0)[0, 3:].tolist())] += 1
    grouped, told = Counter[tuple[int, ...]](), Counter[tuple[int, ...]]()
    for text, chance in chances.items():
        grouped[text[1:]] += counts[text]
        told[text[1:]] += chance  # type: ignore[assignment]
    assert p_value(grouped, dict(told)) > 0.001  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("draft", "code"),
    [
        ("exit:2+tree:0", "U704"),
        ("exit:2+tree:3x0", "U704"),
        ("exit:2+tree:3-2", "U704"),
        ("exit:2+tree:wide", "U704"),
        ("exit:2+tree:9x9x9", "U704"),
        ("tree:2", "U704"),
        ("tree:2+lookup", "U704"),
        ("exit:2+tree:2+tree:3", "U617"),
        ("exit:2+tree:depth=3", "U502"),
    ],
)
def test_a_tree_that_cannot_be_is_refused_by_name(draft: str, code: str) -> None:
    with pytest.raises(ShoalError) as refused:
        Speculator(weak("llama"), draft)
    assert refused.value.code == code


def test_caches_and_attentions_without_room_for_a_tree_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = weak("llama")
    speculator = Speculator(model, "exit:2+tree:2")
    cache = DynamicCache()
    cache.layers = [DynamicSlidingWindowLayer(sliding_window=6) for _ in range(4)]
    with pytest.raises(ShoalError, match=r"U705.*row 0.*DynamicSlidingWindowLayer"):
        speculator.generate(prompt(), past_key_values=cache, **GREEDY)
    for settings, code in (({"cache_implementation": "static"}, "U612"), ({"num_beams": 2}, "U615")):
        with pytest.raises(ShoalError, match=code):
            speculator.generate(prompt(), **GREEDY | settings)
    with pytest.raises(ShoalError, match="U616"):
        speculator.generate(prompt().expand(2, -1), **GREEDY)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ShoalError, match=r"U705.*flash_attention_2.*load the model with sdpa or eager"):
        Speculator(model, "exit:2+tree:2")


def test_a_model_that_sees_through_the_mask_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: every token sees all that stand in front of it, as in a model that makes its own mask."""

    def line(self: TokenTree, first: int, device: torch.device) -> torch.Tensor:
        return torch.ones(len(self.above), len(self.above), dtype=torch.bool).tril()[first:]

    monkeypatch.setattr(TokenTree, "visible", line)
    with pytest.raises(ShoalError, match=r"U705.*makes other logits of a branch"):
        Speculator(tiny_of("llama", 3), "exit:2+tree:2")


def test_masks_and_positions_are_those_of_the_branches() -> None:
    model, tree = weak("llama"), TokenTree()
    a, _ = tree.add(7, None, 0), tree.add(8, None, 0)
    tree.add(9, None, a)
    assert tree.above == [[0], [0, 1], [0, 2], [0, 1, 3]] and tree.path(3) == [7, 9]
    assert tree.proposal.children(0) == [1, 2] and tree.proposal.children(1) == [3] and tree.proposal.length == 2
    runner, text = DraftRunner(model), torch.tensor([[3, 4, 5]])
    feed = TreeInputs(model, ForwardInputs.of_prompt(model, text[:, :-1], runner.takes), tree, 3)
    cache = model(text[:, :-1]).past_key_values
    inputs = feed(torch.tensor([[3, 4, 5, 7, 8, 9]]), 4, cache)
    assert inputs["position_ids"].tolist() == [[2, 3, 3, 4]]
    assert inputs["attention_mask"][0, 0].long().tolist() == [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 1, 0],
        [1, 1, 1, 1, 0, 1],
    ]
