"""S3D: several tokens drafted in one pass without the middle layers, by masks that learn beside the base."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from shoal.api.heal import heal
from shoal.errors import ShoalError
from shoal.executing.mask_tokens import masked, masks_in, mean_embedding
from shoal.executing.weights import load_weights, save_planned
from shoal.healing.terms.masked_tokens import _masked_columns
from shoal.live import running
from shoal.models.inspect import inspect
from shoal.models.stacks import find_stack
from shoal.plan import Plan, Run
from shoal.speculating.drafts.s3d import s3d
from shoal.speculating.masked_draft import Masked, middle
from shoal.speculating.parse import ParsedDraft
from shoal.speculating.s3d_speed import acceptance_by, best_skip, speed_up, strength_of
from shoal.speculating.speculator import Speculator

from .drafting import FAMILIES, prompt, weak
from .families import tiny, tiny_of
from .planted import random_data
from .shares import pairs

GREEDY: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}


@cache
def counting(depth: int = 8) -> PreTrainedModel:
    """A planted model in which the next token depends on the place alone, and hardly on its middle layers: a mask knows
    as much as a token there. Nobody may change it."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_positions=128, n_embd=32, n_layer=depth, n_head=4, n_inner=64, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.15)
            if ".h." in name and not name.startswith(("transformer.h.0.", f"transformer.h.{depth - 1}.")):
                parameter.mul_(0.5)
        model.transformer.wpe.weight.normal_(0, 1)
        model.transformer.wte.weight.mul_(1e-4)
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize(
    ("family", "draft"),
    pairs(2, FAMILIES, ["s3d:skip=1-2,tokens=4", "lookup:1+s3d:skip=2,tokens=2", "s3d:tokens=3"]),
)
def test_greedy_text_is_that_of_plain_decoding(family: str, draft: str) -> None:
    model = weak(family)
    speculator = Speculator(model, draft, confidence=None)
    assert torch.equal(speculator.generate(prompt(), **GREEDY), model.generate(prompt(), **GREEDY))
    assert speculator.stats.shared == 0 and speculator.stats.drafted > 0
    assert not model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("confidence", [None, "auto"])
def test_one_token_is_the_skip_draft_of_the_same_layers(family: str, confidence: Any) -> None:
    found = []
    for draft in ("s3d:skip=1-2,tokens=1", "skip:0,3"):
        speculator = Speculator(weak(family), draft, length=1, confidence=confidence, share=False)
        ids = speculator.generate(prompt(), **GREEDY)
        stats = speculator.stats
        found.append((ids.tolist(), stats.rounds, stats.drafted, stats.accepted, stats.layers))
    assert found[0] == found[1]


def test_all_tokens_are_drafted_in_one_pass_of_the_kept_layers() -> None:
    speculator = Speculator(counting(), "s3d:skip=3-4,tokens=4", length=8, confidence=None)
    speculator.generate(prompt(), **GREEDY)
    stats = speculator.stats
    full = stats.rounds - 1  # the last round has room for fewer
    assert stats.layers["draft"][3] == 0 and 4 * full <= stats.layers["draft"][0] <= 4 * stats.rounds
    assert stats.layers["verify"][0] == stats.layers["verify"][3] == stats.drafted + stats.rounds


def test_masks_draft_what_tokens_would_where_the_place_says_all() -> None:
    """The whole model behind masks is always right there, and one that reads its tokens is not."""
    accepted = {}
    for name, model in (("counting", counting(4)), ("reading", weak("llama"))):
        speculator = Speculator(model, "s3d:skip=1-2,tokens=4", length=4, confidence=None)
        chooser = Masked(tuple(Run(i) for i in range(4)), 4)
        speculator.recipe = ParsedDraft("whole", chooser)
        assert torch.equal(speculator.generate(prompt(), **GREEDY), model.generate(prompt(), **GREEDY))
        accepted[name] = speculator.stats.acceptance
    assert accepted["counting"] == 1
    assert accepted["reading"] is not None and 0.2 < accepted["reading"] < 0.9, "the first of four needs no mask"


def test_acceptance_falls_with_the_span_and_predicted_and_measured_speed_agree_in_order() -> None:
    """Measured in passes, each as long for five tokens as for one, as where memory bounds it; predicted by how often a
    draft of one token is right."""
    depth, right, measured, predicted = 8, list[float](), dict[int, float](), dict[int, float]()
    for layers in (1, 2, 4, 6):
        span, share = middle(depth, layers), layers / depth
        found = []
        for tokens in (1, 4):
            draft = f"s3d:skip={span[0]}-{span[-1]},tokens={tokens}"
            speculator = Speculator(counting(depth), draft, length=tokens, confidence=None)
            speculator.generate(prompt(), **(GREEDY | {"max_new_tokens": 60}))
            found.append(speculator.stats)
        one, four = found
        assert one.acceptance is not None and four.acceptance is not None and four.tokens_per_round is not None
        right.append(four.acceptance)
        predicted[layers] = speed_up(4, share, one.acceptance)
        measured[layers] = four.tokens_per_round / (2 - share)
    assert right == sorted(right, reverse=True) and right[0] > right[-1]
    assert sorted(predicted, key=predicted.__getitem__) == sorted(measured, key=measured.__getitem__)
    assert max(measured.values()) > 1.2


def test_the_model_of_speed() -> None:
    assert speed_up(1, 0, 0) == 0.5  # two whole passes for a token
    assert speed_up(3, 0.5, 1) == pytest.approx(4 / 1.5)
    assert speed_up(4, 0.4, 0.7) == pytest.approx((1 - 0.7**5) / 0.3 / 1.6)
    strong, weak_one = acceptance_by(8), acceptance_by(1)
    assert (strong(0), strong(1), strong(0.5)) == (1, 0, 1 - 0.5**8)
    assert strength_of(0.5, strong(0.5)) == pytest.approx(8)
    for acceptance in (strong, weak_one, acceptance_by(3)):
        tried = {n: speed_up(4, n / 30, acceptance(n / 30)) for n in range(30)}
        layers, speed = best_skip(30, 4, acceptance)
        assert speed == max(tried.values()) == tried[layers]
    assert best_skip(30, 4, strong)[0] > best_skip(30, 4, weak_one)[0], "who bears more skips more"
    for bad in ((0, 0.5, 0.5), (4, 1.5, 0.5), (4, 0.5, -1)):
        with pytest.raises(ShoalError, match="U706"):
            speed_up(*bad)
    with pytest.raises(ShoalError, match="U706"):
        strength_of(0.5, 1.0)


@pytest.mark.parametrize(
    ("draft", "code"),
    [
        ("s3d:skip=1-2,tokens=0", "U706"),
        ("s3d:skip=0-3", "U706"),
        ("s3d:skip=2-9", "U706"),
        ("s3d:skip=1,tokens=2+tree:2", "U704"),
        ("s3d:skip=1+exit:2", "U617"),
        ("s3d:mask=4", "U502"),
    ],
)
def test_a_draft_that_cannot_be_is_refused_by_name(draft: str, code: str) -> None:
    with pytest.raises(ShoalError) as refused:
        Speculator(weak("llama"), draft)
    assert refused.value.code == code


def test_masks_stand_in_the_place_of_embeddings_and_of_nothing_else() -> None:
    model, ids = copy.deepcopy(tiny("gpt2")), prompt()
    vectors = torch.randn(2, 32, requires_grad=True)
    columns = torch.full((1, 10), -1)
    with torch.no_grad(), masked(model, columns, vectors):
        assert torch.equal(model(ids).logits, tiny("gpt2")(ids).logits)
    columns[0, 4], columns[0, 7] = 1, 0
    with masked(model, columns, vectors):
        out = model(ids).logits
    true = model.transformer.wte(ids).detach()
    true[0, 4], true[0, 7] = vectors[1].detach(), vectors[0].detach()
    torch.testing.assert_close(out, model(inputs_embeds=true).logits)
    out.sum().backward()
    assert vectors.grad is not None and bool((vectors.grad != 0).any())
    torch.testing.assert_close(mean_embedding(model), model.transformer.wte.weight.mean(0))


def test_spans_of_masks() -> None:
    ids = torch.arange(40)[None].repeat(2, 1)
    ids[1, 3] += 1
    columns = _masked_columns(ids, 3, 0.3, 0)
    assert columns.shape == (2, 40) and (columns[:, 0] == -1).all()
    spans = columns[0][columns[0] >= 0].tolist()
    assert 10 <= len(spans) <= 13 and not torch.equal(columns[0], columns[1])
    for place in range(1, 40):
        if columns[0, place] > 0:
            assert columns[0, place - 1] == columns[0, place] - 1
    assert torch.equal(columns, _masked_columns(ids, 3, 0.3, 0)) and not torch.equal(
        columns, _masked_columns(ids, 3, 0.3, 1)
    )


def test_masks_learn_and_nothing_else_does(tmp_path: Path) -> None:
    """On random tokens: they learn to be less sure."""
    model = copy.deepcopy(tiny_of("llama", 4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    text = random_data(40, 32)
    healed = heal(
        model, "0,3", "s3d:tokens=3,rate=3e-2", tokens=40 * 32 * 2, data=text, watch=text, length=32, held=8, batch=8
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert set(healed.weights) == {"s3d.masks"} and healed.weights["s3d.masks"].shape == (2, 32)
    (stage,) = healed.stages
    assert stage["held_after"] < stage["held_before"] and healed.better
    assert healed.texts["held out"].after.nll == healed.texts["held out"].before.nll, "a plain forward reads no masks"
    ids = prompt()
    with running(model, healed.plan, weights=healed.weights):
        with_masks = model(ids).logits
    with running(model, "0,3"):
        assert torch.equal(model(ids).logits, with_masks)
    save_planned(healed.plan, tmp_path, healed.weights)
    assert torch.equal(masks_in(load_weights(tmp_path)), healed.weights["s3d.masks"])  # type: ignore[arg-type]
    speculator = Speculator(model, f"s3d:skip=1-2,tokens=3,masks={tmp_path}", confidence=None)
    chooser = speculator.recipe.chooser
    assert isinstance(chooser, Masked) and chooser.masks is not None
    assert torch.equal(chooser.masks, healed.weights["s3d.masks"])
    assert torch.equal(speculator.generate(ids, **GREEDY), model.generate(ids, **GREEDY))
    with pytest.raises(ShoalError, match=r"P159.*2 masks.*3 tokens at once and not 4"):
        Speculator(model, f"s3d:skip=1-2,tokens=4,masks={tmp_path}")
    with pytest.raises(ShoalError, match=r"P158.*masks of the size 32"):
        s3d(spec=inspect(_wider()), skip="1-2", tokens=3, masks=tmp_path)
    save_planned(Plan.identity(inspect(model)), tmp_path / "none", {})
    with pytest.raises(ShoalError, match=r"P158.*no masks"):
        Speculator(model, f"s3d:skip=1-2,masks={tmp_path / 'none'}")


def _wider() -> PreTrainedModel:
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=48, n_layer=4, n_head=4)
    return GPT2LMHeadModel(config).eval()


def test_masks_of_another_shape_are_no_plan() -> None:
    model = tiny("llama")
    for shape, right in (((2, 32), True), ((2, 16), False), ((32,), False)):
        weights = {"s3d.masks": torch.zeros(shape)}
        if right:
            with running(model, "0:s3d,1-3", weights=weights):
                assert model(prompt()).logits.shape[-1] == 64
        else:
            with pytest.raises(ShoalError, match=r"P129.*s3d\.masks"), running(model, "0:s3d,1-3", weights=weights):
                pass


def test_a_term_without_masks_and_numbers_out_of_range_are_refused() -> None:
    model, text = copy.deepcopy(tiny("llama")), random_data(12, 16)
    asked: dict[str, Any] = {"tokens": 64, "data": text, "watch": text, "length": 16, "held": 4}
    with pytest.raises(ShoalError, match=r"U675.*needs masks that learn"):
        heal(model, "0,3", terms=["masked-tokens"], learn=["near"], **asked)
    for recipe in ("s3d:tokens=1", "s3d:share=1.5"):
        with pytest.raises(ShoalError, match="U502"):
            heal(model, "0,3", recipe, **asked)
    with pytest.raises(ShoalError, match="U502"):
        heal(model, "0,3", terms=["masked-tokens"], learn=["masks:count=0"], **asked)
    assert find_stack(model).depth == 4
