"""Mlps with fewer neurons: the transforms `fold-width` and `narrow`, and how the places of neurons are found."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    DynamicCache,
    GPT2Config,
    PreTrainedModel,
    ViTConfig,
)

import shoal.auto  # noqa: F401 - tells transformers of planned checkpoints
from shoal.errors import PlanError, UsageError, WriteError
from shoal.executing.bind import bind
from shoal.executing.weights import used_by
from shoal.fitting.clusters import k_means, means, ward
from shoal.fitting.result import Job, Transformed
from shoal.live import running
from shoal.models.neuron_places import NeuronPlaces, neuron_places
from shoal.models.opened import open_model
from shoal.models.stacks import find_stack
from shoal.plan import Plan, cost, parse_plan, shapes_of
from shoal.transforms.fold_width import fold_width
from shoal.transforms.narrow import narrow
from shoal.writing.folder import write
from shoal.writing.planned_folder import write_planned

from .families import tiny
from .healing import batch_of, gradients, learner_of
from .planted import data_of, random_data
from .references import CLOSE
from .shares import every, pairs
from .test_neurons import DENSE, IDS, logits, neurons, of_neurons, twice, without_others

EXACT = {"atol": 1e-5, "rtol": 1e-5}
WAYS = ["kmeans", "ward"]


def job(model: PreTrainedModel, plan: str = "0-3", weights: dict[str, torch.Tensor] | None = None) -> Job:
    return Job(model, random_data(4, 24), parse_plan(plan, Plan.identity(open_model(model).spec)), weights or {})


def under(model: PreTrainedModel, made: Transformed) -> torch.Tensor:
    with running(model, made.plan, made.weights):
        return logits(model)


def places(model: Any, layer: int = 0, stack: str | None = None) -> NeuronPlaces:
    found = neuron_places(open_model(model), [layer], stack)[layer]
    assert isinstance(found, NeuronPlaces), found
    return found


@pytest.mark.parametrize("family", every(3, DENSE))
def test_places_are_those_of_the_family(family: str) -> None:
    """Half of the neurons, taken by what was found, is what `test_neurons` takes by hand."""
    model = tiny(family, "eager")
    chosen = torch.randperm(neurons(model).count, generator=torch.Generator().manual_seed(2))[:24]
    held = dict(find_stack(model).layer(0).named_parameters())
    found = places(model).chosen({name: p.detach() for name, p in held.items()}, chosen)
    by_hand = of_neurons(model, chosen)
    assert {f"x.{name}" for name in found} == by_hand.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, by_hand[f"x.{name}"])


def test_neurons_that_do_not_stand_alone_are_told() -> None:
    """A norm over the neurons, a threshold taken from all of them, and one that two matrices make in another order."""

    class Normed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x) / torch.relu(x).mean(-1, keepdim=True)

    class Sparse(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x - x.mean(-1, keepdim=True))

    for kind in (Normed, Sparse):
        model = copy.deepcopy(tiny("gpt2"))
        find_stack(model).layer(1).mlp.act = kind()
        found = neuron_places(open_model(model), [0, 1])
        assert isinstance(found[0], NeuronPlaces)
        assert found[1] == "more than an activation stands between the matrices of its mlp"
        with pytest.raises(UsageError, match="more than an activation") as caught:
            fold_width(job(model), layers="1")
        assert caught.value.code == "U687"
        assert str(fold_width(job(model)).plan) == "0:fold-width-0,1,2:fold-width-2,3:fold-width-3"


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_encoders_have_neurons_too(kind: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=64, **sizes) if kind == "bert" else ViTConfig(image_size=8, patch_size=4, **sizes)
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    inputs = {"input_ids": IDS} if kind == "bert" else {"pixel_values": torch.rand(2, 3, 8, 8)}
    name = open_model(model).stacks[0].name
    chosen = torch.randperm(48, generator=torch.Generator().manual_seed(2))[:20]
    found, by_hand = places(model, 1, name), copy.deepcopy(model)
    held = {n: p.detach() for n, p in open_model(model).stack(name).layer(1).named_parameters()}
    new = {f"x.{key}": tensor for key, tensor in found.chosen(held, chosen).items()}
    gone = torch.tensor(sorted(set(range(48)) - set(chosen.tolist())))
    with torch.no_grad():
        open_model(by_hand).stack(name).layer(1).get_parameter(found.spec.reads.name)[:, gone] = 0
        want = by_hand(**inputs).last_hidden_state
        with running(model, parse_plan("0,1:x", Plan.identity(open_model(model).spec)), new):
            torch.testing.assert_close(model(**inputs).last_hidden_state, want, **CLOSE)
    plain = Job(model, random_data(2, 8), Plan.identity(open_model(model).spec), {}, name)
    assert str(fold_width(plain, layers="1").plan.steps(name)[1].weights) == "fold-width-1"


@pytest.mark.parametrize("cluster", WAYS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt", "gemma2", "olmo2"])
def test_neurons_that_were_split_in_two_are_folded_back(family: str, cluster: Any) -> None:
    """Logits are exact, and every cluster is a neuron and its twin."""
    model = copy.deepcopy(tiny(family, "eager"))
    want, count = logits(model), neurons(model).count
    wide = parse_plan("0:x,1-3", Plan.identity(open_model(model).spec))
    # a model whose layer has them by itself: the clusters must be found among twice as many neurons
    layer, new = find_stack(model).layer(0), twice(model)
    for name, tensor in new.items():
        path, _, leaf = name.removeprefix("x.").rpartition(".")
        module = layer.get_submodule(path)
        module._parameters[leaf] = torch.nn.Parameter(tensor)
        module.__dict__.update({"nf": tensor.shape[-1]} if family == "gpt2" and leaf == "weight" else {})
    assert str(wide) == "0:x,1-3" and neurons(model).count == 2 * count
    torch.testing.assert_close(logits(model), want, **CLOSE)
    made = fold_width(job(model), keep=0.5, layers="0", cluster=cluster)
    assert shapes_of(made.weights)[f"fold-width-0.{neurons(model).reads.name}"] == tiny_shape(family)
    torch.testing.assert_close(under(model, made), want, **EXACT)
    assert "0.0% from their means" in made.notes[0]


def tiny_shape(family: str) -> tuple[int, ...]:
    return neurons(tiny(family, "eager")).reads.shape


@pytest.mark.parametrize("cluster", WAYS)
def test_twins_are_paired(cluster: Any) -> None:
    rows = torch.randn(40, 12, generator=torch.Generator().manual_seed(1))
    label = (k_means if cluster == "kmeans" else ward)(torch.cat([rows, rows]), 40)
    assert torch.equal(label[:40], label[40:]) and len(label.unique()) == 40


def test_clusters_by_hand() -> None:
    rows = torch.tensor([[0.0], [0.1], [5.0], [5.2], [9.0]])
    for label in (k_means(rows, 3), ward(rows, 3)):
        assert label[0] == label[1] != label[2] == label[3] != label[4] != label[0]
    label = torch.tensor([0, 0, 1, 1, 2])
    torch.testing.assert_close(means(rows, label, 3), torch.tensor([[0.05], [5.1], [9.0]]))
    for count in (1, 3, 5, 7):
        assert torch.equal(k_means(torch.zeros(5, 2), min(count, 5)).unique(), torch.arange(min(count, 5)))


@pytest.mark.parametrize("family", every(6, DENSE))
def test_all_neurons_are_the_model(family: str) -> None:
    """To fold nothing, and to take all as they stand, change nothing; another order changes nothing but roundings."""
    model = tiny(family, "eager")
    for made in (fold_width(job(model), keep=1), narrow(job(model), keep=1, by="order")):
        assert made.plan.is_identity() and not made.weights
    want = logits(model)
    for by in ("activation", "output", "magnitude", "random"):
        made = narrow(job(model), keep=1, by=by)
        assert made.weights and not made.plan.is_identity()
        torch.testing.assert_close(under(model, made), want, **CLOSE)
        assert (
            cost(made.plan, open_model(model).spec, weights=shapes_of(made.weights)).params
            == cost("0-3", open_model(model).spec).params
        )


def layer_error(model: PreTrainedModel, made: Transformed, layer: int) -> float:
    """Mean squared difference of what the layer's mlp makes of the base model's states."""
    seen: list[torch.Tensor] = []
    reader = find_stack(model).layer(layer).get_submodule(neurons(model, layer).reads.name.rpartition(".")[0])
    handle = reader.register_forward_hook(lambda _, __, out: seen.append(out))
    ids = random_data(8, 32, seed=3).ids
    logits(model, input_ids=ids)
    with running(model, made.plan, made.weights):
        logits(model, input_ids=ids)
    handle.remove()
    return float((seen[0] - seen[1]).square().mean())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_folding_is_nearer_than_dropping_as_many_at_random(family: str) -> None:
    """A layer whose neurons are noisy twins of half as many: folded it is nearly itself, which no choice of half of
    them is."""
    model = copy.deepcopy(tiny(family))
    layer, spec = find_stack(model).layer(1), neurons(model, 1)
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for one in spec.tensors:
            tensor = layer.get_parameter(one.name)
            half = tensor.narrow(one.dim, 0, spec.count // 2)
            twin = half + 0.05 * half.std() * torch.randn(half.shape, generator=draw) if half.dim() > 1 else half
            tensor.narrow(one.dim, spec.count // 2, spec.count // 2).copy_(twin)
    folded = [fold_width(job(model), keep=0.5, layers="1", cluster=cluster) for cluster in WAYS]  # type: ignore[arg-type]
    dropped = [narrow(job(model), keep=0.5, layers="1", by="random", seed=seed) for seed in range(4)]
    worst, best = (
        max(layer_error(model, made, 1) for made in folded), min(layer_error(model, made, 1) for made in dropped)
    )  # fmt: skip
    assert worst < 0.05 * best


def test_fold_ar_by_hand() -> None:
    """Two rows of one length at a right angle: their mean is shorter by the root of two, which is taken back; the
    column is a sum all the same. One row alone, and two that are the same, stay."""
    model = copy.deepcopy(tiny("llama"))
    mlp = find_stack(model).layer(0).mlp
    with torch.no_grad():
        for matrix in (mlp.gate_proj.weight, mlp.up_proj.weight):
            matrix[1] = 0.99 * matrix[0]
            matrix[3] = matrix[2]
    made = [fold_width(job(model), keep=63 / 64, layers="0", repair=one, cluster="ward") for one in ("none", "fold-ar")]  # type: ignore[arg-type]
    plain, scaled = (one.weights["fold-width-0.mlp.gate_proj.weight"] for one in made)
    ratio = scaled.norm(dim=1) / plain.norm(dim=1)
    torch.testing.assert_close(ratio, torch.ones(63), atol=1e-2, rtol=0)
    assert torch.equal(*(one.weights["fold-width-0.mlp.down_proj.weight"] for one in made))

    from shoal.transforms.fold_width import _scale

    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [3.0, 0.0], [3.0, 0.0]])
    found = _scale(rows, torch.tensor([0, 0, 1, 2, 2]), 3).flatten()
    torch.testing.assert_close(found, torch.tensor([2 / 2**0.5, 1.0, 1.0]))


@pytest.mark.parametrize("by", ["activation", "output", "magnitude"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_the_important_neurons_are_kept(family: str, by: Any) -> None:
    """A quarter of the neurons is four times as large as the others: these are found, and beat a random choice."""
    model = copy.deepcopy(tiny(family))
    spec, layer = neurons(model, 1), find_stack(model).layer(1)
    large = torch.randperm(spec.count, generator=torch.Generator().manual_seed(8))[: spec.count // 4]
    with torch.no_grad():
        for one in spec.tensors:
            for half in range(spec.places(one, 1)):
                tensor = layer.get_parameter(one.name)
                tensor.index_copy_(
                    one.dim, large + half * spec.count, 4 * tensor.index_select(one.dim, large + half * spec.count)
                )
    made = narrow(job(model), keep=0.25, layers="1", by=by)
    if by == "magnitude" or family in ("llama", "phi3"):  # a bias may let a small neuron answer more than a large one
        torch.testing.assert_close(under(model, made), logits(without_others(model, large, 1)), **CLOSE)
    worse = [narrow(job(model), keep=0.25, layers="1", by="random", seed=seed) for seed in range(3)]
    assert layer_error(model, made, 1) < min(layer_error(model, one, 1) for one in worse)


def test_padding_does_not_count() -> None:
    model, data = tiny("llama"), random_data(4, 16)
    mask = torch.ones_like(data.ids)
    mask[:, :6] = 0
    padded = data_of(data.ids * mask, mask)
    bare = data_of(data.ids[:, 6:])
    plan = Plan.identity(open_model(model).spec)
    for by in ("activation", "output"):
        found = [narrow(Job(model, one, plan), by=by).weights for one in (padded, bare)]  # type: ignore[arg-type]
        assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_narrower_mlps_are_views_of_the_wide_one(family: str, tmp_path: Path) -> None:
    """Bound plans of several widths hold one set of tensors, and each computes what its own copy computes; a planned
    checkpoint of one width holds no more than that."""
    model = tiny(family)
    wide = narrow(job(model), keep=1)
    bound = {}
    for keep in (1.0, 0.5, 0.25):
        made = narrow(Job(model, random_data(1, 8), wide.plan, wide.weights), keep=keep, by="order")
        assert made.plan == wide.plan
        alone = narrow(job(model), keep=keep)
        for name, tensor in made.weights.items():
            assert tensor.untyped_storage().data_ptr() == wide.weights[name].untyped_storage().data_ptr()
            assert torch.equal(tensor, alone.weights[name])
        bound[keep] = bind(model, made.plan, made.weights), under(model, alone)
        written = write_planned(model, made.plan, tmp_path / f"{keep}", weights=made.weights, prove=False)
        assert written.params == cost(made.plan, open_model(model).spec, weights=shapes_of(made.weights)).params
        assert written.bytes < 1.1 * 4 * written.params + 4096
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"{keep}")
        torch.testing.assert_close(logits(loaded), bound[keep][1], **CLOSE)
    for keep in (0.5, 1.0, 0.25, 0.5):
        with bound[keep][0].running():
            torch.testing.assert_close(logits(model), bound[keep][1], **CLOSE)
    torch.testing.assert_close(logits(model), bound[1.0][1], **CLOSE)
    cache = DynamicCache(config=model.config)
    with bound[0.5][0].running():
        logits(model, input_ids=IDS[:, :4], past_key_values=cache, use_cache=True)
    with bound[1.0][0].running(), pytest.raises(PlanError) as caught:
        logits(model, input_ids=IDS[:, 4:5], past_key_values=cache, use_cache=True)
    assert caught.value.code == "P123", "keys and values of one width are not those of another"


@pytest.mark.parametrize("learn", ["all", "plan", "lora:rank=2"])
def test_a_narrower_model_is_healed(learn: str) -> None:
    """One gradient step; what comes out has the width that went in, and runs."""
    model = tiny("llama")
    made = narrow(job(model), keep=0.5, layers="1-2")
    with learner_of(model, "cross-entropy", learn=[learn], plan=str(made.plan), weights=dict(made.weights)) as learner:
        found = gradients(learner, batch_of(2), 2)
        assert any(bool(gradient.any()) for gradient in found.values())
        with torch.no_grad():
            for name, parameter in learner.moving_tensors.items():
                parameter.sub_(found[name], alpha=0.1)
        plan, tensors = learner.finished()
    tensors = used_by(plan, tensors)
    assert sum(name.endswith("mlp.down_proj.weight") and t.shape[1] == 32 for name, t in tensors.items()) == 2
    with running(model, plan, tensors):
        healed = logits(model)
    assert healed.isfinite().all() and not torch.allclose(healed, under(model, made), atol=1e-4)


PLANS = {"0-3": "0,1,2,3", "a layer twice": "0,1,1,3", "without one": "0,2,3"}


@pytest.mark.parametrize(("family", "plan"), pairs(4, ["llama", "gpt2", "phi3", "opt"], PLANS.values()))
def test_one_width_for_all_layers_is_a_stock_checkpoint(family: str, plan: str, tmp_path: Path) -> None:
    """Proved in a fresh process; which field of the config says the width is tried, also where it leaves it open."""
    model = without_n_inner() if family == "gpt2" else tiny(family)
    spec, made = open_model(model).spec, narrow(job(model), keep=0.5, by="random")
    text = ",".join(f"{layer}:narrow-{layer}" for layer in plan.split(","))
    written = write(model, text, tmp_path / "m", weights=made.weights)
    assert written.proof.passed
    sizes = spec.stack().layers[0].sizes
    less = sum(
        sizes[name.removeprefix("narrow-0.")] - tensor.numel()
        for name, tensor in made.weights.items()
        if name.startswith("narrow-0.")
    )
    assert cost(plan, spec).written_params - written.params == len(plan.split(",")) * less
    assert cost(text, spec, weights=shapes_of(made.weights)).written_params == written.params
    assert neurons(model).count // 2 in {new for _, new in written.changed.values()}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    with running(model, text, made.weights):
        torch.testing.assert_close(logits(loaded), logits(model), **CLOSE)


def without_n_inner() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=4, n_embd=32, n_head=4, vocab_size=64, n_positions=64, n_inner=None)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("layers", ["1", "0-2"])
def test_two_widths_are_no_stock_checkpoint(layers: str, tmp_path: Path) -> None:
    made = narrow(job(tiny("llama")), keep=0.5, layers=layers, by="random")
    with pytest.raises(WriteError, match="--as planned") as caught:
        write(tiny("llama"), made.plan, tmp_path / "m", weights=made.weights)
    assert caught.value.code == "W276" and not (tmp_path / "m").exists()


def test_what_a_run_has_of_its_own_goes_with_it() -> None:
    model = tiny("llama")
    own = {"x.mlp.up_proj.weight": torch.randn(64, 32), "x.input_layernorm.weight": torch.full((32,), 2.0)}
    made = narrow(job(model, "0:x,1-3", own), keep=0.5, layers="0", by="order")
    assert str(made.plan) == "0:narrow-0,1-3"
    assert torch.equal(made.weights["narrow-0.mlp.up_proj.weight"], own["x.mlp.up_proj.weight"][:32])
    assert torch.equal(made.weights["narrow-0.input_layernorm.weight"], own["x.input_layernorm.weight"])
    again = job(model, str(made.plan), dict(made.weights))
    with pytest.raises(UsageError, match="make 32 neurons already") as caught:
        narrow(again, layers="0")
    assert caught.value.code == "U687"
    assert str(narrow(again).plan) == "0:narrow-0,1:narrow-1,2:narrow-2,3:narrow-3"


@pytest.mark.parametrize(("family", "plan"), [("mixtral", "0-3"), ("mamba2", "0-3"), ("llama", "0a,1a,2a,3a")])
def test_without_neurons_nothing_can_be_narrowed(family: str, plan: str) -> None:
    for transform in (fold_width, narrow):
        with pytest.raises(UsageError, match="no layer of") as caught:
            transform(job(tiny(family, "eager"), plan))
        assert caught.value.code == "U687"


def test_a_tied_mlp_is_not_changed_beneath_others() -> None:
    with pytest.raises(UsageError, match="once with matrices of its own") as caught:
        narrow(job(tiny("llama"), "0-2,3=0"), layers="3")
    assert caught.value.code == "U686"
