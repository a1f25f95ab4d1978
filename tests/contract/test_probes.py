"""Diagnostics and the task measure: maps, lenses and frozen keys against the stock model, and what is refused."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.api.measuring import measure
from shoal.errors import DataError, PlanError, UsageError
from shoal.evaluation.scoring import logits_of, token_nll
from shoal.evaluation.tasks import Item, load_tasks
from shoal.executing.bind import bind
from shoal.live import running
from shoal.measures.attention_similarity import attention_similarity
from shoal.measures.kv_freeze import kv_freeze
from shoal.measures.logit_lens import logit_lens
from shoal.measures.sinks import sinks
from shoal.measures.swap_curve import swap_curve
from shoal.measures.task_removed import _solved, task_removed
from shoal.models.inspect import inspect
from shoal.models.load import Loaded
from shoal.plan import Plan
from shoal.recording.frozen import continued, frozen_cache

from .families import DEPTH, tiny
from .planted import data_of, hooks_unchanged, outputs_of, random_data
from .test_api import byte_tokenizer
from .test_measures import ragged

DATA = random_data(3, 12)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@torch.no_grad()
def test_maps_are_those_that_the_eager_model_hands_out(family: str) -> None:
    model, data = copy.deepcopy(tiny(family)), ragged()
    with hooks_unchanged(model):
        scores = sinks(model, data, batch=2, dormant=0.3)
    assert model.config._attn_implementation == "sdpa"
    places = (data.mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": data.ids, "attention_mask": data.mask, "position_ids": places}
    maps = tiny(family, "eager")(**inputs, output_attentions=True).attentions
    starts = (data.mask.cumsum(-1) == 1).int().argmax(-1)
    for layer in range(DEPTH):
        sums = torch.zeros(maps[layer].shape[1], dtype=torch.float64)
        for row, start in enumerate(starts.tolist()):
            sums += maps[layer][row, :, start + 1 :, start].sum(-1)
        share = sums / (data.mask.sum() - len(starts))
        assert scores.detail["sink"][layer] == pytest.approx(share.tolist(), rel=1e-4)
        assert scores.values[layer] == pytest.approx(1 - share.mean().item(), rel=1e-4)
        assert [h for i, h in scores.detail["dormant"] if i == layer] == (share >= 0.3).nonzero()[:, 0].tolist()


def test_even_attention_gives_the_first_token_its_even_share() -> None:
    model = copy.deepcopy(tiny("llama"))
    model.model.layers[1].self_attn.q_proj.weight.data.zero_()
    scores = sinks(model, random_data(2, 9))
    assert scores.values[1] == pytest.approx(1 - sum(1 / (t + 1) for t in range(1, 9)) / 8, rel=1e-5)


def test_divergence_of_maps_is_jensen_and_shannons() -> None:
    scores = attention_similarity(tiny("llama"), DATA)
    maps = tiny("llama", "eager")(input_ids=DATA.ids, output_attentions=True).attentions
    for layer in range(1, DEPTH):
        p, r = (m.detach().double().mean(1)[:, 1:] for m in (maps[layer], maps[layer - 1]))
        middle = (p + r) / 2
        js = sum((q * (q / middle).log()).nan_to_num().sum(-1) / 2 for q in (p, r)) / math.log(2)
        assert scores.values[layer] == pytest.approx(js.mean().item(), rel=1e-4)
    assert math.isnan(scores.values[0]) and scores.errors[0] is None


def test_a_model_without_maps_or_keys_is_refused() -> None:
    model = tiny("mamba2", "eager")
    for one, words in (
        (sinks, "hands out none"),
        (attention_similarity, "hands out none"),
        (kv_freeze, "no KV cache"),
    ):
        with pytest.raises(UsageError, match=words) as raised:
            one(model, DATA)
        assert raised.value.code == "U537"


@pytest.mark.parametrize("family", ["llama", "gpt2", "cohere2", "gemma3n_text"])
@torch.no_grad()
def test_the_lens_is_the_models_own_norm_and_head(family: str) -> None:
    """Cohere scales its logits and Gemma 3n carries four streams: what stands behind the last layer is taken whole."""
    model = tiny(family)
    dense = logits_of(model, DATA.ids, None)
    states = outputs_of(model, DATA.ids)
    with hooks_unchanged(model):
        assert torch.equal(_ending_with(model, states[DEPTH - 1]), dense)
        early = _ending_with(model, states[0])
    assert not torch.allclose(early, dense)
    if family == "llama":
        assert torch.equal(early, model.lm_head(model.model.norm(states[0])))
    scores = logit_lens(model, DATA, batch=2)
    assert scores.values[-1] == scores.detail["kl"][-1] == 0 and not scores.removal
    same = torch.stack([_ending_with(model, states[i]).argmax(-1) == dense.argmax(-1) for i in range(DEPTH)])[:, :, :-1]
    settled = [min(i for i in range(DEPTH) if same[i:, b, t].all()) for b in range(3) for t in range(11)]
    assert scores.detail["depth"][0] == pytest.approx(sum(settled) / 33)
    assert scores.detail["saturation"] == pytest.approx([settled.count(i) / 33 for i in range(DEPTH)])
    assert scores.values == pytest.approx((1 - same.double().mean((1, 2))).tolist())
    losses = [token_nll(_ending_with(model, states[i]), DATA.ids).mean().item() for i in range(DEPTH)]
    assert scores.detail["nll"] == pytest.approx(losses, rel=1e-5)


def _ending_with(model: Any, state: torch.Tensor) -> torch.Tensor:
    bound = bind(model)
    with bound.running(), bound.executor().between(DEPTH, state):
        return logits_of(model, DATA.ids, None)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@torch.no_grad()
def test_a_prompt_continued_from_its_cache_is_the_whole_pass(family: str) -> None:
    model = tiny(family)
    whole = logits_of(model, DATA.ids, None)[:, 8:]
    assert torch.allclose(continued(model, DATA.ids, 8), whole, atol=1e-4)
    assert torch.equal(continued(model, DATA.ids, 8, frozen=DEPTH - 1), continued(model, DATA.ids, 8))
    assert not torch.allclose(continued(model, DATA.ids, 8, frozen=0), whole, atol=1e-2)


@torch.no_grad()
def test_frozen_keys_are_made_from_the_state_at_the_layer() -> None:
    model = copy.deepcopy(tiny("llama"))
    inputs: dict[int, torch.Tensor] = {}
    outputs = outputs_of(model, DATA.ids)
    with hooks_unchanged(model):
        for index, layer in enumerate(model.model.layers):
            norm = layer.input_layernorm
            norm.register_forward_pre_hook(lambda _, args, i=index: inputs.__setitem__(i, args[0]))
        cache = frozen_cache(model, DATA.ids, 1)
    assert torch.equal(inputs[2], outputs[1]) and torch.equal(inputs[3], outputs[1])
    layer = model.model.layers[3]
    values = layer.self_attn.v_proj(layer.input_layernorm(outputs[1])).view(3, 12, 2, 8).transpose(1, 2)
    assert torch.allclose(cache.layers[3].values, values)


@pytest.mark.parametrize("tail", [1, 12, 20])
def test_a_tail_that_does_not_fit_and_padding_are_refused(tail: int) -> None:
    for data in (DATA, ragged()):
        with pytest.raises(UsageError, match=r"leaves no prompt|without padding") as raised:
            kv_freeze(tiny("llama"), data, tail=tail if data is DATA else None)
        assert raised.value.code == "U538"


@torch.no_grad()
def test_a_swap_is_the_plan_that_runs_the_two_in_the_other_order() -> None:
    model = tiny("llama")
    scores = swap_curve(model, DATA)
    dense = logits_of(model, DATA.ids, None).double().log_softmax(-1)
    with running(model, "0,2,1,3"):
        swapped = logits_of(model, DATA.ids, None).double().log_softmax(-1)
    kl = (dense.exp() * (dense - swapped)).sum(-1)[:, :-1]
    assert scores.values[1] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert scores.detail["top1"][1] == pytest.approx((dense.argmax(-1) == swapped.argmax(-1))[:, :-1].double().mean())


def test_a_swap_that_a_family_cannot_run_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any, layers: tuple[int, ...]) -> None:
        if layers[0] == 1:
            raise PlanError("layer 0 must be first", code="P126")

    monkeypatch.setattr("shoal.executing.bind.refuse_order", refuse)
    scores = swap_curve(tiny("llama"), DATA)
    assert math.isnan(scores.values[0]) and scores.errors[0] is None and scores.values[1] > 0
    assert scores.notes == ("layer 0 was not judged: P126: layer 0 must be first",)


def test_no_plan_is_made_from_a_probe() -> None:
    scores = sinks(tiny("llama"), DATA)
    with pytest.raises(UsageError, match="sinks does not say which layers may go") as raised:
        scores.require(Plan.identity(inspect(tiny("llama"))), (1,))
    assert raised.value.code == "U530"


def test_a_metric_of_the_users_own_is_paired_item_by_item() -> None:
    model = tiny("llama")

    def right(running_model: Any) -> list[float]:
        with torch.no_grad():
            guess = running_model(input_ids=DATA.ids).logits[:, :-1].log_softmax(-1)
        return guess.gather(-1, DATA.ids[:, 1:, None]).mean((1, 2)).tolist()

    scores = task_removed(model, metric=right)
    dense = right(model)
    with running(model, "0-1,3"):
        falls = torch.tensor(dense, dtype=torch.float64) - torch.tensor(right(model), dtype=torch.float64)
    assert scores.values[2] == pytest.approx(falls.mean().item(), rel=1e-6)
    assert scores.errors[2] == pytest.approx((falls.std() / 3**0.5).item(), rel=1e-6)
    assert scores.data == "the metric right" and scores.sequences == 3
    single = task_removed(model, metric=lambda running_model: sum(right(running_model)))
    assert single.errors == (None,) * DEPTH and single.values[2] == pytest.approx(3 * scores.values[2], rel=1e-5)


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (lambda _: math.nan, "gave nan for the whole model"),
        (lambda _: [0.5, math.inf], "gave inf"),
        (lambda _: [], "gave nothing"),
        (lambda _: "much", "metric failed for the whole model: ValueError"),
        (lambda model: [1.0] * len(list(model.model.layers)) * 0 + [1.0] * next(_COUNT), "one for each item"),
        (lambda _: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_metric_that_cannot_be_used_is_named(metric: Any, words: str) -> None:
    model = copy.deepcopy(tiny("llama"))
    with pytest.raises(UsageError, match=words) as raised:
        task_removed(model, metric=metric)
    assert raised.value.code == "U533"
    assert type(model.model.layers) is torch.nn.ModuleList, "no plan is left running"


_COUNT = iter([2, 3])


def test_items_are_scored_by_what_follows(tmp_path: Path) -> None:
    model, tokenizer = copy.deepcopy(tiny("llama")), byte_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    file = tmp_path / "items.jsonl"
    lines = [
        {"context": "The cat sat on the", "continuation": "mat"},
        {"query": "Question: up?\n", "choices": ["down", "not down", "x"], "gold": 1},
        {"context": "", "continuation": "word"},
    ]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    tasks = load_tasks(file)
    items = tasks.items
    assert (
        items[1] == Item("Question: up?\n", ("down", "not down", "x"), 1) and len(load_tasks(file, limit=2).items) == 2
    )

    def followed(context: str, choice: str) -> tuple[float, bool]:
        before = tokenizer(context)["input_ids"] or [tokenizer.bos_token_id]
        wanted = tokenizer(choice)["input_ids"]
        with torch.no_grad():
            found = model(input_ids=torch.tensor([before + wanted])).logits[0, len(before) - 1 : -1].log_softmax(-1)
        told = torch.tensor(wanted)
        return found.gather(-1, told[:, None]).sum().item(), bool((found.argmax(-1) == told).all())

    for batch in (1, 3):
        smooth = _solved(model, tokenizer, tasks, "logprob", batch)
        sharp = _solved(model, tokenizer, tasks, "accuracy", batch)
        choices = [followed(items[1].context, choice)[0] for choice in items[1].options]
        assert smooth[0] == pytest.approx(followed("The cat sat on the", " mat")[0], abs=1e-3)
        assert smooth[1] == pytest.approx(torch.tensor(choices).log_softmax(0)[1].item(), abs=1e-3)
        assert smooth[2] == pytest.approx(followed("", "word")[0], abs=1e-3)
        assert sharp == [0.0, float(max(choices) == choices[1]), 0.0]
    loaded = Loaded(model, tokenizer, "tiny")
    scores = measure(loaded, "task-removed", settings={"file": str(file), "score": "logprob"}, data=data_of(DATA.ids))
    assert scores.sequences == 3 and scores.data == "items.jsonl, 3 items" and len(set(scores.values)) == DEPTH
    with pytest.raises(UsageError, match="needs the model's tokenizer"):
        task_removed(model, file=str(file))
    with pytest.raises(UsageError, match="nothing to judge by"):
        task_removed(model)


@pytest.mark.parametrize(
    "text", ["", "no json\n", '{"context": 1, "continuation": "x"}', '{"query": "q", "choices": ["a"], "gold": 1}']
)
def test_a_file_without_items_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(text, encoding="utf-8")
    for path in (file, tmp_path / "missing.jsonl"):
        with pytest.raises(DataError, match="D45"):
            load_tasks(path)
