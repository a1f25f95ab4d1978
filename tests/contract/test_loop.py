"""The transform loop: what runs again, with what around it, and when it is the model."""

from __future__ import annotations

import copy

import pytest
import torch

from shoal.live import running
from shoal.models.inspect import inspect
from shoal.plan import check, cost, shapes_of

from .families import FAMILIES, tiny
from .references import CLOSE
from .shares import every
from .test_matrix import NO_SDPA
from .transform_jobs import do, job, logits


@pytest.mark.parametrize("family", every(3, FAMILIES))
def test_a_share_of_nothing_is_the_model(family: str) -> None:
    """No loop, and a loop that does nothing, by a change and by a gate."""
    model = tiny(family, "eager" if family in NO_SDPA else "sdpa")
    assert do("loop", job(model, []), first=1, last=2, times=1).plan.is_identity()
    if any({1, 2} & set(layer.needs) for layer in inspect(model).stack().layers):
        pytest.skip("its later layers read the keys of layer 1 or 2, and then those of the last run of it")
    for options in ({"share": 0.0}, {"gate": True, "share": 1e-9}, {"share": 0.0, "order": "layers"}):
        made = do("loop", job(model, []), first=1, last=2, **options)
        assert not check(made.plan, inspect(model), shapes_of(made.weights))
        torch.testing.assert_close(logits(model, made), logits(model), **CLOSE)


def test_what_runs_and_what_stands_around_it() -> None:
    model = copy.deepcopy(tiny("llama"))
    spec = inspect(model)
    hidden = spec.stack().hidden
    plain = do("loop", job(model, []), first=1, last=2, times=3)
    assert str(plain.plan) == "0-2,1-2,1-3" and not plain.weights
    layers = do("loop", job(model, []), first=1, last=2, order="layers")
    assert str(layers.plan) == "0,1x2,2x2,3"
    steps = do("loop", job(model, []), first=1, last=2, order="layers", share=0.5, of="every")
    assert str(steps.plan) == "0,1:loop-1-0,1:loop-1-1,2:loop-2-0,2:loop-2-1,3"
    assert set(steps.weights) == {f"loop-{layer}-{time}.change" for layer in (1, 2) for time in (0, 1)}
    more = do("loop", job(model, []), first=1, last=2, gate=True, inject=0.25, embed=True)
    assert str(more.plan) == "0-2,1:loop-1-1,2:loop-2-1,3"
    assert {name: tuple(t.shape) for name, t in more.weights.items()} == {
        "loop-1-1.mixer.weight": (1, hidden),
        "loop-1-1.mixer.bias": (1,),
        "loop-1-1.reads.-1": (1,),
        "loop-1-1.shift": (hidden,),
        "loop-2-1.mixer.weight": (1, hidden),
        "loop-2-1.mixer.bias": (1,),
    }
    assert cost(more.plan, spec, weights=shapes_of(more.weights)).params == spec.params + 3 * hidden + 3
    half = do("loop", job(model, []), first=1, last=1, gate=True)
    by_hand = do("loop", job(model, []), first=1, last=1, share=0.5)
    torch.testing.assert_close(logits(model, half), logits(model, by_hand), **CLOSE)


def test_each_run_has_a_gate_of_its_own() -> None:
    """The released code of TroL makes one gate for all layers; another bias in one changes that run alone."""
    model = tiny("llama")
    made = do("loop", job(model, []), first=1, last=2, order="layers", gate=True)
    names = [name for name in made.weights if name.endswith("bias")]
    assert names == ["loop-1-1.mixer.bias", "loop-2-1.mixer.bias"]
    weights = {**made.weights, names[0]: torch.tensor([-40.0])}
    with running(model, "0-1,2,2:loop-2-1,3", weights), torch.no_grad():
        alone = model(input_ids=torch.arange(3, 9)[None]).logits
    with running(model, made.plan, weights), torch.no_grad():
        torch.testing.assert_close(model(input_ids=torch.arange(3, 9)[None]).logits, alone, **CLOSE)
