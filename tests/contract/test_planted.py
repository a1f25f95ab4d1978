"""Six layers with known answers in three families: greedy, every stand-in and every merge find what they must."""

from __future__ import annotations

import pytest
import torch

from shoal.api.journal import journaled
from shoal.fitting.result import Job, Transformed
from shoal.live import running
from shoal.models.inspect import inspect
from shoal.plan import Plan, Run, drop
from shoal.registry import get
from shoal.search.greedy import greedy

from .planted import DEEP, LINEAR, NULL, TWINS, affine_of, answers, random_data
from .transform_jobs import CORRECTED, MERGES, SHORT, STAND_INS, TRAINED, logits, relative

FAMILIES = ["llama", "gpt2", "mixtral"]


def done(name: str, family: str, removed: list[int], **options: object) -> Transformed:
    model = answers(family)
    plan = Plan.identity(inspect(model))
    given = Job(model, random_data(16, 24), drop(plan, removed) if removed else plan, batch=4)
    return get("transforms", name).load()(given, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_greedy_removes_first_is_what_brute_force_removes(family: str) -> None:
    model, data = answers(family), random_data(6, 32)
    plan = Plan.identity(inspect(model))
    losses = {}
    for layer in range(DEEP):
        with running(model, drop(plan, [layer])), torch.no_grad():
            losses[layer] = float(model(input_ids=data.ids, labels=data.ids, use_cache=False).loss)
    found = greedy(plan, objective=journaled(model, plan, batch=6)(data), drop=1, legal=lambda _: True)
    best = min(losses, key=losses.__getitem__)
    assert found.plan.dropped() == (best,)
    assert found.trace[0].score == pytest.approx(losses[best], rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [*STAND_INS, *CORRECTED, *TRAINED])
def test_in_the_place_of_the_null_layer_nothing_is_needed(name: str, family: str) -> None:
    made = done(name, family, [NULL], **SHORT[name])
    assert relative(logits(answers(family), made), logits(answers(family))) < 1e-4
    assert all(fit.stand_in <= fit.drop + 1e-9 for fit in made.fits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_affine_layer_is_recovered(family: str) -> None:
    made = done("linear-map", family, [LINEAR])
    turn, shift = affine_of(32)
    assert relative(made.weights[f"map-{LINEAR}-{LINEAR}.weight"], turn.T) < 1e-3
    assert relative(made.weights[f"map-{LINEAR}-{LINEAR}.bias"], shift) < 1e-3
    assert relative(logits(answers(family), made), logits(answers(family))) < 1e-3
    assert made.fits[0].stand_in < 1e-6 * made.fits[0].drop


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", MERGES)
def test_merging_the_twins_gives_either(name: str, family: str) -> None:
    made = done(name, family, [TWINS[1]])
    dropped = Transformed(drop(Plan.identity(inspect(answers(family))), [TWINS[1]]), {})
    assert made.plan.steps()[TWINS[0]] == Run(TWINS[0], weights=f"{name}-{TWINS[0]}")
    assert relative(logits(answers(family), made), logits(answers(family), dropped)) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_twins_share_their_matrices_for_nothing(family: str) -> None:
    made = done("fold-groups", family, [], first=TWINS[0], last=TWINS[1])
    assert f"{TWINS[1]}={TWINS[0]}" in str(made.plan)
    assert relative(logits(answers(family), made), logits(answers(family))) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bypass", [False, True])
def test_beside_the_null_layer_a_layer_is_alone(family: str, bypass: bool) -> None:
    made = done("parallel-pairs", family, [], first=NULL - 1, last=NULL, bypass=bypass)
    assert relative(logits(answers(family), made), logits(answers(family))) < 1e-5
