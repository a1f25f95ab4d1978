"""Six layers with known answers in three families: a null layer, an affine one, twins; each measure finds its own."""

from __future__ import annotations

import pytest
import torch

from shoal.data import Data
from shoal.measures.attention_similarity import attention_similarity
from shoal.measures.block_influence import block_influence
from shoal.measures.cka import cka
from shoal.measures.cosine_span import cosine_span
from shoal.measures.kl_removed import kl_removed
from shoal.measures.kv_freeze import kv_freeze
from shoal.measures.lamp import lamp
from shoal.measures.linearity import linearity
from shoal.measures.logit_lens import logit_lens
from shoal.measures.loss_removed import loss_removed
from shoal.measures.macro_influence import macro_influence
from shoal.measures.magnitude import magnitude
from shoal.measures.residual_ratio import residual_ratio
from shoal.measures.sinks import sinks
from shoal.measures.spectrum import spectrum
from shoal.measures.swap_curve import swap_curve
from shoal.measures.task_removed import task_removed
from shoal.measures.taylor import taylor
from shoal.measures.top1_removed import top1_removed

from .planted import DEEP, LINEAR, NULL, TWIN_OF_NULL, TWINS, answers, random_data

FAMILIES = ["llama", "gpt2", "mixtral"]
TEXT: Data = random_data(6, 48)
SHORT: Data = random_data(3, 16)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "measure",
    [block_influence, residual_ratio, cka, macro_influence, kl_removed, top1_removed],
)
def test_the_null_layer_alone_scores_nothing(family: str, measure: object) -> None:
    scores = measure(answers(family), SHORT)  # type: ignore[operator]
    assert [value == 0 for value in scores.values] == [layer == NULL for layer in range(DEEP)]
    assert scores.order()[0] == NULL


@pytest.mark.parametrize("family", FAMILIES)
def test_no_gradient_reaches_the_null_layer_nor_weights_that_are_passed_by(family: str) -> None:
    scores = taylor(answers(family), SHORT)
    assert {layer for layer, value in enumerate(scores.values) if value == 0} == {NULL, LINEAR}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("measure", [loss_removed, task_removed])
def test_removing_the_null_layer_changes_nothing(family: str, measure: object) -> None:
    scores = measure(answers(family), SHORT)  # type: ignore[operator]
    assert scores.values[NULL] == scores.errors[NULL] == 0
    assert sum(value == 0 for value in scores.values) < DEEP - 1, "and the others do something"


@pytest.mark.parametrize("of", ["state", "change"])
@pytest.mark.parametrize("family", FAMILIES)
def test_linearity_finds_the_affine_layer(family: str, of: str) -> None:
    scores = linearity(answers(family), TEXT, of=of)  # type: ignore[arg-type]
    assert scores.values[NULL] == 0
    assert scores.values[LINEAR] < 1e-6, "a relative error below 1e-3"
    assert scores.detail["with_first"][LINEAR] < 1e-6
    assert all(scores.values[layer] > 1e-4 for layer in (0, 2, *TWINS))
    assert scores.order()[:2] == (NULL, LINEAR)


@pytest.mark.parametrize("family", FAMILIES)
def test_twins_may_change_places_and_so_may_the_null_layer(family: str) -> None:
    scores = swap_curve(answers(family), SHORT)
    still = {NULL - 1, NULL, TWINS[0]}
    assert len(scores.values) == DEEP - 1 and scores.span == 2
    assert {pair for pair, value in enumerate(scores.values) if value == 0} == still
    assert [top1 == 1 for top1 in scores.detail["top1"]][NULL] is True


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_that_attends_as_the_null_layer_below_has_its_map(family: str) -> None:
    scores = attention_similarity(answers(family), SHORT, pairs="all")
    matrix = torch.tensor(scores.detail["matrix"])
    assert scores.values[TWIN_OF_NULL] == 0 and scores.order()[0] == TWIN_OF_NULL
    assert torch.equal(matrix, matrix.T) and not matrix.diagonal().any()
    assert all(0 < value <= 1 for layer, value in enumerate(scores.values) if layer not in (0, TWIN_OF_NULL))
    assert matrix.diagonal(-1).tolist() == pytest.approx(scores.values[1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_probes_see_nothing_happen_in_the_null_layer(family: str) -> None:
    model = answers(family)
    lens, frozen, resting = logit_lens(model, SHORT), kv_freeze(model, SHORT, tail=5), sinks(model, SHORT)
    assert lens.values[NULL] == lens.values[NULL - 1] and lens.values[-1] == 0
    assert lens.detail["saturation"][NULL] == 0 and sum(lens.detail["saturation"]) == pytest.approx(1)
    assert frozen.values[NULL] == pytest.approx(frozen.values[NULL - 1], rel=1e-6) and frozen.values[-1] == 0
    assert frozen.values[0] > frozen.values[-3] > frozen.values[-2] == 0, "the last layer reads that very state anyway"
    assert resting.values[NULL] == resting.values[TWIN_OF_NULL]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("measure", [magnitude, spectrum, lamp])
def test_twins_weigh_the_same(family: str, measure: object) -> None:
    scores = measure(answers(family))  # type: ignore[operator]
    assert scores.values[TWINS[0]] == scores.values[TWINS[1]]
    assert len(set(scores.values)) >= DEEP - 1 - (measure is not magnitude), "the others differ"


@pytest.mark.parametrize("family", FAMILIES)
def test_spans_of_one_layer_are_block_influence_and_longer_ones_find_the_null_layer(family: str) -> None:
    model = answers(family)
    single, influence = cosine_span(model, TEXT), block_influence(model, TEXT)
    assert (single.values, single.errors, single.samples) == (influence.values, influence.errors, influence.samples)
    assert single.order() == influence.order()
    double = cosine_span(model, TEXT, span=2)
    assert double.values[NULL] == pytest.approx(influence.values[TWIN_OF_NULL], rel=1e-6)
    assert double.values[NULL - 1] == pytest.approx(influence.values[0], rel=1e-6)
