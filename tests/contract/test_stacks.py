"""Models with other stacks than one causal decoder: found, run live, rewritten; what cannot be is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2Model,
    T5Config,
)

from shoal.errors import ModelError, PlanError, ShoalError, WriteError
from shoal.live import apply, running
from shoal.models.inspect import inspect
from shoal.models.kinds import auto_for, auto_of, is_causal
from shoal.models.meta import meta_model
from shoal.models.stacks import find_stack, find_stacks
from shoal.plan import Plan, check
from shoal.writing import same_layers
from shoal.writing.proof_child import decoded
from shoal.writing.surgery import blueprint, rewrite

from .kinds import PAIRED, STACKS, apart, equal, inputs_of, kind, plan_of, returned

LIMIT, SEEN = 1e-5, 1e-3
CASES = [(name, stack) for name, stacks in STACKS.items() for stack in stacks]
REWRITTEN = {("modernbert", "encoder"): "0,3,2,5", ("t5", "encoder"): "1,3,2,5x3", ("umt5", "encoder"): "1,3,2,5x3"}
"""Where the usual plan has no stock model: the first layer of ModernBERT has no norm, T5's decoder needs an encoder as
deep."""


@pytest.mark.parametrize("name", STACKS)
def test_stacks_have_names_and_the_same_spec_without_weights(name: str) -> None:
    model = kind(name)
    spec = inspect(model)
    # transformers 5.19 lists the two sides of CLIP the other way round
    assert sorted(stack.name for stack in find_stacks(model)) == sorted(STACKS[name])
    assert [stack.depth for stack in spec.stacks] == [6] * len(spec.stacks)
    assert spec.params == sum(p.numel() for p in model.parameters())
    empty = inspect(meta_model(model.config, like=model))
    assert empty.fingerprint == spec.fingerprint and empty.params == spec.params
    assert all(layer.kv.kind == "none" for s in spec.stacks if s.name != "decoder" for layer in s.layers)
    assert all(layer.kv.per_token for s in spec.stacks if s.name == "decoder" for layer in s.layers)


@pytest.mark.parametrize("name", STACKS)
def test_identity_is_bit_exact_and_a_plan_leaves_nothing_behind(name: str) -> None:
    model = kind(name)
    inputs = inputs_of(model)
    before, state = returned(model, inputs), {n: t.clone() for n, t in model.state_dict().items()}
    with running(model, Plan.identity(inspect(model))):
        assert equal(returned(model, inputs), before)
    with running(model, plan_of(model, "; ".join(f"{stack}: 1,3,2,5" for stack in STACKS[name]))):
        assert apart(returned(model, inputs), before) > SEEN
    assert equal(returned(model, inputs), before)
    assert equal(dict(model.state_dict()), state)


@pytest.mark.parametrize(("name", "stack"), CASES)
def test_a_stack_is_rewritten_as_it_runs(name: str, stack: str) -> None:
    model = kind(name)
    inputs = inputs_of(model)
    plan = plan_of(model, f"{stack}: {REWRITTEN.get((name, stack), '1,3,2,5x2')}")
    with running(model, plan):
        live = returned(model, inputs)
    made = rewrite(model, plan)
    assert apart(returned(made, inputs), live) < LIMIT
    wanted = {s: len(plan.layers(s)) for s in STACKS[name]}
    assert {s.name: s.depth for s in find_stacks(made)} == wanted
    assert inspect(made).params == sum(p.numel() for p in made.parameters())


@pytest.mark.parametrize("name", PAIRED)
def test_a_decoder_with_a_cache_computes_what_it_does_without(name: str) -> None:
    model = copy.deepcopy(kind(name)).double()  # single tokens take other kernels, whose rounding shows in float32
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs_of(model).items()}
    for text in ("encoder: 0,3-5; decoder: 0,5", "encoder: 5-0; decoder: 4,1,4"):
        with torch.no_grad(), running(model, plan_of(model, text)):
            steps, _ = decoded(model, inputs)
            assert (steps - next(iter(returned(model, inputs).values()))).abs().max() < LIMIT


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_generate_writes_the_same_tokens_live_and_rewritten(name: str) -> None:
    """Encoder 6 to 4, decoder 6 to 2."""
    model = kind(name)
    plan = plan_of(model, "encoder: 0,2-3,5; decoder: 1,5")
    given = {key: value for key, value in inputs_of(model).items() if key != "decoder_input_ids"}
    options: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12}
    for beams in (1, 3):
        with running(model, plan):
            live = model.generate(**given, **options, num_beams=beams)
            slow = model.generate(**given, **options, num_beams=beams, use_cache=False)
        assert torch.equal(live, slow)
        assert torch.equal(rewrite(model, plan).generate(**given, **options, num_beams=beams), live)
    assert not torch.equal(model.generate(**given, **options), live)


@pytest.mark.parametrize("steps", ["1-5", "3,0-2", "5,5,0,1"])
def test_the_position_bias_of_t5_goes_to_the_layer_that_comes_first(steps: str) -> None:
    model = kind("t5")
    plan = plan_of(model, f"encoder: {steps},2-4; decoder: {steps}")
    made = rewrite(model, plan)
    for stack in ("encoder", "decoder"):
        name = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        assert torch.equal(made.state_dict()[name], model.state_dict()[name])
        assert sum(key.endswith("relative_attention_bias.weight") for key in made.state_dict()) == 2
    inputs = inputs_of(model)
    with running(model, plan):
        live = returned(model, inputs)
    assert apart(returned(made, inputs), live) < LIMIT
    with torch.no_grad():  # the bias matters: without it the same layers compute something else
        for module in made.modules():
            if hasattr(module, "relative_attention_bias"):
                bias = module.relative_attention_bias
                bias.weight = torch.nn.Parameter(torch.zeros_like(bias.weight))  # not in place: the base has it too
    assert apart(returned(made, inputs), live) > SEEN
    assert [m.has_relative_attention_bias for m in model.modules() if hasattr(m, "has_relative_attention_bias")].count(
        True
    ) == 2


def test_a_rule_that_is_lost_shows_before_a_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same_layers, "first_only", lambda stack: None)
    with refusal("W207", WriteError, "layer 1 in place 0", "relative_attention_bias"):
        blueprint(kind("t5"), plan_of(kind("t5"), "encoder: 1-5; decoder: 1-5"))


def refusal(code: str, kind_of: type[ShoalError], *words: str) -> Any:
    return pytest.raises(kind_of, match=rf"{code}.*" + ".*".join(words))


def test_a_decoder_may_not_outgrow_the_cache_that_generate_makes() -> None:
    with refusal("W241", WriteError, "decoder would have 6 layers and the encoder 5"):
        blueprint(kind("t5"), plan_of(kind("t5"), "encoder: 0-4; decoder: 0-5"))
    blueprint(kind("bart"), plan_of(kind("bart"), "encoder: 0-4; decoder: 0-5"))


def test_kv_is_not_shared_beside_an_encoder() -> None:
    with refusal("P109", PlanError, "layer 3 also attends to the encoder"):
        apply(kind("bart"), "decoder: 0-2,3@2,4-5")
    assert find_stack(kind("bart")).layers.__class__ is torch.nn.ModuleList


def test_albert_and_backbones_are_refused() -> None:
    with refusal("M303", ModelError, "one shared group"):
        find_stacks(kind("albert"))
    small = {"hidden_size": 32, "num_attention_heads": 4, "image_size": 28, "num_hidden_layers": 4}
    with refusal("M324", ModelError, "numbers its outputs by depth"):
        find_stacks(Dinov2Backbone(Dinov2Config(**small)))
    with refusal("M304", ModelError, "no stack 'decoder'"):
        find_stack(kind("bert"), "decoder")


def test_numbered_outputs_are_renamed_or_refused() -> None:
    config = Dinov2Config(
        hidden_size=32, num_attention_heads=4, image_size=28, num_hidden_layers=4, out_indices=[0, 2, 4]
    )
    model = Dinov2Model(config).eval()
    made = blueprint(model, plan_of(model, "1,3")).config
    assert (made.out_indices, made.out_features) == ([0, 1, 2], ["stem", "stage1", "stage2"])
    assert config.out_indices == [0, 2, 4]
    with refusal("W242", WriteError, "output of layer 1, which runs 0 times"):
        blueprint(model, plan_of(model, "0,3"))


def test_a_convolution_behind_the_first_layer_pins_it() -> None:
    config = AutoConfig.for_model(
        "deberta-v2", vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        conv_kernel_size=3,
    )  # fmt: skip
    model = AutoModel.from_config(config).eval()
    assert [p.code for p in check(plan_of(model, "1-2"), inspect(model))] == ["P110"]
    config.conv_kernel_size = 0
    assert check(plan_of(free := AutoModel.from_config(config).eval(), "1-2"), inspect(free)) == []


@pytest.mark.parametrize(
    ("config", "names", "auto"),
    [
        (BertConfig(), ["BertModel"], "AutoModel"),
        (BertConfig(), ["BertForMaskedLM"], "AutoModelForMaskedLM"),
        (BertConfig(), ["BertLMHeadModel"], "AutoModelForCausalLM"),
        (BertConfig(), None, "AutoModelForCausalLM"),
        (T5Config(), ["T5EncoderModel"], "AutoModelForTextEncoding"),
        (T5Config(), ["T5ForConditionalGeneration"], "AutoModelForSeq2SeqLM"),
        (T5Config(), None, "AutoModelForSeq2SeqLM"),
        (Dinov2Config(), ["Dinov2ForImageClassification"], "AutoModelForImageClassification"),
        (Dinov2Config(), ["Of somebody else"], "AutoModel"),
    ],
)
def test_the_auto_class_is_the_one_that_the_config_names(config: Any, names: list[str] | None, auto: str) -> None:
    config.architectures = names
    assert auto_for(config) == auto


def test_an_encoder_that_is_made_a_decoder_is_one() -> None:
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(**small, intermediate_size=64, is_decoder=True)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert is_causal(model) and auto_of(model) == "AutoModelForCausalLM"
    assert [stack.name for stack in find_stacks(model)] == ["decoder"]
    assert not is_causal(kind("bert")) and not is_causal(kind("bart"))


def test_a_plan_for_other_stacks_is_refused() -> None:
    """A plan for another stack layout is refused as one for another model."""
    plan = plan_of(kind("bart"), "decoder: 0,5")
    with refusal("P101", PlanError, "made for another model"):
        apply(kind("t5"), plan)
