"""measure, prune, evaluate and bench on a tiny model in a folder, from text to plain data."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import shoal
from shoal.api.assess import bench, evaluate
from shoal.api.budget import layers_to_drop
from shoal.api.measuring import measure
from shoal.api.prune import prune
from shoal.api.pruned import Pruned
from shoal.errors import DataError, PlanError, UsageError, WriteError
from shoal.evaluation import PROMPTS, generation_check
from shoal.examples import MethodExamples
from shoal.models.inspect import inspect
from shoal.models.load import Loaded, load
from shoal.plan import Plan, drop
from shoal.registry import entries, get
from shoal.scores import Candidate, Traits

from .families import tiny
from .method_tasks import METHODS, TASK, filled
from .planted import random_data, silence
from .shares import pairs

SMALL: dict[str, Any] = {"length": 32, "limit": 3}
PLANTED = 2


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and three special ones."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    words = [*special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


def model_folder(place: Path) -> Path:
    """A tiny Llama of 5 layers, one of them silent, with a tokenizer."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4}
    ids = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, **ids, num_key_value_heads=2, max_position_embeddings=256))
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data.normal_(0, 0.15)
    silence(model, PLANTED)
    model.save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task for methods that need one."""
    file = tmp_path_factory.mktemp("task") / "task.jsonl"
    file.write_text(TASK)
    return file


def counts_layers(name: str) -> bool:
    """Whether the number of layers that go is all that the method is told, so that any budget is one for it."""
    own = METHODS[name]
    return own.counts == "layers" and own.exact and own.writable and own.budget == MethodExamples().budget


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return load(folder, device="cpu")


def fingerprint(model: Any) -> str:
    """Weights, modes, hooks, config, and which objects the layers are."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    for name, module in model.named_modules():
        digest.update(f"{name} {id(module)} {module.training} {len(module._forward_hooks)}".encode())
    return digest.hexdigest()


@pytest.fixture
def unchanged(loaded: Loaded) -> Any:
    before, layers = fingerprint(loaded.model), loaded.model.model.layers
    yield
    assert fingerprint(loaded.model) == before
    assert loaded.model.model.layers is layers


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value.to_dict(), allow_nan=False))


@pytest.mark.parametrize("name", list(entries("measures")))
def test_measure_by_name(loaded: Loaded, unchanged: None, name: str) -> None:
    scores = measure(loaded, name, **SMALL)
    assert scores.measure == name
    traits = getattr(importlib.import_module(get("measures", name).module), "TRAITS", Traits())
    if traits.null == "silent":
        assert scores.values[PLANTED] == 0
    if traits.text:
        assert scores.sequences == 3 and "builtin" in scores.data and "3 x 32 tokens" in scores.data
    else:
        assert scores.sequences == scores.tokens == 0 and "no text" in scores.data
    assert as_json(scores)["measure"] == name


def test_measure_reads_a_folder_a_live_model_and_given_data(folder: Path, loaded: Loaded, unchanged: None) -> None:
    from_folder = measure(folder, settings={"skip_first": 1}, device="cpu", **SMALL)
    from_model = measure(loaded.model, settings={"skip_first": 1}, tokenizer=loaded.tokenizer, **SMALL)
    assert from_folder == from_model == shoal.measure(str(folder), settings={"skip_first": 1}, device="cpu", **SMALL)
    assert measure(loaded.model, data=random_data(2, 8, vocab=259)).sequences == 2


@pytest.mark.parametrize(
    ("name", "settings", "code"), [("block-influense", {}, "U501"), ("block-influence", {"skip": 1}, "U502")]
)
def test_measure_refuses_unknown_names_before_it_loads(name: str, settings: dict[str, Any], code: str) -> None:
    with pytest.raises(UsageError) as raised:
        measure("no/such-model", name, settings=settings)
    assert raised.value.code == code


def test_text_needs_a_tokenizer(loaded: Loaded) -> None:
    with pytest.raises(DataError, match="has no tokenizer that can be read") as raised:
        measure(loaded.model, **SMALL)
    assert raised.value.code == "D440"


@pytest.mark.parametrize("name", METHODS)
def test_prune_by_every_method(loaded: Loaded, unchanged: None, name: str, task_file: Path) -> None:
    own = METHODS[name]
    amount: dict[str, Any] = {"budget": "layers=0.8"} if own.counts == "budget" else {"drop": 1}
    settings = {**filled(own.needed, task_file), **own.quick}
    small = SMALL | {"limit": own.sequences}
    found = prune(loaded, method=name, writable=own.writable, settings=settings, **amount, **small)
    assert found.method == name and str(found.plan) != "0-4"
    if own.chooses_by == "states":
        assert found.plan.dropped() == (PLANTED,)
    if own.writable:
        assert len(found.plan.layers()) == 4 and len(found.plan.dropped()) == (2 if _shares(found) else 1)
        assert found.before.params - found.after.written_params == found.spec.stack().layers[0].params
    data = as_json(found)
    if not found.found.weights:  # which, while the plan runs live, are held beside the base's
        assert found.after.written_params == found.after.params or not own.writable
        assert data["trace"][0 if own.best_first else -1]["plan"] == str(found.plan)
    assert data["data"]["count"] == small["limit"]
    assert data["method"] == name and data["plan"] == str(found.plan) and data["hash"] == found.plan.hash
    assert data["dropped"] == {"decoder": list(found.plan.dropped())}
    assert data["evaluation"] is None and data["bench"] is None
    assert data["trace"] and data["weights"].keys() == found.found.weights.keys()


def _shares(found: Pruned) -> bool:
    """Whether two runs share the matrices of one layer."""
    return len(set(found.plan.layers())) < len(found.plan.layers())


def test_a_preset_has_no_score(loaded: Loaded) -> None:
    assert as_json(prune(loaded, method="position", drop=1, **SMALL))["trace"][0]["score"] is None


@pytest.mark.parametrize(
    ("name", "unit"), pairs(2, [name for name in METHODS if counts_layers(name)], ["params", "layers"])
)
def test_a_method_that_counts_layers_meets_a_budget(loaded: Loaded, name: str, unit: str, task_file: Path) -> None:
    settings = filled(METHODS[name].needed, task_file)
    small = SMALL | {"limit": METHODS[name].sequences}
    found = prune(loaded, method=name, budget=f"{unit}=0.7", settings=settings, **small)
    assert found.price is not None and found.price["price"] <= 0.7
    one = found.spec.stack().layers[0].params / found.before.params if unit == "params" else 1 / 5
    assert found.price["price"] + one > 0.7, "and no more goes than must"


def test_cqil_refuses_a_budget_and_plans_that_are_to_be_written(loaded: Loaded) -> None:
    with pytest.raises(UsageError, match="U523"):
        prune(loaded, method="cqil", budget="params=0.7", writable=False, **SMALL)
    with pytest.raises(UsageError, match=r"U504.*allow plans that only run live"):
        prune(loaded, method="cqil", drop=1, **SMALL)
    with pytest.raises(WriteError, match="W204"):
        prune(loaded, method="llm-streamline", drop=3, settings={"kind": "ffn", "epochs": 1}, **SMALL)


def test_a_layer_less_is_its_parameters_less(loaded: Loaded) -> None:
    found = prune(loaded, drop=1, **SMALL)
    assert found.before.params - found.after.params == found.spec.stack().layers[0].params
    assert found.after.written_params == found.after.params
    assert as_json(found)["data"]["count"] == 3 and as_json(found)["trace"][-1]["plan"] == str(found.plan)


def test_prune_takes_a_share_and_settings(loaded: Loaded) -> None:
    assert len(prune(loaded, keep=0.4, **SMALL).plan.dropped()) == 3
    found = prune(loaded, method="position", drop=2, settings={"which": "first"}, **SMALL)
    assert found.plan.dropped() == (0, 1)


def test_prune_takes_a_plan_as_it_is(loaded: Loaded, unchanged: None) -> None:
    by_text = prune(loaded, plan="0-1,3-4")
    by_plan = prune(loaded, plan=drop(Plan.identity(inspect(loaded.model)), [2]))
    assert by_text.plan == by_plan.plan and by_text.plan.dropped() == (2,)
    assert by_text.method == "listed" and by_text.data is None
    assert as_json(by_text)["data"] is None
    with pytest.raises(PlanError, match="does not exist") as raised:
        prune(loaded, plan="0-9")
    assert raised.value.code == "P103"


def test_a_plan_that_cannot_be_written_is_refused_unless_it_may_run_live(loaded: Loaded) -> None:
    with pytest.raises(WriteError) as raised:
        prune(loaded, plan="0,1a,2-4")
    assert raised.value.code == "W201"
    assert str(prune(loaded, plan="0,1a,2-4", writable=False).plan) == "0,1a,2-4"
    assert str(prune(loaded, plan="0,1a,2-4", zero_parts=True).plan) == "0,1a,2-4"


def test_a_model_that_cannot_be_written_is_refused_before_the_search() -> None:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(LlamaForCausalLM(tiny("llama").config), LoraConfig(target_modules=["q_proj"]))
    data = random_data(2, 8)
    with pytest.raises(WriteError, match="wrapped by PEFT") as raised:
        prune(wrapped, drop=1, data=data)
    assert raised.value.code == "W211"
    assert len(prune(wrapped, method="sleb", drop=1, data=data, writable=False).plan.dropped()) == 1


def test_only_plans_that_can_be_written_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_data(2, 8)
    free = [prune(tiny("jamba"), method="sleb", drop=n, data=data, writable=False).plan.dropped() for n in (1, 2)]
    held = [prune(tiny("jamba"), method="sleb", drop=n, data=data).plan for n in (1, 2)]
    assert all(len(gone) == n for n, gone in enumerate(free, start=1))
    for plan in held:
        shoal.rewrite(tiny("jamba"), plan)
    assert prune(tiny("gemma3n_text"), drop=1, data=data).plan.dropped() in ((2,), (3,))  # 0 and 1 are read by others

    def unwritable(_: Any, plan: Plan, **__: Any) -> None:
        if not plan.is_identity():
            raise WriteError("not this one", code="W206")

    monkeypatch.setattr("shoal.api.legal_plans.blueprint", unwritable)
    with pytest.raises(UsageError, match=r"no layer may go: .* allow plans that only run live") as raised:
        prune(tiny("llama"), drop=1, data=data)
    assert raised.value.code == "U504"
    assert prune(tiny("llama"), drop=1, data=data, writable=False).plan.dropped()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"plan": "0-3", "drop": 1}, "U521", "not both"),
        ({"plan": "0-3", "keep": 0.5}, "U521", "not both"),
        ({}, "U522", "say how much to remove: --drop LAYERS, --keep SHARE or"),
        ({"drop": 1, "keep": 0.5}, "U522", "say how much"),
        ({"drop": 0}, "U522", "cannot remove 0 of 5 layers; give 1 to 4"),
        ({"drop": 5}, "U522", "cannot remove 5 of 5 layers"),
        ({"drop": -1}, "U522", "cannot remove -1 of 5 layers"),
        ({"keep": 0.99}, "U522", "cannot remove 0 of 5 layers"),
        ({"keep": 0}, "U522", "not a share between 0 and 1"),
        ({"keep": 1.5}, "U522", "not a share between 0 and 1"),
        ({"keep": math.nan}, "U522", "not a share between 0 and 1"),
        ({"drop": 1, "method": "shortgtp"}, "U501", r"did you mean shortgpt\?"),
        ({"drop": 1, "settings": {"skp_first": 1}}, "U502", r"did you mean skip_first\?"),
        ({"drop": 1, "method": "position", "settings": {"which": "top"}}, "U502", "which=top is not one of"),
        ({"drop": 1, "method": "position", "settings": {"drop": 2}}, "U502", "no option 'drop'"),
    ],
)
def test_prune_refuses_what_contradicts_itself(loaded: Loaded, options: Any, code: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        prune(loaded, **options, **SMALL)
    assert raised.value.code == code


@pytest.mark.parametrize(("keep", "gone"), [(0.8, 1), (0.5, 3), (0.2, 4), (0.01, 4)])
def test_a_share_is_rounded_to_layers_and_leaves_one(loaded: Loaded, keep: float, gone: int) -> None:
    assert layers_to_drop(inspect(loaded.model), None, None, keep) == gone


def test_prune_keeps_a_journal(loaded: Loaded, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    first = prune(loaded, method="sleb", drop=2, journal=path, **SMALL)
    lines = path.read_text().splitlines()
    assert len(lines) == 1 + 5 + 4
    assert prune(loaded, method="sleb", drop=2, journal=path, **SMALL).found == first.found
    assert path.read_text().splitlines() == lines


@pytest.fixture(scope="module")
def assessed(loaded: Loaded) -> Pruned:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shoal.api.assess.generation_check", partial(generation_check, prompts=PROMPTS[:1]))
        return prune(loaded, drop=2, assess=True, length=256, limit=2)


def test_prune_assesses_dense_against_pruned(loaded: Loaded, assessed: Pruned) -> None:
    quality, timed = assessed.evaluation, assessed.bench
    assert quality is not None and timed is not None
    assert quality.perplexity.info.split == "test" and quality.perplexity.info.length == 256
    assert quality.perplexity.info.count == 2
    assert quality.dense is not None and quality.perplexity.nll != quality.dense.nll
    assert quality.agreement is not None and 0 < quality.agreement.top1 < 1 and quality.agreement.kl > 0
    assert quality.generation is not None and quality.dense_generation is not None
    assert [variant.name for variant in timed.speed.variants] == ["dense", "pruned"]
    assert timed.speed.prompt == 256 - 32, "what the context leaves beside the decoded tokens"
    assert timed.memory["pruned"].kv_bytes_per_token * 5 == timed.memory["dense"].kv_bytes_per_token * 3
    assert loaded.model.model.layers.__class__ is torch.nn.ModuleList


def test_what_prune_found_is_json_whatever_the_numbers(assessed: Pruned) -> None:
    assert assessed.evaluation is not None and assessed.found.scores is not None
    broken = replace(assessed.evaluation.perplexity, value=math.inf, nll=math.nan, error=math.nan)
    scores = replace(assessed.found.scores, values=(math.nan,) * 5, errors=(math.nan,) * 5)
    found = replace(assessed.found, trace=(Candidate("0", math.nan), Candidate("1", -math.inf)), scores=scores)
    data = as_json(replace(assessed, evaluation=replace(assessed.evaluation, perplexity=broken), found=found))
    assert data["evaluation"]["perplexity"]["value"] is None
    assert [candidate["score"] for candidate in data["trace"]] == [None, None]
    assert data["scores"]["values"] == [None] * 5
    assert set(data["bench"]) == {"speed", "memory"} and data["bench"]["speed"]["kind"] == "measured"
    assert as_json(assessed)["evaluation"]["perplexity"]["value"] > 1


def test_what_the_assessment_needs_is_asked_before_the_search(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    def searched(*_: Any) -> Callable[..., Any]:
        pytest.fail("the search ran first")

    monkeypatch.setattr("shoal.api.prune.journaled", searched)
    with pytest.raises(DataError, match="no tokenizer"):
        prune(loaded.model, drop=1, data=random_data(1, 8), assess=True)
    with pytest.raises(DataError, match=r"no data file missing\.txt"):
        prune(loaded, drop=1, assess=True, test_data="missing.txt", **SMALL)


def test_evaluate_alone_under_a_plan_and_against_another(loaded: Loaded, unchanged: None) -> None:
    options: dict[str, Any] = {"window": 32, "limit": 2, "new_tokens": 4}
    alone = evaluate(loaded, **options)
    assert alone.dense is None and alone.agreement is None and alone.generation is not None
    assert set(as_json(alone)) == {"perplexity", "generation"}
    planned = evaluate(loaded, plan="0-1,3-4", **options)
    assert planned.dense == alone.perplexity and planned.perplexity == alone.perplexity, "2 does nothing"
    assert planned.agreement is not None and (planned.agreement.kl, planned.agreement.top1) == (0, 1)
    shorter = Loaded(shoal.rewrite(loaded.model, prune(loaded, plan="0-3").plan), loaded.tokenizer, "shorter")
    live, between = evaluate(loaded, plan="0-3", **options), evaluate(shorter, against=loaded, **options)
    assert between.perplexity.nll == pytest.approx(live.perplexity.nll, rel=1e-6)
    assert between.dense == live.dense == alone.perplexity
    assert between.agreement is not None and live.agreement is not None
    assert between.agreement.kl == pytest.approx(live.agreement.kl, rel=1e-5)
    assert between.generation == live.generation
    assert evaluate(loaded, generation=False, **options).generation is None


def test_bench_times_one_or_two(loaded: Loaded, unchanged: None) -> None:
    options: dict[str, Any] = {"prompt": 8, "new": 2, "pairs": 2}
    assert [v.name for v in bench(loaded, **options).speed.variants] == ["dense"]
    for found in (bench(loaded, plan="0-2", **options), bench(loaded, against=loaded, **options)):
        assert [v.name for v in found.speed.variants] == ["dense", "pruned"]
        assert set(as_json(found)["memory"]) == {"dense", "pruned"}


def test_a_plan_and_another_model_are_one_too_many(loaded: Loaded) -> None:
    for verb in (evaluate, bench):
        with pytest.raises(UsageError, match="a plan or a model to compare with, not both") as raised:
            verb(loaded, plan="0-2", against=loaded)
        assert raised.value.code == "U520"


def test_models_of_different_vocabularies_are_not_compared(loaded: Loaded) -> None:
    with pytest.raises(UsageError, match=r"has 259 tokens and .* 64; use models with one vocabulary") as raised:
        evaluate(loaded, against=tiny("llama"), window=32, limit=1)
    assert raised.value.code == "U511"
