"""The transform `tie`: which layers share which matrices by each pattern, and with what a shared set begins."""

from __future__ import annotations

import copy
from math import prod
from typing import Any

import pytest
import torch

from shoal.errors import UsageError
from shoal.fitting.result import Job
from shoal.live import running
from shoal.models.inspect import inspect
from shoal.models.stacks import find_stack
from shoal.plan import Plan, cost, parse_plan, shapes_of
from shoal.transforms.relax import relax
from shoal.transforms.tie import _sets, tie

from .families import tiny_of
from .planted import random_data

PATTERNS = {
    ("sequence", 3): [0, 0, 1, 1, 2, 2],
    ("cycle", 3): [0, 1, 2, 0, 1, 2],
    ("cycle-rev", 3): [0, 1, 2, 2, 1, 0],
    ("cycle-rev", 2): [0, 1, 0, 1, 1, 0],
    ("sequence", 4): [0, 0, 1, 2, 2, 3],
    ("sandwich", None): [0, 1, 1, 1, 1, 2],
    ("all", None): [0, 0, 0, 0, 0, 0],
}


def job(model: Any, plan: str = "0-5", **weights: torch.Tensor) -> Job:
    return Job(model, random_data(2, 8), parse_plan(plan, Plan.identity(inspect(model))), weights)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(random_data(2, 9).ids).logits


@pytest.mark.parametrize(("asked", "want"), PATTERNS.items(), ids=str)
def test_the_patterns_of_the_papers(asked: tuple[str, int | None], want: list[int]) -> None:
    assert _sets(asked[0], 6, asked[1]) == want  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", ["sequence", "cycle", "cycle-rev"])
def test_as_many_sets_as_layers_change_nothing(pattern: Any) -> None:
    model = tiny_of("llama", 6)
    made = tie(job(model), pattern=pattern, unique=6)
    assert made.plan.is_identity() and not made.weights


def test_ties_name_the_layer_of_the_set() -> None:
    model = tiny_of("llama", 6)
    plans = {
        "0-2,3-5=0-2": {"unique": 3},
        "0-2=3-5,3-5": {"unique": 3, "start": "last"},
        "0-2,3-5=2-0": {"pattern": "cycle-rev"},
        "0,1-5=0": {"pattern": "all"},
        "0-1,2-4=1,5": {"pattern": "sandwich"},
        "0-2,3a,3m=0,4a,4m=1,5a,5m=2": {"part": "mlp"},
        "0-2,3a=0,3m,4a=1,4m,5a=2,5m": {"part": "attention"},
    }
    for text, options in plans.items():
        assert str(tie(job(model), **options).plan) == text  # type: ignore[arg-type]


@pytest.mark.parametrize("start", ["average", "stepwise"])
@pytest.mark.parametrize("part", ["layer", "mlp"])
def test_a_set_begins_as_it_is_told(start: Any, part: Any) -> None:
    """By hand: the mean of the tied layers, or layers at even intervals with the first and the last of the base."""
    model = tiny_of("llama", 6)
    spec = inspect(model)
    made = tie(job(model), unique=3, start=start, part=part)
    assert str(made.plan) == "0=tie-0,1=tie-1,2=tie-2,3=tie-0,4=tie-1,5=tie-2"
    by_hand = copy.deepcopy(model)
    layers = [dict(find_stack(model).layer(n).named_parameters()) for n in range(6)]
    with torch.no_grad():
        for n in range(6):
            for name, parameter in find_stack(by_hand).layer(n).named_parameters():
                if parameter.dim() > 1 and (part == "layer" or name.startswith("mlp.")):
                    own = n % 3
                    mean = (layers[own][name] + layers[own + 3][name]) / 2
                    parameter.copy_(mean if start == "average" else layers[(0, 2, 5)[own]][name])
    want = logits(by_hand)
    with running(model, made.plan, made.weights):
        torch.testing.assert_close(logits(model), want, atol=3e-5, rtol=3e-5)
    numbers = sum(p.numel() for n, p in layers[0].items() if p.dim() > 1 and (part == "layer" or n.startswith("mlp.")))
    assert cost(made.plan, spec, weights=shapes_of(made.weights)).params == spec.params - 3 * numbers


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_joined_mlps_make_the_mean_of_all(family: str) -> None:
    """One wide feed-forward of all neurons: at each place the mean of what the mlps would make of its input; of equal
    mlps it is the model. As many parameters in matrices as before."""
    model = copy.deepcopy(tiny_of(family, 4))
    spec = inspect(model)
    made = tie(job(model, "0-3"), pattern="sequence", unique=2, start="joined", part="mlp")
    assert str(made.plan) == "0-1=tie-0,2-3=tie-1"
    neurons = spec.stack().layers[0].neurons
    assert neurons is not None
    reader = neurons.reads.name.rpartition(".")[0]
    by_hand = copy.deepcopy(model)
    for n, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
        # the reader of each layer gives the mean of what both mlps make of what the layer's own mlp is given
        mean_with(find_stack(by_hand).layer(n), find_stack(model).layer(other), reader)
    want = logits(by_hand)
    with running(model, made.plan, made.weights):
        torch.testing.assert_close(logits(model), want, atol=3e-5, rtol=3e-5)
    priced = cost(made.plan, spec, weights=shapes_of(made.weights))
    size = sum(prod(one.shape) for one in neurons.tensors)
    assert priced.params == spec.params and priced.decode_flops > cost("0-3", spec).decode_flops
    assert sum(t.numel() for t in made.weights.values()) == 4 * size


def mean_with(layer: torch.nn.Module, other: torch.nn.Module, reader: str) -> None:
    """Let the mlp of `layer` make the mean of what its own makes and what that of `other` makes of the same input; the
    bias behind it is its own."""
    seen: list[torch.Tensor] = []
    inside = f"{reader.rpartition('.')[0]}." if "." in reader else "fc1"
    maker = next(m for n, m in layer.named_modules() if n.startswith(inside) and n != reader and hasattr(m, "weight"))
    maker.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    def answer(module: torch.nn.Module, _: Any, out: torch.Tensor) -> torch.Tensor:
        theirs: list[torch.Tensor] = []
        handle = other.get_submodule(reader).register_forward_hook(lambda _, __, made: theirs.append(made))
        if reader == "fc2":  # OPT keeps its mlp in the layer
            other.fc2(other.activation_fn(other.fc1(seen[-1])))
        else:
            other.get_submodule(reader.rpartition(".")[0])(seen[-1])
        handle.remove()
        bias = getattr(module, "bias", None)
        foreign = 0 if bias is None else other.get_submodule(reader).bias - bias
        return (out + theirs[0] - foreign) / 2

    layer.get_submodule(reader).register_forward_hook(answer)


def test_mlps_of_experts_are_not_joined() -> None:
    with pytest.raises(UsageError, match="cannot be joined") as caught:
        tie(job(tiny_of("mixtral", 4), "0-3"), start="joined", part="mlp")
    assert caught.value.code == "U559"


def test_what_runs_otherwise_is_refused() -> None:
    model = tiny_of("llama", 6)
    for plan, options in (
        ("0,1x2,2-5", {}),
        ("0a,1-5", {}),
        ("0-5", {"unique": 7}),
        ("0-5", {"pattern": "all", "unique": 2}),
    ):
        with pytest.raises(UsageError) as caught:
            tie(job(model, plan), **options)  # type: ignore[arg-type]
        assert caught.value.code == "U559"
    assert str(tie(job(model, "0,2-5"), unique=3).plan) == "0,2-3,4=0,5=2"


@pytest.mark.parametrize("metric", ["inputs", "plain"])
@pytest.mark.parametrize("part", ["layer", "mlp"])
def test_relaxed_at_full_rank_a_layer_is_its_own_again(part: Any, metric: Any) -> None:
    """And the error falls with the rank; factors are held for the tied runs alone."""
    model = tiny_of("llama", 6)
    want = logits(model)
    tied = tie(job(model), unique=3, part=part)
    errors = []
    for rank in (1, 8, 32):
        again = Job(model, random_data(2, 32), tied.plan, tied.weights)
        made = relax(again, rank=rank, metric=metric)
        with running(model, made.plan, made.weights):
            errors.append(float((logits(model) - want).abs().max()))
        assert {name.split(".")[0].split("-")[1] for name in made.weights} == {"3", "4", "5"}
        assert all(("mlp" in name) or part == "layer" for name in made.weights)
    assert errors[2] < 1e-3 < errors[1] < errors[0]
    for rank in (0, 4):
        made = relax(Job(model, random_data(2, 32), tied.plan, tied.weights), rank=rank, metric=metric, bias=True)
        assert {name.rpartition(".")[2] for name in made.weights} == (
            {"shift"} if not rank else {"up", "down", "shift"}
        )
    with pytest.raises(UsageError) as caught:
        relax(job(model), rank=4)
    assert caught.value.code == "U559"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_bias_makes_good_what_a_tie_takes_from_the_mean(family: str) -> None:
    """For what the whole model gives it each module of a tied run makes the mean that its own matrix makes."""
    model, data = tiny_of(family, 4), random_data(2, 32)
    tied = tie(Job(model, data, Plan.identity(inspect(model))), unique=2)
    made = relax(Job(model, data, tied.plan, tied.weights), rank=2, bias=True)
    layer, other = find_stack(model).layer(3), find_stack(model).layer(1)
    seen: dict[str, torch.Tensor] = {}
    linear = {n: m for n, m in layer.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].flatten(0, -2)))
        for name, module in linear.items()
    ]
    with torch.no_grad():
        model(input_ids=data.ids)
    for handle in handles:
        handle.remove()
    assert linear and seen.keys() == linear.keys()
    for name, module in linear.items():
        turned = type(module).__name__ == "Conv1D"
        own, shared = (m.weight.T if turned else m.weight for m in (module, other.get_submodule(name)))
        x = seen[name].mean(0)
        up, down, shift = (made.weights[f"relax-3.{name}.{word}"] for word in ("up", "down", "shift"))
        torch.testing.assert_close(shared @ x + up @ (down @ x) + shift, own @ x, atol=1e-4, rtol=1e-4)
