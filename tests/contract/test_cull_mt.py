"""CULL-MT on encoder-decoders and by what a model writes: BLEU by hand, and greedy against a table of stock models."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from shoal.errors import DataError, ModelError, UsageError
from shoal.evaluation.pairs import write_each
from shoal.evaluation.tasks import Item, Tasks, score_tasks
from shoal.evaluation.translations import bleu, load_translations, score_translations
from shoal.live import running
from shoal.methods.cull_mt import cull_mt
from shoal.plan import drop
from shoal.writing.surgery import rewrite

from .families import tiny
from .kinds import kind
from .method_tasks import task_of
from .planted import random_data
from .verbs import run

LETTERS = "abcdefghijklmnop"
PAIRS = [("a b c d", "e f g"), ("h i", "j k")]


def letters() -> PreTrainedTokenizerFast:
    """A token for each letter, </s> behind a text."""
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{letter: 3 + n for n, letter in enumerate(LETTERS)}}
    unknown = "<unk>"
    inner = Tokenizer(models.WordLevel(words, unk_token=unknown))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": unknown}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"source": a, "target": b}) + "\n" for a, b in PAIRS))
    return file


@pytest.mark.parametrize(
    ("written", "references", "score"),
    [
        ([[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 5]], 100.0),
        ([[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 6]], 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25),
        ([[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6]], 100 * 2.718281828459045**-0.5),  # too short: exp(1 - 6 / 4)
        ([[1, 2, 3, 4, 5, 6]], [[1, 2, 3, 4]], 100 * (4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25),
        ([[1, 1, 1, 1, 1]], [[1, 2, 3, 4, 5]], 100 * (1 / 5 * 1 / 8 * 1 / 12 * 1 / 16) ** 0.25),  # clipped, smoothed
        ([[1, 2, 3, 4], [9]], [[1, 2, 3, 4], [5]], 100 * (4 / 5) ** 0.25),  # counts are summed over the corpus
        ([[7, 8]], [[1, 2]], 0.0),
        ([[]], [[1, 2]], 0.0),
    ],
)
def test_bleu_by_hand(written: Any, references: Any, score: float) -> None:
    assert bleu(written, references) == pytest.approx(score, rel=1e-9)


def planted_t5() -> Any:
    """An encoder-decoder whose encoder layer 3 adds nothing."""
    model: Any = copy.deepcopy(kind("t5"))
    layer = model.encoder.block[3].layer
    for weight in (layer[0].SelfAttention.o.weight, layer[1].DenseReluDense.wo.weight):
        weight.data.zero_()
    model.generation_config.eos_token_id = 1
    return model


@torch.no_grad()
def by_hand(model: Any, tokenizer: Any) -> float:
    """What cull-mt makes small, one pair at a time, without padding: the model as it runs now."""
    written, references, losses = [], [], []
    for source, target in PAIRS:
        ids, labels = (torch.tensor([tokenizer(text)["input_ids"]]) for text in (source, target))
        logits = model(input_ids=ids, labels=labels).logits[0].log_softmax(-1)
        losses.append(-float(logits.gather(-1, labels[0][:, None]).sum()))
        out = model.generate(input_ids=ids, max_new_tokens=2 * 3 + 8, do_sample=False, num_beams=1)[0, 1:].tolist()
        out = out[: out.index(1)] if 1 in out and model.generation_config.eos_token_id == 1 else out
        written.append([one for one in out if one > 2])
        references.append([one for one in labels[0].tolist() if one > 2])
    return 1 - bleu(written, references) / 100 + sum(losses) / len(losses) / 1000


@pytest.mark.parametrize("name", ["bart", *(pytest.param(name, marks=pytest.mark.slow) for name in ("t5", "marian"))])
def test_greedy_takes_the_least_harmful_layer_of_both_stacks(name: str, pairs: Path) -> None:
    model: Any = planted_t5() if name == "t5" else kind(name)
    task = replace(task_of(model, random_data(2, 8)), tokenizer=letters())
    table = {}
    for stack, layers in task.plan.stacks:
        for layer in range(len(layers)):
            plan = drop(task.plan, [layer], stack=stack)
            if task.legal(plan):
                with running(model, plan):
                    table[stack, layer] = by_hand(model, letters())
    found = cull_mt(task, drop=1, file=pairs)
    (stack, layer) = min(table, key=table.__getitem__)
    gone = {one: found.plan.dropped(one) for one, _ in found.plan.stacks}
    assert {one: layers for one, layers in gone.items() if layers} == {stack: (layer,)}
    assert found.trace[0].score == pytest.approx(table[stack, layer], abs=1e-5)
    assert found.trace[0].note == f"layer {layer} of the {stack} removed"
    assert len({round(one, 6) for one in table.values()}) > 6
    if name == "t5":
        assert table["encoder", 3] == pytest.approx(by_hand(model, letters()), abs=1e-6)


def test_layers_go_from_both_stacks_or_from_the_named_one(pairs: Path) -> None:
    task = replace(task_of(planted_t5(), random_data(2, 8)), tokenizer=letters())
    two = cull_mt(task, drop=2, file=pairs, items=1)
    assert sum(len(two.plan.dropped(one)) for one in ("encoder", "decoder")) == 2 == len(two.trace)
    named = cull_mt(replace(task, stack="decoder"), drop=1, file=pairs, items=1)
    assert len(named.plan.dropped("decoder")) == 1 and not named.plan.dropped("encoder")
    with pytest.raises(UsageError, match=r"U504.*encoder, decoder.*1 to 10"):
        cull_mt(task, drop=11, file=pairs)


@torch.no_grad()
def test_a_task_is_scored_by_an_encoder_decoder_whatever_the_padding() -> None:
    model, tokenizer = planted_t5(), letters()
    items = (Item("a b c", ("d", "e f g h", "i")), Item("d", ("a b", "c"), 1), Item("e f g h i j", ("k",)))
    found = score_tasks(model, tokenizer, Tasks("t", items, ""), batch=2)
    nll, right = [], []
    for item in items:
        totals = []
        for option in item.options:
            ids, labels = (torch.tensor([tokenizer(text)["input_ids"]]) for text in (item.context, option))
            scores = model(input_ids=ids, labels=labels).logits[0].log_softmax(-1)
            totals.append(float(scores.gather(-1, labels[0][:, None]).sum()))
            greedy = bool((scores.argmax(-1) == labels[0]).all())
        nll.append(-totals[item.gold])
        right.append(totals.index(max(totals)) == item.gold if len(totals) > 1 else greedy)
    assert found.nll == pytest.approx(sum(nll) / 3, rel=1e-4) and found.correct == tuple(right)


@pytest.mark.parametrize("batch", [1, 4])
@torch.no_grad()
def test_what_is_written_does_not_depend_on_the_batch(batch: int) -> None:
    model: Any = tiny("llama")
    sources = [a for a, _ in PAIRS]
    found = write_each(model, letters(), sources, new_tokens=5, batch=batch)
    for source, own in zip(sources, found, strict=True):
        ids = torch.tensor([letters()(source)["input_ids"]])
        out = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :].tolist()
        assert own == [one for one in out if one > 2]


def test_a_causal_model_is_pruned_by_what_it_writes(pairs: Path) -> None:
    task = replace(task_of(tiny("llama"), random_data(2, 8)), tokenizer=letters())
    translations = load_translations(pairs)
    assert translations is not None and translations.pairs == tuple(PAIRS)
    table = []
    for layer in range(4):
        value, nll = score_translations(rewrite(task.model, drop(task.plan, [layer])), letters(), translations)
        table.append(1 - value / 100 + nll / 1000)
    assert cull_mt(task, drop=1, file=pairs).plan.dropped() == (table.index(min(table)),)


def test_models_that_write_nothing_and_broken_pairs_are_refused(tmp_path: Path, pairs: Path) -> None:
    bert = replace(task_of(kind("bert"), random_data(2, 8)), tokenizer=letters())
    with pytest.raises(ModelError, match=r"M322.*cull-mt"):
        cull_mt(bert, drop=1, file=pairs)
    (tmp_path / "t.jsonl").write_text('{"context": "a", "continuation": "b"}\n')
    with pytest.raises(ModelError, match=r"M322.*scoring the items"):
        score_tasks(kind("bert"), letters(), Tasks("t", (Item("a", ("b",)),), ""))
    assert load_translations(tmp_path / "t.jsonl") is None
    pairs.write_text(pairs.read_text() + '{"source": "a"}\n')
    with pytest.raises(DataError, match=r"D450.*pairs.jsonl, line 3 is no translation"):
        load_translations(pairs)


@pytest.mark.parametrize("line", [{"source": "a b", "target": "c d"}, {"context": "a b", "continuation": "c"}])
def test_an_encoder_decoder_is_pruned_from_the_command_line(tmp_path: Path, line: dict[str, str]) -> None:
    planted_t5().save_pretrained(tmp_path / "t5")
    letters().save_pretrained(tmp_path / "t5")
    (tmp_path / "text.txt").write_text("a b c d e f g h i j k l m n o p " * 8)
    (tmp_path / "task.jsonl").write_text(json.dumps(line) + "\n")
    words = ["prune", str(tmp_path / "t5"), "-m", f"cull-mt:file={tmp_path}/task.jsonl", "--drop", "1", "--no-assess"]
    found = run([*words, "--data", str(tmp_path / "text.txt"), "--length", "8", "--limit", "2", "--json"])
    assert found.exit_code == 0, found.output
    said = json.loads(found.stdout)
    assert sum(map(len, said["dropped"].values())) == 1
