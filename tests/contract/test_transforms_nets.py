"""Nets trained in the place of layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shoal.errors import UsageError
from shoal.fitting.result import Transformed
from shoal.live import running
from shoal.models.inspect import inspect
from shoal.plan import Plan, check, parse_plan

from .families import tiny
from .planted import random_data
from .transform_jobs import do, job

KINDS = ("layer", "ffn", "swiglu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_trained_net_comes_nearer_than_dropping_and_starts_from_it(family: str, kind: str) -> None:
    model, given = tiny(family), job(tiny(family), [1, 2])
    before = {n: t.clone() for n, t in model.state_dict().items()}
    null = do("streamline", given, kind=kind, epochs=0, loss_epochs=0)
    assert null.plan == given.plan and not null.weights
    made = do("streamline", given, kind=kind, epochs=4, loss_epochs=1, rate=3e-3)
    assert str(made.plan) == ("0:streamline-0,3" if kind == "layer" else "0,~1-2,3")
    assert not check(made.plan, inspect(model), {n: tuple(t.shape) for n, t in made.weights.items()})
    (fit,) = made.fits
    assert fit.site == "1-2" and fit.drop == null.fits[0].drop and fit.held_drop == null.fits[0].held_drop
    assert fit.stand_in < fit.drop * 0.99 and (fit.held_stand_in or 0) < (fit.held_drop or 0)
    assert "language loss" in made.notes[0] and not null.notes
    again = do("streamline", given, kind=kind, epochs=4, loss_epochs=1, rate=3e-3)
    assert all(torch.equal(t, again.weights[n]) for n, t in made.weights.items())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_language_loss_is_that_of_the_model_with_its_nets(kind: str) -> None:
    """Trained on the loss alone, it falls on the very text; the errors of the states are as they were before."""
    model = tiny("llama")
    text = random_data(3, 24)
    given = job(model, [1, 3], data=text, batch=1)
    made = do("streamline", given, kind=kind, epochs=0, loss_epochs=6, rate=9e-3)
    assert [fit.drop for fit in made.fits] == [fit.stand_in for fit in made.fits]
    before, after = (float(piece) for piece in made.notes[0].split(": ")[1].split(" to "))
    losses = []
    for one in (Transformed(given.plan, {}), made):
        with running(model, one.plan, one.weights), torch.no_grad():
            losses.append(float(model(input_ids=text.ids, labels=text.ids, use_cache=False).loss))
    # the note has four decimals: half a unit of the last, and as much for the rounding of the losses, which is 1e-6
    assert losses == pytest.approx([before, after], abs=1e-4) and after < before


def test_a_net_takes_over_from_the_holes_on_both_sides() -> None:
    model = tiny("llama")
    whole = do("streamline", job(model, [0, 2, 3]), epochs=2, loss_epochs=0, rate=1e-3)
    assert str(whole.plan) == "1:streamline-1" and [fit.site for fit in whole.fits] == ["0, 2-3"]
    given = replace(job(model, []), plan=parse_plan("0,1a,3", Plan.identity(inspect(model))))
    parts = do("streamline", given, kind="swiglu", epochs=2, loss_epochs=0, inner=5)
    assert str(parts.plan) == "0,1a,~1:map-1-mlp,~2,3" and parts.weights["map-2-2.up"].shape == (32, 5)
    assert [fit.site for fit in parts.fits] == ["1m", "2"]
    with pytest.raises(UsageError, match="U557"):
        do("streamline", given)
