"""What transforms share: exact folds, walks over stored states, normal equations, holes."""

from __future__ import annotations

import copy

import pytest
import torch

from shoal.errors import UsageError
from shoal.fitting.holes import Pair, find_holes
from shoal.fitting.normal import Normal
from shoal.fitting.result import Transformed
from shoal.fitting.writers import Prober, folded_map, folded_scale
from shoal.models.inspect import inspect
from shoal.models.stacks import find_stack
from shoal.plan import Map, Plan, Run, parse_plan
from shoal.recording.layer_inputs import LayerInputs
from shoal.recording.observe import observe

from .families import tiny
from .planted import random_data
from .transform_jobs import HOLE, do, job, logits, relative


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen2_moe", "granite", "deepseek_v3", "opt"])
def test_a_fold_computes_what_the_explicit_step_computes(family: str) -> None:
    model = tiny(family)
    pair = Pair(job(model, [3], batch=2))
    prober, draw = Prober(pair), torch.Generator().manual_seed(3)
    turn, scale = torch.randn(32, 32, generator=draw) / 4, torch.rand(32, generator=draw) + 0.5
    for layer in (1, 2):
        for part in ("attention", "mlp"):
            writers = prober.writers(layer, part)
            assert writers
            module = find_stack(model).layer(layer)
            x = pair.pruned.states[0]
            with torch.no_grad():
                written = pair.pruned.run(0, Run(layer, part)) - x
                for own, wanted in (
                    (folded_map(module, writers, turn), written @ turn.T),
                    (folded_scale(module, writers, scale), written * scale),
                ):
                    out = pair.pruned.run(0, Run(layer, part, "own"), {f"own.{n}": t for n, t in own.items()})
                    assert float((out - x - wanted).abs().max()) < 1e-5 * max(1.0, float(wanted.abs().max()))


def test_a_norm_behind_the_part_forbids_the_fold_and_says_so() -> None:
    model = tiny("olmo2")
    made = do("refit", job(model, [HOLE]))
    assert made.plan == job(model, [HOLE]).plan and not made.weights
    assert "cannot be rewritten exactly; 2 is only dropped" in made.notes[0]
    explicit = do("compensate", job(model, [HOLE]))
    assert any(isinstance(step, Map) for step in explicit.plan.steps()) and explicit.notes


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_compensating_in_the_weights_is_the_explicit_scale(family: str) -> None:
    model = copy.deepcopy(tiny(family))
    for module in model.modules():  # their epsilon is what a norm does not scale by
        for name in ("eps", "variance_epsilon"):
            if hasattr(module, name):
                setattr(module, name, 0.0)
    given = job(model, [0, 2])
    folded, explicit = do("compensate", given), do("compensate", given, fold=False)
    assert not any(isinstance(step, Map) for step in folded.plan.steps())
    assert relative(logits(model, folded), logits(model, explicit)) < 1e-5
    assert relative(logits(model, folded), logits(model, Transformed(given.plan, {}))) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma3_text", "jamba"])
@torch.no_grad()
def test_a_walk_goes_where_the_model_goes(family: str) -> None:
    model, data = tiny(family), random_data(4, 12)
    seen: list[torch.Tensor] = []
    observe(model, data.batches(4), lambda i, x, y: seen.append(y.clone()), before=lambda *_: None)
    stream = LayerInputs(model, data, batch=4).stream()
    for layer, wanted in enumerate(seen):
        stream.advance(Run(layer))
        assert torch.allclose(stream.states[0], wanted, atol=1e-6), layer


def test_normal_equations_are_least_squares() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 4, generator=draw) + 1, torch.randn(50, 3, generator=draw)
    sums = Normal(4, 3)
    for rows in (slice(0, 20), slice(20, 50)):
        sums.add(x[rows], y[rows])
    weight, bias = sums.solve(0.0)
    wanted = torch.linalg.lstsq(torch.cat([x, torch.ones(50, 1)], 1).double(), y.double()).solution
    assert torch.allclose(torch.cat([weight.T, bias[None]]), wanted, atol=1e-8)  # type: ignore[index]
    assert sums.error(weight, bias) == pytest.approx(float((x.double() @ weight.T + bias - y).square().mean()))
    assert sums.solve(1e12, towards=torch.ones(3, 4))[0] == pytest.approx(torch.ones(3, 4), abs=1e-6)


def test_holes() -> None:
    plan = Plan.identity(inspect(tiny("llama")))

    def holes(text: str) -> list[tuple[int, str]]:
        return [(hole.position, str(hole)) for hole in find_holes(parse_plan(text, plan), "x")]

    assert holes("0,3") == [(1, "1-2")]
    assert holes("1-2") == [(0, "0"), (2, "3")]
    assert holes("0,1m,2a,3") == [(1, "1a"), (3, "2m")]
    assert holes("0,2a,2m,3") == [(1, "1")]
    assert holes("1a") == [(0, "0"), (1, "1m"), (1, "2-3")]
    for text in ("0,2,1", "0,1x2,2", "0,(1|2)", "0-1,2@1"):
        with pytest.raises(UsageError, match="U552"):
            holes(text)
    with pytest.raises(UsageError, match="U553"):
        holes("0-3")
