"""Stand-ins for removed layers: planted answers, never worse than dropping, padding, outliers, refusals."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from shoal.errors import ShoalError
from shoal.examples import TransformExamples
from shoal.fitting.result import Transformed
from shoal.live import running
from shoal.models.inspect import inspect
from shoal.models.stacks import find_stack
from shoal.plan import Map, Plan, Run, check, drop, parse_plan
from shoal.recording.observe import observe

from .families import tiny
from .planted import PLANTED, data_of, planted, random_data
from .shares import pairs
from .transform_jobs import EXAMPLES, HOLE, SHORT, STAND_INS, do, job, logits, relative


@contextmanager
def layer_becomes(model: PreTrainedModel, change: Any, index: int = HOLE) -> Iterator[None]:
    """While this holds the layer answers change(its input) instead."""
    inspect(model)  # looks once at a model that it has not seen, and should see it as it is

    def answer(_: Any, args: Any, kwargs: Any, out: Any) -> Any:
        new = change(args[0] if args else kwargs["hidden_states"])
        return (new, *out[1:]) if isinstance(out, tuple) else new

    hook = find_stack(model).layer(index).register_forward_hook(answer, with_kwargs=True)
    yield
    hook.remove()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "mixtral"])
def test_a_layer_that_is_a_linear_map_is_recovered(family: str) -> None:
    model, draw = tiny(family), torch.Generator().manual_seed(5)
    change = torch.randn(32, 3, generator=draw) @ torch.randn(3, 32, generator=draw) / 10
    bias = torch.randn(32, generator=draw) / 10
    with layer_becomes(model, lambda x: x + x @ change.T + bias):
        wanted = logits(model)
        for name, own in (("linear-map", {}), ("low-rank-map", {"rank": 3})):
            made = do(name, job(model, [HOLE]), **own)
            found = made.weights
            assert relative(logits(model, made), wanted) < 1e-3
            assert relative(found["map-2-2.bias"], bias) < 1e-3
            assert made.fits[0].stand_in < 1e-6 * made.fits[0].drop
        assert relative(found["map-2-2.up"] @ found["map-2-2.down"], change) < 1e-3
    assert made.plan.steps()[HOLE] == Map(HOLE, HOLE, "map-2-2")


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("name", ["refit", "replaceme", "channel-scale"])
def test_what_the_mlp_before_could_have_written_is_recovered(name: str, family: str) -> None:
    """The removed layer adds a linear function of what the mlp before it wrote (or of what went into its matrix)."""
    model, draw = tiny(family), torch.Generator().manual_seed(5)
    matrix = "mlp.c_proj" if family == "gpt2" else "mlp.down_proj"
    module = find_stack(model).layer(HOLE - 1).get_submodule(matrix)
    inner = torch.randn(32, 64, generator=draw) / 10
    square, scale = torch.randn(32, 32, generator=draw) / 5, torch.rand(32, generator=draw)
    added = {
        "refit": lambda a, m: a @ inner.T,
        "replaceme": lambda a, m: m @ square.T,
        "channel-scale": lambda a, m: m * scale,
    }
    seen: dict[str, torch.Tensor] = {}
    hook = module.register_forward_hook(lambda _, args, out: seen.update(given=args[0], out=out))
    with layer_becomes(
        model, lambda x: x + added[name](seen["given"].view(*x.shape[:2], -1), seen["out"].view(x.shape))
    ):
        wanted = logits(model)
        # one batch: the hook knows the mlp's output of the last one only
        made = do(name, job(model, [HOLE], batch=16), ridge=1e-9)
    hook.remove()
    assert relative(logits(model, made), wanted) < 1e-3
    assert made.plan.steps()[HOLE - 1] == Run(HOLE - 1, weights=f"{name}-{HOLE - 1}")


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_for_a_layer_that_does_nothing_every_stand_in_is_the_identity(family: str) -> None:
    model, layer = planted(family), PLANTED[family]
    wanted = logits(model)
    for name in STAND_INS:
        made = do(name, job(model, [layer]), **SHORT.get(name, {}))
        assert relative(logits(model, made), wanted) < 1e-5, name
        if name == "linear-map":
            assert torch.allclose(made.weights[f"map-{layer}-{layer}.weight"], torch.eye(32), atol=1e-6)


@pytest.mark.parametrize(("name", "family"), pairs(2, STAND_INS, ["llama", "gpt2", "mixtral"]))
def test_replacing_is_never_worse_than_dropping_on_the_calibration_text(name: str, family: str) -> None:
    model = tiny(family)
    for removed in ([1, 2], [0, 2], [3]):
        made = do(name, job(model, removed, batch=2), **SHORT.get(name, {}))
        assert not check(made.plan, inspect(model), {n: tuple(t.shape) for n, t in made.weights.items()})
        assert all(fit.stand_in <= fit.drop * (1 + 1e-9) for fit in made.fits)
        assert made.fits or made.notes
        assert torch.isfinite(logits(model, made)).all()
    if made.fits:
        assert made.fits[0].stand_in < made.fits[0].drop


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_mlps_behind_a_span_take_back_what_it_left(family: str) -> None:
    """From the first span on each state is nearer to the dense one than with the mlp before the span fitted alone."""
    model, data = tiny(family), random_data(12, 24)
    given = job(model, [1], data=data, batch=4)
    dense, alone, whole = ([] for _ in range(3))
    for states, made in ((dense, None), (alone, do("refit", given)), (whole, do("refit", given, every=True))):
        with nullcontext() if made is None else running(model, made.plan, made.weights):
            observe(model, data.batches(12), lambda i, x, y, states=states: states.append(y), before=lambda *_: None)
    del dense[0]  # behind the layer before the span the state is to be that behind the span
    if family == "mixtral":  # experts: several matrices write, so none is fitted
        assert [torch.equal(*pair) for pair in zip(alone, whole, strict=True)] == [True] * 3
    else:
        errors = [
            [float((x - y).norm(dim=-1).mean()) for x, y in zip(own, dense, strict=True)] for own in (alone, whole)
        ]
        assert errors[0][0] == errors[1][0]
        assert all(new < 0.95 * old for old, new in zip(errors[0][1:], errors[1][1:], strict=True))


def test_which_mlps_are_fitted_everywhere() -> None:
    model = tiny("llama")
    made = do("refit", job(model, [2], batch=2), every=True)
    assert str(made.plan) == "0,1:refit-1,3:refit-3"
    assert [fit.site for fit in made.fits] == ["2", "3"]
    given = replace(job(model, [], batch=2), plan=parse_plan("0,1a,2-3", Plan.identity(inspect(model))))
    assert str(do("refit", given, every=True).plan) == "0,1a:refit-1,2:refit-2,3:refit-3"


def test_one_run_stands_in_for_layers_and_the_next_attention() -> None:
    model = tiny("llama")
    given = replace(job(model, []), plan=parse_plan("0,2m,3", Plan.identity(inspect(model))))
    made = do("refit", given)
    assert [fit.site for fit in made.fits] == ["2a"] and not made.notes
    assert made.fits[0].stand_in < made.fits[0].drop
    assert relative(logits(model, made), logits(model)) < relative(
        logits(model, Transformed(given.plan, {})), logits(model)
    )


def test_a_second_stand_in_is_fitted_on_the_stream_with_the_first() -> None:
    """The second map's error is that of the model as it will run, not that of the dense stream."""
    model, data = tiny("llama"), random_data(8, 24)
    made = do("linear-map", job(model, [1, 3], data=data), skip_first=0, ridge=1e-4)
    states: list[torch.Tensor] = []
    dense: list[torch.Tensor] = []
    observe(model, data.batches(8), lambda i, x, y: dense.append(y), before=lambda *_: None)
    with running(model, made.plan, made.weights):
        observe(model, data.batches(8), lambda i, x, y: states.append(y), before=lambda *_: None)
    kept = slice(0, 4)  # batches of 4: the second is held back only from 4 batches on
    out = states[-1] @ made.weights["map-3-3.weight"].T + made.weights["map-3-3.bias"]
    assert made.fits[1].stand_in == pytest.approx(float((out - dense[3]).square().mean()), rel=1e-4)
    assert len(made.fits) == 2 and kept


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_a_map_stands_in_for_a_part(part: str) -> None:
    model = tiny("llama")
    text = "0-1,2m,3" if part == "attention" else "0-1,2a,3"
    given = replace(job(model, []), plan=parse_plan(text, Plan.identity(inspect(model))))
    made = do("linear-map", given)
    assert str(made.plan).startswith("0-1,~2:map-2-attention,2m" if part == "attention" else "0-1,2a,~2:map-2-mlp")
    assert made.fits[0].site == ("2a" if part == "attention" else "2m")
    assert made.fits[0].stand_in < made.fits[0].drop
    assert relative(logits(model, made), logits(model)) < relative(
        logits(model, Transformed(given.plan, {})), logits(model)
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_first_tokens_are_not_fitted(side: str) -> None:
    """Sequences padded on either side give the map of the same sequences without padding."""
    model, data = tiny("llama"), random_data(6, 20)
    cut = slice(0, 12) if side == "right" else slice(8, 20)
    mask = torch.zeros_like(data.ids)
    mask[:, cut] = 1
    bare = do("linear-map", job(model, [HOLE], data=data_of(data.ids[:, cut])), ridge=1e-2)
    padded = do("linear-map", job(model, [HOLE], data=data_of(data.ids * mask, mask)), ridge=1e-2)
    for name in ("weight", "bias"):
        assert relative(padded.weights[f"map-2-2.{name}"], bare.weights[f"map-2-2.{name}"]) < 1e-4


def test_an_outlier_is_neither_fitted_nor_mapped() -> None:
    """One token whose state is a hundred times as long: the map is that of the others, and hands the token on."""
    model, data = copy.deepcopy(tiny("llama")), random_data(8, 24)
    data.ids[:, 5] = 1
    data.ids[data.ids == 1] = 4
    data.ids[:, 5] = 1
    with torch.no_grad():
        model.model.embed_tokens.weight[1] *= 100
    made = do("linear-map", job(model, [HOLE], data=data))
    bare = do("linear-map", job(model, [HOLE], data=data), outlier=float("inf"))
    assert "map-2-2.limit" in made.weights and "map-2-2.limit" not in bare.weights
    assert relative(made.weights["map-2-2.weight"], bare.weights["map-2-2.weight"]) > 1e-3
    ids, plan = data.ids[:1], made.plan
    seen: list[torch.Tensor] = []
    hook = find_stack(model).layer(3).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for one, weights in ((drop(Plan.identity(inspect(model)), [HOLE]), {}), (plan, made.weights)):
            with running(model, one, weights):
                model(input_ids=ids, use_cache=False)
    hook.remove()
    assert torch.equal(seen[1][0, 5], seen[0][0, 5])
    assert not torch.allclose(seen[1][0, 6], seen[0][0, 6])


WRONG = [
    pytest.param(name, *one, id=f"{name} {at}" if at else name)
    for name, own in EXAMPLES.items()
    for at, one in enumerate(own.refused)
]


@pytest.mark.parametrize(("name", "removed", "options", "code"), WRONG)
def test_what_cannot_be_done_is_refused(
    name: str, removed: tuple[int, ...], options: dict[str, Any], code: str
) -> None:
    with pytest.raises(ShoalError, match=code):
        do(name, job(tiny("llama"), list(removed)), **options)


def test_every_transform_is_tested_here() -> None:
    assert [name for name, own in EXAMPLES.items() if not isinstance(own, TransformExamples)] == []
