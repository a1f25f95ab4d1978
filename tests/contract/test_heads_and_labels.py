"""Heads that rest, labels that are read, interactions of tokens: naive references, planted answers, refusals."""

from __future__ import annotations

import copy
import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.executing.bind import bind
from shoal.live import running
from shoal.measures.interactions import _dividends, interactions
from shoal.measures.label_probe import label_probe
from shoal.measures.value_drain import value_drain
from shoal.models.stacks import find_stack

from .families import DEPTH, tiny
from .kinds import kind
from .planted import DEEP, NULL, answers, data_of, outputs_of, random_data
from .test_api import byte_tokenizer
from .test_measures import ragged
from .test_oracles import DATA, refused


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_value_drain_compares_the_first_token_with_the_others(family: str) -> None:
    model, data = tiny(family, "eager"), ragged()
    scores, heads = value_drain(model, data, batch=2, dormant=0.3), 2 if family == "llama" else 4
    lengths: list[list[torch.Tensor]] = [[] for _ in range(DEPTH)]
    peaks, shares = copy.deepcopy(lengths), copy.deepcopy(lengths)
    for ids, real in zip(data.ids, data.mask, strict=True):
        own = ids[real.bool()][None]
        out = model(own, use_cache=True, output_attentions=True)
        for layer, made in outputs_of(model, own).items():
            v, y = (x[0].double().norm(dim=-1) for x in (out.past_key_values.layers[layer].values, made))
            lengths[layer].append(v[:, 0] / v[:, 1:].mean(-1))
            peaks[layer].append(y[0] / y[1:].mean())
            shares[layer].append(out.attentions[layer][0, :, 1:, 0].mean(-1))
    for layer in range(DEPTH):
        drains, sinks = torch.stack(lengths[layer]), torch.stack(shares[layer])
        assert drains.shape == (5, heads)
        assert scores.values[layer] == pytest.approx(drains.mean().item(), rel=1e-4)
        assert scores.detail["heads"][layer] == pytest.approx(drains.mean(0).tolist(), rel=1e-4)
        assert scores.detail["peak"][layer] == pytest.approx(torch.stack(peaks[layer]).mean().item(), rel=1e-4)
        assert scores.detail["sink"][layer] == pytest.approx(sinks.mean(0).tolist(), rel=1e-4)
        resting = {(i, h): share for i, h, share in scores.detail["dormant"] if i == layer}
        expected = {(layer, h): share for h, share in enumerate((sinks >= 0.3).double().mean(0).tolist()) if share}
        assert resting == pytest.approx(expected)
    assert scores.tokens == int(data.mask.sum()) and not scores.removal


def test_a_head_that_rests_for_some_texts_is_found() -> None:
    """Layer 1 of a model whose values of the first token are nothing; its first head looks there for even texts."""
    model, some = copy.deepcopy(tiny("llama", "eager")), torch.ones(1, dtype=torch.bool)
    attention = model.model.layers[1].self_attn

    def begins(_: Any, args: Any, out: torch.Tensor) -> None:
        nonlocal some
        some = args[0][:, 0] % 2 == 0

    def drained(_: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(out[:, :1]), out[:, 1:]], 1)

    def resting(_: Any, args: Any, out: Any) -> Any:
        maps = out[1].clone()
        maps[some, 0] = torch.nn.functional.one_hot(torch.tensor(0), maps.shape[-1]).to(maps)
        return (out[0], maps)

    model.get_input_embeddings().register_forward_hook(begins)
    attention.v_proj.register_forward_hook(drained)
    attention.register_forward_hook(resting)
    data = random_data(8, 16, seed=2)
    scores = value_drain(model, data)
    assert scores.values[1] == 0 and all(scores.values[layer] > 0.3 for layer in (0, 2, 3))
    assert [1, 0, float((data.ids[:, 0] % 2 == 0).double().mean())] in scores.detail["dormant"]
    assert "0 of 16 heads" in scores.notes[0]


def test_value_drain_needs_two_tokens_and_attention() -> None:
    refused("U695", "give longer sequences", lambda: value_drain(tiny("llama"), random_data(2, 1)))
    refused("U537", "keys and values", lambda: value_drain(tiny("mamba2", "eager"), DATA))
    with running(tiny("llama"), "0-2"):
        refused("U507", "a plan is running", lambda: value_drain(tiny("llama"), DATA))


@cache
def byte_model() -> Any:
    """A tiny model with a token for each byte."""
    config = copy.deepcopy(tiny("llama").config)
    config.vocab_size = 259
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return type(tiny("llama"))(config).eval()


def labelled(path: Path, texts: list[tuple[str, Any]]) -> str:
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in texts))
    return str(path)


def marked(count: int = 24) -> list[tuple[str, str]]:
    """Texts whose label is whether they hold an x, which no layer has to attend for."""
    kinds = [("odd", "x") if n % 3 == 0 else ("even", "y") for n in range(count)]
    return [("abcd" * 3 + letter + "ef" * (n % 4), label) for n, (label, letter) in enumerate(kinds)]


def test_the_label_is_read_where_it_stands_and_nowhere_behind(tmp_path: Path) -> None:
    model, tokenizer = copy.deepcopy(byte_model()), byte_tokenizer()
    file = labelled(tmp_path / "items.jsonl", marked())
    scores = label_probe(model, file=file, tokenizer=tokenizer, batch=5)
    assert scores.values == (0.0,) * DEPTH and scores.detail["macro_f1"] == [1.0] * DEPTH
    assert scores.detail["majority"] == pytest.approx(1 / 3) and scores.detail["labels"] == [["even", 16], ["odd", 8]]
    assert (scores.sequences, scores.tokens, scores.data) == (24, 24, "items.jsonl, 24 items")
    forget = find_stack(model).layer(2)
    forget.register_forward_hook(lambda _, args, out: torch.ones_like(out))
    lost = label_probe(model, file=file, tokenizer=tokenizer, batch=5)
    assert lost.values[:2] == (0.0, 0.0) and min(lost.values[2:]) > 0.2


@torch.no_grad()
def test_the_probe_is_a_regression_on_pooled_states_judged_on_other_items(tmp_path: Path) -> None:
    model, tokenizer = byte_model(), byte_tokenizer()
    draw = torch.Generator().manual_seed(4)
    letters = [torch.randint(97, 123, (6 + n % 5,), generator=draw) for n in range(24)]
    texts = [("".join(map(chr, own)), n % 3) for n, own in enumerate(letters)]
    file, y = labelled(tmp_path / "items.jsonl", texts), torch.tensor([label for _, label in texts])
    states = [outputs_of(model, torch.tensor([tokenizer(text)["input_ids"]])) for text, _ in texts]
    for pool in ("mean", "last"):
        own: dict[str, Any] = {"pool": pool, "folds": 4, "ridge": 0.1, "batch": 7}
        scores = label_probe(model, file=file, tokenizer=tokenizer, **own)
        parts = torch.tensor([(n // 3 + 8 * (n % 3)) % 4 for n in range(24)])
        for layer in (0, 3):
            x = torch.stack([s[layer][0].mean(0) if pool == "mean" else s[layer][0, -1] for s in states]).double()
            wrong = 0
            for part in range(4):
                fitted, held = x[parts != part], x[parts == part]
                mean, spread = fitted.mean(0), fitted.std(0, correction=0)
                weights = torch.zeros(33, 3, dtype=torch.float64, requires_grad=True)
                ones = [torch.nn.functional.pad((one - mean) / spread, (0, 1), value=1.0) for one in (fitted, held)]
                steps = torch.optim.LBFGS([weights], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

                def loss(x: Any = ones[0], y: Any = y[parts != part], w: Any = weights, steps: Any = steps) -> Any:
                    with torch.enable_grad():
                        steps.zero_grad()
                        size = 1 / torch.bincount(y).double()
                        found = torch.nn.functional.cross_entropy(x @ w, y, weight=size) + 0.05 * w[:-1].square().sum()
                        found.backward()
                    return found

                steps.step(loss)
                wrong += int(((ones[1] @ weights).argmax(-1) != y[parts == part]).sum())
            assert scores.values[layer] == pytest.approx(wrong / 24)


def test_without_a_file_the_label_is_the_token_before() -> None:
    """A token in front of which always stands the same one tells it; a first layer that cannot attend does not."""
    ids = torch.stack([torch.tensor([5, 9, 6, 10] * 4).roll(n) for n in range(6)])
    known = label_probe(tiny("llama"), data_of(ids), batch=4)
    assert max(known.values) < 0.2 and known.detail["majority"] > 0.7 and known.tokens == 6 * 15
    assert sorted(word for word, _ in known.detail["labels"]) == ["token 10", "token 5", "token 6", "token 9"]
    model, text = copy.deepcopy(tiny("gpt2")), random_data(12, 24, vocab=6)
    model.transformer.wpe.weight.data.zero_()
    find_stack(model).layer(0).attn.c_proj.weight.data.zero_()
    blind = label_probe(model, text)
    assert blind.values[0] > 0.5 and blind.values[0] > blind.values[-1] + 0.05
    encoder = label_probe(kind("bert"), random_data(4, 9, vocab=8))
    assert len(encoder.values) == 6 and encoder.stack == "encoder" and max(encoder.values) <= 1
    padded = ragged()
    alone = label_probe(tiny("llama"), padded)
    assert alone.tokens <= int(padded.mask.sum()) - 5


def test_what_cannot_be_classified_is_refused(tmp_path: Path) -> None:
    model, tokenizer = byte_model(), byte_tokenizer()
    file = labelled(tmp_path / "one.jsonl", [("abc", "a"), ("def", "a")])
    refused("U696", "1 labels on 2 items", lambda: label_probe(model, file=file, tokenizer=tokenizer))
    refused("U696", "nothing to fit", lambda: label_probe(model, DATA, folds=1))
    refused("U532", "nothing to read", lambda: label_probe(model))
    refused("U532", "needs the model's tokenizer", lambda: label_probe(model, file=file))
    broken = tmp_path / "two.jsonl"
    broken.write_text('{"text": "abc", "label": "a"}\n{"text": "abc", "label": 1.5}\n')
    for name, code, words in (
        (broken, "U697", "two.jsonl, line 2 is no labelled"),
        (tmp_path / "no", "D450", "cannot"),
    ):
        refused(code, words, partial(label_probe, model, file=str(name), tokenizer=tokenizer))


def test_dividends_are_what_was_put_in() -> None:
    """v(S) = 3 where 0 and 1 are in S, + 2 where 2 is, - 1 where all are, + 0.5 always."""
    sets = [[number >> bit & 1 for bit in range(3)] for number in range(8)]
    worth = torch.tensor([3.0 * (a * b) + 2 * c - a * b * c + 0.5 for a, b, c in sets])
    assert _dividends(worth).tolist() == [0.5, 0, 0, 3, 2, 0, 0, -1]
    drawn = torch.randn(2, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = _dividends(drawn)
    assert torch.allclose(found.sum(-1), drawn[:, -1]), "the effects of all sets add up"
    for s in range(32):
        inner = [t for t in range(32) if t & s == t]
        naive = sum((-1.0) ** (s ^ t).bit_count() * drawn[:, t] for t in inner)
        assert torch.allclose(found[:, s], naive)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_interactions_are_those_of_hidden_tokens(family: str) -> None:
    model, data = answers(family), random_data(2, 9)
    scores = interactions(model, data, tokens=3, salient=0.2)
    found = []
    for ids in data.ids:
        worth = torch.zeros(DEEP, 8, dtype=torch.float64)
        for s in range(8):
            mask = torch.ones(1, 8, dtype=torch.long)
            for token in range(3):
                mask[0, 4 + token] = s >> token & 1
            states = outputs_of(model, ids[None, :8], attention_mask=mask)
            for layer in range(DEEP):
                with bind(model).running() as bound, bound.executor().between(DEEP, states[layer]):
                    p = model(input_ids=ids[None, :8]).logits[0, -1].double().softmax(-1)[ids[8]]
                worth[layer, s] = (p / (1 - p)).log()
        effects = _dividends(worth)[:, 1:].abs()
        found.append(effects >= 0.2 * effects.amax(-1, keepdim=True))
    there = torch.stack(found).double()
    assert scores.values == pytest.approx(there.sum(-1).mean(0).tolist())
    kept = [float((there[:, i] * there[:, -1]).sum() / there[:, i].sum()) for i in range(DEEP)]
    assert scores.detail["kept"] == pytest.approx(kept) and kept[-1] == 1
    sizes = torch.tensor([s.bit_count() for s in range(1, 8)])
    assert scores.detail["order"] == pytest.approx([float((t * sizes).sum() / t.sum()) for t in there.unbind(1)])
    assert scores.values[NULL] == scores.values[NULL - 1], "and a layer that does nothing adds and forgets none"
    assert scores.detail["new"][NULL] == scores.detail["forgotten"][NULL] == 0
    for layer in range(1, DEEP):
        change = scores.detail["new"][layer] - scores.detail["forgotten"][layer]
        assert scores.values[layer] - scores.values[layer - 1] == pytest.approx(change)


def test_interactions_that_cannot_be_counted_are_refused() -> None:
    refused("U698", "use 1 to 10 tokens", lambda: interactions(tiny("llama"), DATA, tokens=11))
    refused("U698", "above 0", lambda: interactions(tiny("llama"), DATA, salient=0.0))
    refused("U698", "give longer sequences", lambda: interactions(tiny("llama"), random_data(1, 3)))
    refused("M316", "no hidden state for each token", lambda: interactions(tiny("gemma3n_text"), DATA))
    with running(tiny("llama"), "0-2"):
        refused("U507", "a plan is running", lambda: interactions(tiny("llama"), DATA))
