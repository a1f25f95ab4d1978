"""Runs with the matrices of a layer of another stack: which go together, what they compute, cost and become on disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from shoal.errors import ModelError, PlanError, ShoalError
from shoal.fitting.result import Job
from shoal.live import apply, running
from shoal.models.load import Loaded, load
from shoal.models.opened import open_model
from shoal.plan import Plan, Run, check, cost, diff, parse_plan, shapes_of
from shoal.plan.sources import StackLayer
from shoal.planned import PlannedCheckpoint
from shoal.report.facts import PlannedStack, sentences
from shoal.report.plan_diagram import plan_diagram
from shoal.transforms.relax import relax
from shoal.transforms.tie import tie
from shoal.writing.folder import write
from shoal.writing.planned_folder import write_planned
from shoal.writing.surgery import rewrite

from .families import tiny
from .kinds import PAIRED, equal, inputs_of, kind, plan_of, returned
from .planted import random_data
from .references import CLOSE
from .shares import every

ALL = "decoder: 0-5=encoder.0-5"
SAME = ("t5", "bart", "marian")


def layer(model: Any, stack: str, index: int) -> Any:
    return open_model(model).stack(stack).layer(index)


def matrices(module: Any) -> dict[str, torch.nn.Parameter]:
    """Those of linear modules: everything of two dimensions but the table of T5's bias by position."""
    linear = [(n, m.weight) for n, m in module.named_modules() if isinstance(m, torch.nn.Linear)]
    return {f"{name}.weight": weight for name, weight in linear}


def by_hand(name: str) -> dict[str, str]:
    """By name in a decoder's layer, the name in an encoder's: written down, not found."""
    if "t5" in name:
        mlp = ("wi", "wo") if name == "t5" else ("wi_0", "wi_1", "wo")
        same = {f"layer.0.SelfAttention.{one}.weight": f"layer.0.SelfAttention.{one}.weight" for one in "qkvo"}
        return same | {f"layer.2.DenseReluDense.{one}.weight": f"layer.1.DenseReluDense.{one}.weight" for one in mlp}
    own = [f"self_attn.{one}_proj.weight" for one in ("q", "k", "v", "out")] + ["fc1.weight", "fc2.weight"]
    return {one: one for one in own}


def tied_by_hand(name: str, pairs: dict[int, int]) -> Any:
    model = copy.deepcopy(kind(name))
    with torch.no_grad():
        for here, there in pairs.items():
            own, other = layer(model, "decoder", here), layer(model, "encoder", there)
            for mine, theirs in by_hand(name).items():
                own.get_parameter(mine).copy_(other.get_parameter(theirs))
    return model


def same(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(found[name], tensor, **CLOSE)


@pytest.mark.parametrize("name", PAIRED)
def test_a_decoder_with_the_matrices_of_its_encoder(name: str) -> None:
    """Live, as a stock copy, and counted; its attention to the encoder, norms, biases and tables stay its own."""
    model, spec = kind(name), open_model(kind(name)).spec
    inputs = inputs_of(model)
    before = returned(model, inputs)
    want = returned(tied_by_hand(name, {n: n for n in range(6)}), inputs)
    plan = plan_of(model, ALL)
    assert str(plan).endswith(ALL)
    with running(model, plan):
        same(returned(model, inputs), want)
    same(returned(rewrite(model, plan), inputs), want)
    assert equal(returned(model, inputs), before)
    assert not equal(want, before)
    shared = sum(matrices(layer(model, "encoder", n))[one].numel() for n in range(6) for one in by_hand(name).values())
    found = cost(plan, spec)
    assert (found.params, found.written_params) == (spec.params - shared, spec.params)
    assert (found.kv_per_token, found.decode_flops) == (
        cost(Plan.identity(spec), spec).kv_per_token,
        cost(Plan.identity(spec), spec).decode_flops,
    )


@pytest.mark.parametrize("name", every(1, SAME))
def test_an_encoder_of_equal_matrices_is_the_null_setting(name: str) -> None:
    """Where the decoder has the same numbers already, the tie changes no bit."""
    model = tied_by_hand(name, {n: n for n in range(6)})
    inputs = inputs_of(model)
    before = returned(model, inputs)
    with running(model, plan_of(model, ALL)):
        assert equal(returned(model, inputs), before)


@pytest.mark.parametrize("name", every(1, SAME))
def test_generated_tokens_and_a_cache_are_those_of_copies(name: str) -> None:
    model, other = kind(name), tied_by_hand(name, {0: 3, 1: 3, 2: 3, 3: 3, 4: 3, 5: 3})
    ids = inputs_of(model)["input_ids"]
    how: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "decoder_start_token_id": 1}
    with running(model, plan_of(model, "decoder: 0-5=encoder.3")):
        cached, again = model.generate(ids, **how), model.generate(ids, use_cache=False, **how)
    assert torch.equal(cached, again)
    assert torch.equal(cached, other.generate(ids, **how))


@pytest.mark.parametrize("name", SAME)
def test_gradients_meet_in_the_encoder(name: str) -> None:
    model = copy.deepcopy(kind(name)).train(False)
    inputs = {**inputs_of(model)}
    apart = tied_by_hand(name, {2: 1})

    def loss(one: Any) -> None:
        one(**inputs).logits.square().mean().backward()

    loss(apart)
    with running(model, plan_of(model, "decoder: 0-1,2=encoder.1,3-5")):
        loss(model)
    for mine, theirs in by_hand(name).items():
        first, second = layer(apart, "encoder", 1).get_parameter(theirs), layer(apart, "decoder", 2).get_parameter(mine)
        found = layer(model, "encoder", 1).get_parameter(theirs).grad
        torch.testing.assert_close(found, first.grad + second.grad, atol=1e-6, rtol=1e-4)
        assert layer(model, "decoder", 2).get_parameter(mine).grad is None
    own = [n for n, p in layer(model, "decoder", 2).named_parameters() if n not in by_hand(name) and p.grad is None]
    assert own == []


@pytest.mark.parametrize("name", SAME)
def test_own_tensors_and_factors_beside_it(name: str) -> None:
    """`2=encoder.1:x`: what x has stands over the encoder's, live, written and in the cost."""
    model, spec = kind(name), open_model(kind(name)).spec
    inputs = inputs_of(model)
    first, *_, last = by_hand(name)
    own, inner = layer(model, "decoder", 2), torch.Generator().manual_seed(4)
    up = torch.randn(own.get_parameter(last).shape[0], 2, generator=inner) * 0.2
    down = torch.randn(2, own.get_parameter(last).shape[1], generator=inner) * 0.2
    path = last.removesuffix(".weight")
    new = {f"x.{first}": torch.randn(own.get_parameter(first).shape, generator=inner) * 0.1}
    new |= {f"x.{path}.up": up, f"x.{path}.down": down}
    by = tied_by_hand(name, {2: 1})
    with torch.no_grad():
        layer(by, "decoder", 2).get_parameter(first).copy_(new[f"x.{first}"])
        layer(by, "decoder", 2).get_parameter(last).add_(up @ down)
    want = returned(by, inputs)
    plan = plan_of(model, "decoder: 0-1,2=encoder.1:x,3-5")
    with running(model, plan, new):
        same(returned(model, inputs), want)
    same(returned(rewrite(model, plan, weights=new), inputs), want)
    saved = sum(own.get_parameter(mine).numel() for mine in by_hand(name))
    more = sum(tensor.numel() for tensor in new.values())
    assert cost(plan, spec, weights=shapes_of(new)).params == spec.params - saved + more


@pytest.mark.parametrize("name", SAME)
def test_the_encoder_may_have_the_decoders(name: str) -> None:
    """And a layer whose matrices are read needs not run: of a decoder layer that is gone what the encoder reads stays,
    and its attention to the encoder is counted no more."""
    model, spec = kind(name), open_model(kind(name)).spec
    plan = plan_of(model, "encoder: 0-1,2=decoder.4,3-5; decoder: 0-3,5")
    inputs = inputs_of(model)
    by = copy.deepcopy(model)
    with torch.no_grad():
        for mine, theirs in by_hand(name).items():
            layer(by, "encoder", 2).get_parameter(theirs).copy_(layer(by, "decoder", 4).get_parameter(mine))
    with running(by, "decoder: 0-3,5"):
        want = returned(by, inputs)
    with running(model, plan):
        same(returned(model, inputs), want)
    alone = cost(plan_of(model, "decoder: 0-3,5"), spec).params
    assert cost(plan, spec).params == alone  # as many of the decoder's are read as the encoder's are not


def test_it_sees_what_is_put_into_the_encoder() -> None:
    model = copy.deepcopy(kind("bart"))
    handle = apply(model, "decoder: 0-5=encoder.0-5")
    try:
        fc1 = layer(model, "encoder", 2).fc1
        fc1.weight = torch.nn.Parameter(fc1.weight.detach() * 0.5)
        found = returned(model, inputs_of(model))
    finally:
        handle.restore()
    with torch.no_grad():
        for n in range(6):
            for one in by_hand("bart"):
                layer(model, "decoder", n).get_parameter(one).copy_(layer(model, "encoder", n).get_parameter(one))
    same(returned(model, inputs_of(model)), found)


def test_it_is_drawn_compared_and_named() -> None:
    model = kind("t5")
    plan, base = plan_of(model, ALL), Plan.identity(open_model(model).spec)
    assert [change.after for change in diff(base, plan)] == [f"{n}=encoder.{n}" for n in range(6)]
    drawn = PlannedStack("decoder", 6, plan.steps("decoder"))
    assert any("0 has those of encoder.0" in one for one in sentences(drawn))
    assert "=e5" in plan_diagram(drawn)
    assert "of another stack" in plan_diagram(drawn)


REFUSED = (
    ("0-5=vision.0-5", "P102", "vision.0 is of no stack"),
    ("0=encoder.6,1-5", "P103", "encoder layers are 0 to 5"),
    ("0=decoder.1,1-5", "P127", "write 0=1"),
)


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_is_no_layer_is_refused(case: tuple[str, str, str]) -> None:
    text, code, why = case
    with pytest.raises(PlanError, match=why) as caught:
        apply(kind("bart"), f"decoder: {text}")
    assert caught.value.code == code


def test_layers_of_other_shapes_and_ties_of_ties_are_refused() -> None:
    model, spec = kind("bart"), open_model(kind("bart")).spec
    found = check(plan_of(model, "encoder: 0-1,2=1,3-5; decoder: 0-1,2=encoder.2,3-5"), spec)
    assert [(one.code, one.layer) for one in found] == [("P127", 2)]
    assert "which is tied itself" in found[0].message
    wide = copy.deepcopy(model.config)
    wide.encoder_ffn_dim *= 2
    other = type(model)(wide)
    with pytest.raises(PlanError, match=r"fc1.weight is \[64, 32\] in layer 0 and \[128, 32\] in encoder.0") as caught:
        apply(other, "decoder: 0=encoder.0,1-5")
    assert caught.value.code == "P127"
    for text in ("0=encoder.0,1-3", "0=w.1,1-3"):
        with pytest.raises(PlanError, match="no stack") as alone:
            apply(copy.deepcopy(tiny("llama")), text)
        assert alone.value.code == "P102"


@pytest.mark.parametrize("name", SAME)
def test_the_transform(name: str) -> None:
    model = kind(name)
    given = Job(model, random_data(4, 9), Plan.identity(open_model(model).spec), stack="decoder")
    assert tie(given, pattern="encoder").plan == plan_of(model, ALL)
    for wrong in ({"unique": 2}, {"start": "average"}, {"part": "mlp"}):
        with pytest.raises(ShoalError, match="whole and as they are") as caught:
            tie(given, pattern="encoder", **wrong)
        assert caught.value.code == "U559"
    short = Job(model, given.data, parse_plan("encoder: 0-5", given.plan), stack="encoder")
    with pytest.raises(ShoalError, match="0 encoder layers beside"):
        tie(short, pattern="encoder")


@pytest.mark.parametrize("name", SAME)
def test_a_planned_checkpoint_holds_each_matrix_once(name: str, tmp_path: Path) -> None:
    """Proved in a process that imports shoal.auto; reloaded, it is the live plan bit for bit, of as many parameters as
    the cost says, and its decoder's runs share storage with its encoder."""
    model = copy.deepcopy(kind(name))
    plan, inputs = plan_of(model, "encoder: 0-2; decoder: 0-1=encoder.0-1,2=encoder.1:x,3=encoder.5"), inputs_of(model)
    first = next(iter(by_hand(name)))
    new = {f"x.{first}": torch.randn(layer(model, "decoder", 2).get_parameter(first).shape) * 0.1}
    written = write_planned(Loaded(model, None, "tiny"), plan, tmp_path / "one", weights=new)
    assert written.proof.passed
    assert {"outputs", "weights", "parameters", "KV held"} <= {check.name for check in written.proof.checks}
    with running(model, plan, new):
        want = returned(model, inputs)
    made = load(tmp_path / "one").model
    assert equal(returned(made, inputs), want)
    assert type(made).__name__ == type(model).__name__
    assert isinstance(made, PlannedCheckpoint)
    spec = open_model(model).spec
    held = sum({(p.data_ptr(), p.numel()): p.numel() for p in made.parameters()}.values())
    assert held == written.params == cost(plan, spec, weights=shapes_of(new)).params
    assert layer(made, "decoder", 0).get_parameter(first).numel() == 0
    made.save_pretrained(tmp_path / "two")
    assert equal(returned(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "two"), inputs), want)
    with pytest.raises(ModelError, match="is loaded by AutoModelForSeq2SeqLM") as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert caught.value.code == "M383"


@pytest.mark.parametrize("metric", ["plain", "inputs"])
@pytest.mark.parametrize("name", every(1, SAME))
def test_relaxed_at_full_rank_it_is_its_own_again(name: str, metric: Any) -> None:
    """The attention to the encoder shares nothing and gets no change."""
    model = kind(name)
    plan = plan_of(model, "decoder: 0-1,2=encoder.1,3-5")
    made = relax(Job(model, random_data(4, 9), plan, stack="decoder"), rank=64, metric=metric)
    assert str(made.plan).endswith("decoder: 0-1,2=encoder.1:relax-2,3-5")
    assert {key.removeprefix("relax-2.").rpartition(".")[0] + ".weight" for key in made.weights} == set(by_hand(name))
    inputs = inputs_of(model)
    before = returned(model, inputs)
    with running(model, made.plan, made.weights):
        for key, tensor in returned(model, inputs).items():
            torch.testing.assert_close(tensor, before[key], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("make", [lambda: Run(0, tie="w.1"), lambda: Run(0, tie="w.1-3"), lambda: StackLayer("9x", 0)])
def test_an_id_does_not_read_as_a_layer_of_another_stack(make: Any) -> None:
    with pytest.raises(PlanError) as caught:
        make()
    assert caught.value.code == "P117"


@pytest.mark.parametrize("name", every(1, SAME))
def test_a_written_model_has_copies_and_is_proved(name: str, tmp_path: Path) -> None:
    """With the decoder shorter, and the encoder too: the matrices are those of the base's layers."""
    model = copy.deepcopy(kind(name))
    plan = plan_of(model, "encoder: 0-3; decoder: 0=encoder.4,2=encoder.1")
    assert write(Loaded(model, None, "tiny"), plan, tmp_path / "one").proof.passed
