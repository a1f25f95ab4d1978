"""Agreement of orders, how many sequences are enough, and the bootstrap, against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from shoal.errors import UsageError
from shoal.evaluation.ranking import agreement_table, enough, rank_agreement
from shoal.evaluation.stats import bootstrap, ratio
from shoal.scores import Scores


def scores_of(
    values: list[float], *, name: str = "fake", samples: list[list[float]] | None = None, span: int = 1
) -> Scores:
    rows = tuple(map(tuple, samples or []))
    count = len(rows[0]) if rows else 0
    return Scores(
        name, "decoder", "marks", tuple(values), (None,) * len(values), count, count, "nothing", span,
        samples=rows, counts=(1.0,) * count,
    )  # fmt: skip


def test_agreement_of_two_orders_by_hand() -> None:
    one, other = scores_of([1, 2, 3, 4]), scores_of([1, 3, 2, 4])
    found = rank_agreement(one, other, k=2)
    # five of six pairs agree, one does not; the rank differences are 0, 1, 1, 0
    assert found.kendall == pytest.approx(4 / 6)
    assert found.spearman == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert (found.overlap, found.k, found.layers) == (1, 2, 4)
    assert rank_agreement(one, one).kendall == rank_agreement(one, one).spearman == pytest.approx(1)
    assert rank_agreement(one, scores_of([4, 3, 2, 1])).kendall == pytest.approx(-1)
    assert rank_agreement(one, other) == rank_agreement(other, one)


def test_layers_that_one_could_not_judge_are_left_out_of_both() -> None:
    found = rank_agreement(scores_of([math.nan, 2, 3, 1]), scores_of([0, 5, 6, 4]), k=8)
    assert (found.layers, found.k, found.overlap) == (3, 3, 3) and found.kendall == pytest.approx(1)
    assert math.isnan(rank_agreement(scores_of([1, 1, 1]), scores_of([1, 2, 3])).kendall)


@pytest.mark.parametrize(
    "other", [scores_of([1, 2, 3]), scores_of([1, 2, 3, 4], span=2), scores_of([math.nan, math.nan, 1, math.nan])]
)
def test_scores_of_other_layers_are_not_compared(other: Scores) -> None:
    with pytest.raises(UsageError) as raised:
        rank_agreement(scores_of([1, 2, 3, 4]), other)
    assert raised.value.code == "U539"
    assert agreement_table([scores_of([1, 2, 3, 4]), scores_of([1.0] * 4, name="b")]).keys() == {("fake", "b")}
    named = {"a": scores_of([1, 2, 3, 4]), "b": other}
    assert agreement_table(named) == {}


def test_layers_that_stand_apart_need_one_sequence() -> None:
    samples = [[layer + 0.01 * s for s in range(8)] for layer in range(6)]
    found = enough(scores_of([0.0] * 6, samples=samples), k=2)
    assert (found.sizes, found.overlap, found.sequences) == ((1, 2, 4), (1.0, 1.0, 1.0), 1)


def test_layers_that_are_all_noise_never_have_enough() -> None:
    draw = np.random.default_rng(0)
    found = enough(scores_of([0.0] * 20, samples=draw.normal(size=(20, 12)).tolist()), k=5)
    assert found.sequences is None and found.sizes == (1, 2, 4, 6)
    assert all(0.1 < overlap < 0.4 for overlap in found.overlap), "a quarter by chance"


def test_more_sequences_help_where_there_is_a_signal() -> None:
    draw = np.random.default_rng(1)
    samples = (np.arange(10)[:, None] + draw.normal(size=(10, 200)) * 4).tolist()
    found = enough(scores_of([0.0] * 10, samples=samples), k=3, share=0.7)
    assert found.overlap[0] < 0.6 < found.overlap[-1] - 0.15
    assert found.sequences in found.sizes and found.sequences > 2
    assert found == enough(scores_of([0.0] * 10, samples=samples), k=3, share=0.7), "the same seed draws the same"


def test_a_layer_that_was_not_judged_is_not_drawn() -> None:
    samples = [[math.nan] * 4, [1.0] * 4, [2.0] * 4]
    assert enough(scores_of([math.nan, 1, 2], samples=samples), k=1).sequences == 1


@pytest.mark.parametrize(("samples", "k"), [(None, 1), ([[1.0], [2.0]], 1), ([[1.0, 2.0], [2.0, 1.0]], 2)])
def test_what_cannot_be_drawn_is_said(samples: list[list[float]] | None, k: int) -> None:
    with pytest.raises(UsageError) as raised:
        enough(scores_of([1.0, 2.0], samples=samples), k=k)
    assert raised.value.code == "U539"


def test_the_bootstrap_agrees_with_the_ratio_estimator_where_both_apply() -> None:
    draw = np.random.default_rng(2)
    counts = draw.integers(5, 15, 60)
    sums = counts * 2 + draw.normal(size=60) * 3
    known = ratio(sums.tolist(), counts.tolist())[1]
    found = bootstrap(np.stack([sums, counts], -1), lambda s: s[..., 0] / s[..., 1], draws=4000)
    assert found == pytest.approx(known, rel=0.1)
    assert bootstrap(np.ones((1, 2)), lambda s: s[..., 0]) is None
    assert bootstrap(np.ones((5, 2)), lambda s: s[..., 0] / s[..., 1]) == 0
