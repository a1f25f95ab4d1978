"""Entries named after a paper against its formula, on planted numbers."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from torch.nn.functional import cosine_similarity

from shoal.deciding.policies.by_position import by_position
from shoal.deciding.policy import Schedule
from shoal.errors import UsageError
from shoal.methods._job import PruningJob
from shoal.methods.hsd import hsd
from shoal.methods.llm_streamline import llm_streamline
from shoal.methods.loss_one_shot import loss_one_shot
from shoal.methods.poor_mans_bert import poor_mans_bert
from shoal.methods.shortened_llama import shortened_llama
from shoal.models.inspect import inspect
from shoal.models.stacks import find_stack
from shoal.plan import Plan, Run
from shoal.plan.plan import Base
from shoal.scores import Scores
from shoal.search.position import position

from .families import tiny, tiny_of
from .kinds import kind
from .method_tasks import Untouchable, random_task, task_of
from .planted import DEEP
from .test_measures import ragged, states_of
from .transform_jobs import do, job

COUNT = torch.arange(16.0)
ALIKE, HALF, UNLIKE = COUNT, 100 * (2 * (COUNT // 8) + COUNT % 2) + COUNT, 100 * (COUNT % 4) + COUNT
"""Of 16 sequences in 4 bins: the same as COUNT, one of two bits of it, nothing of it. So S is 1, 1/2 and 0."""


def mka_matrices(monkeypatch: pytest.MonkeyPatch, second: torch.Tensor, **options: object) -> list[torch.Tensor]:
    """A matrix of layer 0 merged with layer 1, of layer 0 and of layer 1; S_01 is that of COUNT and `second`."""
    vectors = {0: COUNT[:, None], 1: second[:, None]}
    monkeypatch.setattr("shoal.transforms.mka._embeddings", lambda *_: vectors)
    model = tiny("llama")
    own = [find_stack(model).layer(n).mlp.down_proj.weight.detach() for n in (0, 1)]
    return [do("mka", job(model, [1]), **options).weights["mka-0.mlp.down_proj.weight"], *own]


@pytest.mark.parametrize(("second", "similarity"), [(ALIKE, 1.0), (HALF, 0.5), (UNLIKE, 0.0)])
def test_the_weight_of_mka_follows_the_similarity(
    monkeypatch: pytest.MonkeyPatch, second: torch.Tensor, similarity: float
) -> None:
    found, kept, other = mka_matrices(monkeypatch, second)
    torch.testing.assert_close(found, similarity * kept + (1 - similarity) * other, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("second", "similarity"), [(ALIKE, 1.0), (HALF, 0.5), (UNLIKE, 0.0)])
def test_the_released_weight_of_mka_is_a_sigmoid_of_mean_similarities(
    monkeypatch: pytest.MonkeyPatch, second: torch.Tensor, similarity: float
) -> None:
    mean = (1 + similarity) / 2  # of both layers: to itself and to the other
    weight = 1 / (1 + math.exp(-mean / (mean + mean)))
    found, kept, other = mka_matrices(monkeypatch, second, weight="released")
    torch.testing.assert_close(found, weight * kept + (1 - weight) * other, rtol=0, atol=1e-6)
    assert weight == 1 / (1 + math.exp(-0.5)), "whatever the similarity of two layers alone"


SPANS: dict[int, tuple[float, ...]] = {1: (0.4, 0.3, 0.2, 0.1), 2: (0.1, 0.3, 0.2), 3: (0.2, 0.1)}
"""1 - cosine over spans of 1, 2 and 3 of four layers, by the first layer: the lowest of 2 is 0, of 3 is 1."""


@pytest.mark.parametrize(
    ("window", "kind", "found", "site"),
    [
        ("paper", "ffn", "~0-1,2-3", "0-1"),
        ("released", "ffn", "0,~1-3", "1-3"),
        ("paper", "layer", "2:streamline-2,3", "0-1"),  # at the very beginning the layer behind it
        ("released", "layer", "0,1:streamline-1", "2-3"),
    ],
)
def test_the_released_window_of_llm_streamline_holds_one_layer_more(
    monkeypatch: pytest.MonkeyPatch, window: Any, kind: Any, found: str, site: str
) -> None:
    def planted_spans(*_: Any, span: int, **__: Any) -> Scores:
        values = SPANS[span]
        return Scores("cosine-span", "decoder", "1 - cosine", values, (None,) * len(values), 1, 1, "planted", span)

    monkeypatch.setattr("shoal.methods.llm_streamline.cosine_span", planted_spans)
    monkeypatch.setattr("shoal.fitting.train.Learned.moved", lambda _: True)
    made = llm_streamline(random_task(), drop=2, window=window, kind=kind, epochs=1, loss_epochs=0)
    assert str(made.plan) == found
    assert made.trace[-1].score == min(SPANS[2 if window == "paper" else 3])
    assert made.trace[-1].note == f"layers {site.replace('-', ' to ')} removed"


def test_a_released_window_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match=r"U504.*takes 4 of 4.*remove 1 to 2"):
        llm_streamline(random_task(), drop=3, window="released")


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_hsd_removes_what_by_position_skips_in_the_end(number: int) -> None:
    spec = inspect(tiny_of("llama", DEEP))
    plan, nothing = Plan.identity(spec), cast(Any, Untouchable())
    task = PruningJob(nothing, nothing, plan, spec=spec, legal=lambda _: True, objective=nothing)
    policy = cast(Schedule, by_position(plan, spec, last=DEEP - number, length=8))
    assert set(hsd(task, drop=number).plan.dropped()) == policy.skipped(8, True)
    assert hsd(task, drop=number).plan.dropped() == tuple(sorted((1, 3, 2, 4)[:number]))


def test_ends_are_protected_by_taylor_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ends_first = Scores("planted", "decoder", "", (0.1, 0.9, 0.8, 0.2), (None,) * 4, 1, 1, "planted")
    for name in ("shortened_llama.loss_removed", "shortened_llama.taylor", "loss_one_shot.loss_removed"):
        monkeypatch.setattr(f"shoal.methods.{name}", lambda *_, **__: ends_first)
    task = random_task()
    assert shortened_llama(task, drop=2, first=1, last=1).plan.dropped() == (1, 2)
    assert shortened_llama(task, drop=2, by="perplexity", first=1, last=1).plan.dropped() == (0, 3)
    assert loss_one_shot(task, drop=2).plan.dropped() == (0, 3)
    for method, said in ((loss_one_shot, "it protects nothing"), (shortened_llama, "nothing is protected, as in the")):
        assert said in " ".join(str(method.__doc__).split())


@pytest.mark.parametrize(
    ("strategy", "gone"),
    [  # the paper's sets for 12 layers and 4 to go, which it counts from 1
        ("top", (9, 10, 11, 12)),
        ("bottom", (1, 2, 3, 4)),
        ("symmetric", (5, 6, 7, 8)),
        ("alternate", (5, 7, 9, 11)),
        ("odd-alternate", (5, 7, 9, 11)),
        ("even-alternate", (6, 8, 10, 12)),
    ],
)
def test_poor_mans_bert_names_the_papers_sets(strategy: Any, gone: tuple[int, ...]) -> None:
    plan = Plan(Base("bert", "x", (("encoder", 12),)), (("encoder", tuple(Run(i) for i in range(12))),))
    nothing: Any = Untouchable()
    task = PruningJob(nothing, nothing, plan, spec=nothing, legal=lambda _: True, objective=nothing)
    assert poor_mans_bert(task, drop=4, strategy=strategy).plan.dropped() == tuple(one - 1 for one in gone)


def test_an_alternate_half_is_used_up_before_the_other_one() -> None:
    plan = Plan(Base("bert", "x", (("encoder", 5),)), (("encoder", tuple(Run(i) for i in range(5))),))
    for which, order in (("odd-alternate", [4, 2, 0, 3]), ("even-alternate", [3, 1, 4, 2])):
        found = [
            position(plan, drop=n, legal=lambda _: True, which=cast(Any, which)).plan.dropped() for n in range(5)[1:]
        ]
        assert found == [tuple(sorted(order[:n])) for n in range(5)[1:]]


@pytest.mark.parametrize("tokens", ["first", "last", "all"])
def test_poor_mans_bert_judges_by_the_state_of_the_sentences_token(tokens: Any) -> None:
    model, data = kind("bert"), ragged(side="right")
    cosines = [[cosine_similarity(x, y, dim=-1) for x, y in sequence] for sequence in states_of(model, data)]
    place = {"first": slice(0, 1), "last": slice(-1, None), "all": slice(None)}[tokens]
    change = [1 - torch.cat([sequence[layer][place] for sequence in cosines]).mean() for layer in range(DEEP)]
    lowest = sorted(range(DEEP), key=change.__getitem__)[:2]
    found = poor_mans_bert(task_of(model, data), drop=2, strategy="contribution", tokens=tokens)
    assert found.plan.dropped() == tuple(sorted(lowest))
    assert found.scores is not None and found.scores.values == pytest.approx([float(one) for one in change], rel=1e-4)
    if tokens == "first":
        plain = poor_mans_bert(task_of(model, data), drop=2, strategy="contribution")
        assert plain.scores == found.scores, "the first token's is the paper's"
