"""Measures: planted answers for all of the registry, and naive references for each."""

from __future__ import annotations

import copy
import importlib
import json
import math
from functools import cache
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from shoal.data import Data
from shoal.errors import UsageError
from shoal.evaluation import sequence_nll
from shoal.live import running
from shoal.measures.angular_distance import angular_distance
from shoal.measures.block_influence import block_influence
from shoal.measures.loss_removed import loss_removed
from shoal.models.inspect import inspect
from shoal.models.stacks import find_stack
from shoal.plan import Plan, drop
from shoal.recording.observe import observe
from shoal.registry import Entry, entries
from shoal.scores import Traits
from shoal.writing.surgery import rewrite

from .families import DEPTH, tiny
from .planted import PLANTED, data_of, hooks_unchanged, own_text, planted, random_data
from .references import silenced
from .shares import pairs

MEASURES = [pytest.param(entry, id=entry.name) for entry in entries("measures").values()]
FAMILIES = tuple(PLANTED)
States = list[list[tuple[torch.Tensor, torch.Tensor]]]


def traits_of(entry: Entry) -> Traits:
    """What the measure's own module promises."""
    return getattr(importlib.import_module(entry.module), "TRAITS", Traits())


@cache
def zeroed(family: str) -> PreTrainedModel:
    """A copy of the tiny model in which every matrix of layer `PLANTED[family]` is zero."""
    model = copy.deepcopy(tiny(family))
    for parameter in find_stack(model).layer(PLANTED[family]).parameters():
        if parameter.dim() > 1:
            parameter.data.zero_()
    return model


def nothing_layer(family: str, traits: Traits) -> PreTrainedModel:
    return zeroed(family) if traits.null == "zero matrices" else planted(family)


@torch.no_grad()
def states_of(model: PreTrainedModel, data: Data) -> States:
    """[sequence][layer] -> (input, output), [length, hidden] each, one unpadded sequence at a time, all kept."""
    stack = find_stack(model)
    found: States = []
    for row, ids in enumerate(data.ids):
        kept = ids if data.mask is None else ids[data.mask[row].bool()]
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def keep(
            _: Any, args: Any, kwargs: Any, out: Any, seen: list[tuple[torch.Tensor, torch.Tensor]] = seen
        ) -> None:
            x, y = (args[0] if args else kwargs["hidden_states"]), (out[0] if isinstance(out, tuple) else out)
            seen.append(tuple((s if s.dim() == 3 else torch.cat(list(s), -1))[0].double().clone() for s in (x, y)))

        handles = [stack.layer(i).register_forward_hook(keep, with_kwargs=True) for i in range(stack.depth)]
        model(input_ids=kept[None], use_cache=False)
        for handle in handles:
            handle.remove()
        found.append(seen)
    return found


def cosine(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))


def angle(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.arccos(cosine(x, y).clamp(-1, 1)) / math.pi


def mean_and_error(per_sequence: list[torch.Tensor]) -> tuple[float, float]:
    """Token-weighted mean, and the error of the ratio of sums and counts by its textbook formula."""
    s, n = (
        torch.tensor(v, dtype=torch.float64)
        for v in ([float(t.sum()) for t in per_sequence], list(map(len, per_sequence)))
    )
    mean, m = s.sum() / n.sum(), len(s)
    return float(mean), float(((s - mean * n).square().sum() / (m - 1) / m).sqrt() / n.mean())


def ragged(count: int = 5, length: int = 12, side: str = "left") -> Data:
    """Sequences of 4 to `length` tokens, padded on one side."""
    data = random_data(count, length, seed=3)
    mask = torch.ones_like(data.ids)
    for row in range(1, count):
        cut = 2 * row
        place = slice(0, cut) if side == "left" else slice(length - cut, None)
        mask[row, place] = 0
    return data_of(data.ids * mask, mask)


@pytest.mark.parametrize(("entry", "family"), pairs(2, MEASURES, FAMILIES))
def test_a_layer_that_does_nothing_is_least_important(entry: Entry, family: str) -> None:
    traits = traits_of(entry)
    scores = entry.load()(nothing_layer(family, traits), own_text(family), batch=16)
    layer = PLANTED[family]
    assert scores.measure == entry.name
    assert len(scores.values) == len(scores.errors) == DEPTH - scores.span + 1
    if traits.null != "none":
        assert scores.values[layer] == 0.0, "exactly"
        assert scores.errors[layer] in (0.0, None)
    assert all((error is not None) == traits.errors for error in scores.errors[traits.first :])
    if traits.least:
        assert scores.removal and scores.order()[0] == layer
        assert all(value > 0 for i, value in enumerate(scores.values) if i != layer)
    assert all(math.isfinite(value) for value in scores.values[traits.first :])
    assert json.dumps(scores.to_dict(), allow_nan=False)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_removing_a_layer_that_does_nothing_changes_no_logit(family: str) -> None:
    model, ids = planted(family), own_text(family).ids[:2]
    plan = drop(Plan.identity(inspect(model)), [PLANTED[family]])
    expected = model(input_ids=ids, use_cache=False).logits
    with running(model, plan):
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
    assert torch.equal(rewrite(model, plan)(input_ids=ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("entry", MEASURES)
def test_a_layer_that_does_nothing_is_exactly_that_in_half_precision(entry: Entry) -> None:
    model = copy.deepcopy(planted("llama")).to(torch.bfloat16)
    traits = traits_of(entry)
    if traits.null == "zero matrices":
        model = copy.deepcopy(nothing_layer("llama", traits)).to(torch.bfloat16)
    scores = entry.load()(model, own_text("llama"), batch=16)
    if traits.null != "none":
        assert scores.values[PLANTED["llama"]] == 0.0
    assert all(math.isfinite(value) for value in scores.values[traits.first :])


@pytest.mark.parametrize("entry", MEASURES)
def test_a_measure_leaves_the_model_as_it_was_and_repeats_itself(entry: Entry) -> None:
    model, data, reports = copy.deepcopy(tiny("llama")).train(), random_data(3, 10), []
    inspect(model)  # looks once at a model that it has not seen
    model.model.layers[1].eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    layers = model.model.layers
    with hooks_unchanged(model):
        first = entry.load()(model, data, progress=lambda *report: reports.append(report))
    assert entry.load()(model, data) == first
    assert model.model.layers is layers
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    done, total = [report[0] for report in reports], {report[1] for report in reports}
    assert done == sorted(done) and total == {done[-1]}


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma3n_text", "jamba"])
def test_block_influence_is_the_naive_one(family: str, batch: int) -> None:
    model, data = tiny(family), random_data(5, 12)
    scores, states = block_influence(model, data, batch=batch), states_of(model, data)
    for layer in range(DEPTH):
        value, error = mean_and_error([1 - cosine(*sequence[layer]) for sequence in states])
        assert scores.values[layer] == pytest.approx(value, rel=1e-5, abs=1e-7)
        assert scores.errors[layer] == pytest.approx(error, rel=1e-4)
    assert (scores.sequences, scores.tokens, scores.unit, scores.span) == (5, 60, "1 - cosine", 1)


@pytest.mark.parametrize("span", [1, 2, 3])
@pytest.mark.parametrize("tokens", ["last", "all"])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma3n_text"])
def test_angular_distance_is_the_naive_one(family: str, tokens: Any, span: int) -> None:
    model, data = tiny(family), random_data(5, 12)
    scores, states = angular_distance(model, data, span=span, tokens=tokens, batch=2), states_of(model, data)
    seen = slice(-1, None) if tokens == "last" else slice(None)
    assert len(scores.values) == DEPTH - span + 1 and scores.span == span
    for first in range(DEPTH - span + 1):
        pairs = [angle(sequence[first][0], sequence[first + span - 1][1])[seen] for sequence in states]
        value, error = mean_and_error(pairs)
        assert scores.values[first] == pytest.approx(value, rel=1e-5)
        assert scores.errors[first] == pytest.approx(error, rel=1e-4)
    assert scores.tokens == (5 if tokens == "last" else 60)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_score(family: str, side: str) -> None:
    model, data = tiny(family), ragged(side=side)
    states = states_of(model, data)
    influence = block_influence(model, data, batch=3)
    skipping = block_influence(model, data, batch=3, skip_first=2)
    last = angular_distance(model, data, batch=3)
    everywhere = angular_distance(model, data, batch=3, tokens="all", span=2)
    for layer in range(DEPTH):
        turned = [1 - cosine(*sequence[layer]) for sequence in states]
        assert influence.values[layer] == pytest.approx(mean_and_error(turned)[0], rel=1e-5)
        assert influence.errors[layer] == pytest.approx(mean_and_error(turned)[1], rel=1e-4)
        assert skipping.values[layer] == pytest.approx(mean_and_error([t[2:] for t in turned])[0], rel=1e-5)
        ends = [angle(*sequence[layer])[-1:] for sequence in states]
        assert last.values[layer] == pytest.approx(mean_and_error(ends)[0], rel=1e-5)
    for first in range(DEPTH - 1):
        spans = [angle(sequence[first][0], sequence[first + 1][1]) for sequence in states]
        assert everywhere.values[first] == pytest.approx(mean_and_error(spans)[0], rel=1e-5)
    assert (influence.tokens, skipping.tokens, last.tokens) == (40, 30, 5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_loss_removed_is_the_naive_one(family: str) -> None:
    model, data = tiny(family), random_data(4, 12)
    scores = loss_removed(model, data, batch=2)
    dense = sequence_nll(model, data)
    for layer in range(DEPTH):
        shorter = rewrite(model, drop(Plan.identity(inspect(model)), [layer]))
        rises = [a - b for (a, _), (b, _) in zip(sequence_nll(shorter, data), dense, strict=True)]
        assert scores.values[layer] == pytest.approx(sum(rises) / (4 * 11), rel=1e-4, abs=1e-6)
        spread = torch.tensor(rises, dtype=torch.float64).std() / 11 / math.sqrt(4)
        assert scores.errors[layer] == pytest.approx(spread.item(), rel=1e-3)
    assert (scores.sequences, scores.tokens) == (4, 44)


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_loss_removed_of_a_part_is_that_of_a_silent_part(part: Any) -> None:
    model, data = tiny("llama"), random_data(4, 12)
    scores = loss_removed(model, data, part=part)
    dense = sum(total for total, _ in sequence_nll(model, data))
    for layer in range(DEPTH):
        with silenced(model, layer, part):
            rise = sum(total for total, _ in sequence_nll(model, data)) - dense
        assert scores.values[layer] == pytest.approx(rise / 44, rel=1e-4, abs=1e-6)


def test_a_layer_that_may_not_go_is_not_judged_and_the_notes_say_why() -> None:
    scores = loss_removed(tiny("gemma3n_text"), random_data(1, 6))
    assert [math.isnan(value) for value in scores.values] == [True, True, False, False]
    assert [error is None for error in scores.errors] == [True] * 4
    assert scores.order() in ((2, 3), (3, 2))
    assert "layer 0 was not judged: P111" in scores.notes[0] and len(scores.notes) == 2
    assert json.dumps(scores.to_dict(), allow_nan=False)


def test_errors_shrink_with_more_sequences() -> None:
    """The same sequences twice: m/(m-1) x S / N^2 becomes 2m/(2m-1) x 2S / (2N)^2, whatever the data."""
    model, data, m = tiny("llama"), random_data(4, 12), 4
    twice = data_of(torch.cat([data.ids, data.ids]))
    for measure in (block_influence, angular_distance, loss_removed):
        once, again = measure(model, data), measure(model, twice)
        assert again.values == pytest.approx(once.values, rel=1e-6, abs=1e-9)
        assert again.errors == pytest.approx([e * math.sqrt((m - 1) / (2 * m - 1)) for e in once.errors], rel=1e-5)
    few, many = (block_influence(model, random_data(count, 12), batch=16).errors for count in (4, 64))
    assert all(b < a / 2 for a, b in zip(few, many, strict=True))


def test_one_sequence_has_no_error() -> None:
    for measure in (block_influence, angular_distance, loss_removed):
        assert measure(tiny("llama"), random_data(1, 8)).errors == (None,) * DEPTH


def test_for_one_token_block_influence_is_the_cosine_of_the_angle() -> None:
    model, data = tiny("llama"), random_data(1, 12)
    influence = block_influence(model, data, skip_first=11)
    angles = angular_distance(model, data)
    assert influence.values == pytest.approx([1 - math.cos(math.pi * a) for a in angles.values], rel=1e-5)
    assert influence.order() == angles.order()


def test_for_many_tokens_block_influence_is_bounded_by_the_angle() -> None:
    """2 a^2 <= 1 - cos(pi a) <= pi^2 a^2 / 2 for each token; the mean of squares lies between mean^2 and the mean."""
    for family in FAMILIES:
        model, data = tiny(family), random_data(4, 12)
        influence, angles = block_influence(model, data), angular_distance(model, data, tokens="all")
        for value, a in zip(influence.values, angles.values, strict=True):
            assert 2 * a**2 <= value <= math.pi**2 / 2 * a


def test_the_note_says_whether_the_first_token_decides() -> None:
    model, data = tiny("llama"), random_data(4, 12)
    whole, skipping = block_influence(model, data), block_influence(model, data, skip_first=1)
    kept = next((n for n, (a, b) in enumerate(zip(whole.order(), skipping.order(), strict=True)) if a != b), None)
    expected = "changes no rank" if kept is None else f"keeps the {kept} lowest ranks"
    assert whole.notes == (f"all tokens counted; leaving the first one out {expected}",)
    assert skipping.notes[0].startswith("the first 1 tokens of each sequence left out; leaving one more out")


@pytest.mark.parametrize("skip", [-1, 12, 50])
def test_skipping_all_tokens_is_refused(skip: int) -> None:
    with pytest.raises(UsageError, match="counts none; use 0 to 11") as raised:
        block_influence(tiny("llama"), random_data(2, 12), skip_first=skip)
    assert raised.value.code == "U508"


def test_a_sequence_that_is_skipped_whole_counts_nothing() -> None:
    data = ragged()
    scores = block_influence(tiny("llama"), data, skip_first=6)
    assert scores.tokens == sum(max(0, int(n) - 6) for n in data.mask.sum(-1))
    assert all(math.isfinite(value) for value in scores.values)


@pytest.mark.parametrize("span", [0, -1, 4, 9])
def test_a_span_that_does_not_fit_is_refused(span: int) -> None:
    with pytest.raises(UsageError, match="does not fit 4 layers; give 1 to 3") as raised:
        angular_distance(tiny("llama"), random_data(1, 4), span=span)
    assert raised.value.code == "U503"


@pytest.mark.parametrize("measure", [block_influence, angular_distance])
def test_layers_behind_a_broken_one_are_not_judged(measure: Any) -> None:
    model = copy.deepcopy(tiny("llama"))
    model.model.layers[2].mlp.down_proj.weight.data.fill_(math.nan)
    scores = measure(model, random_data(2, 8))
    assert [math.isnan(value) for value in scores.values] == [False, False, True, True]
    assert set(scores.order()) == {0, 1}
    assert json.loads(json.dumps(scores.to_dict(), allow_nan=False))["values"][2:] == [None, None]


def test_under_a_running_plan_each_layer_is_judged_where_it_runs() -> None:
    model, data = tiny("llama"), random_data(4, 10)
    seen: dict[int, list[float]] = {}

    def watch(index: int, x: torch.Tensor, y: torch.Tensor) -> None:
        seen.setdefault(index, []).append((1 - cosine(x.double(), y.double())).mean().item())

    with running(model, "0,2x2,3"):
        scores = block_influence(model, data, batch=2)
        observe(model, data.batches(4), watch, before=lambda ids, mask: None)
    assert sorted(seen) == [0, 2, 3] and len(seen[2]) == 2 and seen[2][0] != pytest.approx(seen[2][1])
    assert math.isnan(scores.values[1]) and scores.errors[1] is None
    for layer, values in seen.items():
        assert scores.values[layer] == pytest.approx(sum(values) / len(values), rel=1e-5)
    assert scores.tokens == 40


def test_under_the_identity_plan_block_influence_is_the_same() -> None:
    model, data = tiny("llama"), random_data(2, 10)
    expected = block_influence(model, data)
    with running(model, "0-3"):
        assert block_influence(model, data) == expected


def test_a_part_alone_is_judged_as_what_runs() -> None:
    model, data = tiny("llama"), random_data(2, 10)
    with silenced(model, 1, "mlp"):
        expected = block_influence(model, data)
    with running(model, "0,1a,2-3"):
        assert block_influence(model, data).values == pytest.approx(expected.values, rel=1e-5)


@pytest.mark.parametrize("measure", [angular_distance, loss_removed])
def test_measures_of_the_whole_model_refuse_a_running_plan(measure: Any) -> None:
    model = tiny("llama")
    with running(model, "0-2"), pytest.raises(UsageError, match="a plan is running on it; restore it first") as raised:
        measure(model, random_data(1, 4))
    assert raised.value.code == "U507"
