"""Exits of a plan with heads of their own: they learn what plans that end there say, and nobody needs a policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from shoal.api.heal import Healed, heal
from shoal.api.heal_publish import publish_healed
from shoal.deciding.gating import ungated
from shoal.errors import ShoalError
from shoal.executing.weights import load_weights
from shoal.healing.exits import weights_of
from shoal.live import running
from shoal.models.load import Loaded
from shoal.plan import Plan, load_plan

from .families import VOCAB
from .healing import batch_of, deep, gradients, learner_of
from .planted import LINEAR, answers, random_data
from .test_api import folder  # noqa: F401
from .test_cli import shoal

EXITS = "0-1,!one=lens?exit,1,!two=matrix?exit,!three=base?exit,2,!four=reads?exit,!five=scores?exit,3-5"
"""Two of them behind one layer, before and behind its second run, and two of one place."""
ENDS = {"0-1": "lens", "0-1,1": "matrix", "0-1,1,": "base", "0-1,1,2": "reads", "0-1,1,2,": "scores"}
"""The plans that end there, and with whose head."""
CUTS = "0-1,!after-1=lens-1?exit,3/project,!after-3=lens-3?exit,4/project"


def heads_of(model: Any) -> dict[str, torch.Tensor]:
    """One of each kind."""
    draw, size = torch.Generator().manual_seed(3), model.config.hidden_size

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    eye = torch.eye(size)
    return {
        "lens.lens": eye + 0.1 * drawn(size, size), "lens.lens_bias": 0.1 * drawn(size),
        "matrix.weight": 0.1 * drawn(VOCAB, size), "matrix.bias": 0.1 * drawn(VOCAB),
        "reads.keeps": torch.ones(1), "reads.reads.0": 0.1 * drawn(size, size),
        "reads.lens": eye + 0.1 * drawn(size, size),
        "scores.logits.1": torch.rand(VOCAB, generator=draw), "scores.logits.2": torch.rand(VOCAB, generator=draw),
    }  # fmt: skip


def said(plan: str, head: str, weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Log probabilities [rows, tokens - 1, vocabulary] of a plan that ends with this head."""
    model, steps = deep(), plan.rstrip(",")
    asked = steps if head == "base" else f"{steps},!end={head}"
    with torch.no_grad(), running(model, asked, {n: t for n, t in weights.items() if n.startswith(f"{head}.")}):
        found: torch.Tensor = model(ids).logits[:, :-1].float().log_softmax(-1)
    return found


@pytest.mark.parametrize("term", ["exit-kd", "exit-loss:at=exits,by=aligned", "exit-loss:at=exits,by=uniform"])
def test_the_loss_at_own_exits_is_that_of_the_plans_that_end_there(term: str) -> None:
    """Of every kind of head, with loops in the plan, and with no exit in the way of the end."""
    model, batch = deep(), batch_of()
    weights = heads_of(model)
    with learner_of(model, term, plan=EXITS, weights=weights) as learner, torch.no_grad():
        found = float(learner(**batch)["loss"])
    ids = batch["ids"]
    end = said("0-1,1,2,3-5", "base", weights, ids)
    exits = [said(plan, head, weights, ids) for plan, head in ENDS.items()]
    if term == "exit-kd":
        right = sum(float((end.exp() * (end - one)).sum(-1).mean()) for one in exits) / len(exits)
    else:
        wanted = ids[:, 1:].flatten()
        shares = weights_of(6, "aligned" if "aligned" in term else "uniform", 0.2)
        losses = [float(cross_entropy(one.flatten(0, 1), wanted)) for one in (*exits, end)]
        right = sum(share * loss for share, loss in zip(shares, losses, strict=True)) / sum(shares)
    assert found == pytest.approx(right, rel=1e-5)


def test_a_lens_that_changes_nothing_is_no_lens() -> None:
    """Bit for bit, what the model's own norm and head say there."""
    model, batch = deep(), batch_of()
    size, losses = model.config.hidden_size, []
    lens = {"lens.lens": torch.eye(size), "lens.lens_bias": torch.zeros(size)}
    for term, plan, weights in (("exit-kd", "0-2,!one=lens?exit,3-5", lens), ("exit-kd:at=every:3", "0-5", {})):
        with learner_of(model, term, plan=plan, weights=weights) as learner, torch.no_grad():
            losses.append(learner(**batch)["loss"])
    assert torch.equal(*losses)


def test_every_tensor_of_every_head_learns_in_pieces_as_in_one() -> None:
    batch = batch_of()
    model = deep()
    weights = heads_of(model) | {"lens.probe": torch.ones(model.config.hidden_size), "lens.probe_bias": torch.zeros(1)}
    for term in ("exit-kd", "exit-loss:at=exits,by=uniform"):
        with learner_of(model, term, plan=EXITS, weights=weights, learn=("plan",)) as learner:
            assert learner.moving_tensors.keys() == heads_of(model).keys(), "no formula depends on a probe"
            whole, pieces = gradients(learner, batch, 4), gradients(learner, batch, 1)
        assert whole.keys() == heads_of(model).keys()
        for name, gradient in whole.items():
            assert float(gradient.abs().max()) > 1e-6, name
            torch.testing.assert_close(pieces[name], gradient, rtol=1e-5, atol=2e-6, msg=name)


def fresh(model: Any) -> dict[str, torch.Tensor]:
    """Lenses that change nothing, of the plan `CUTS`."""
    size = model.config.hidden_size
    each = {"lens": torch.eye(size), "lens_bias": torch.zeros(size)}
    return {f"lens-{layer}.{name}": one for layer in (1, 3) for name, one in each.items()}


def healed(plan: str = CUTS, tokens: int = 640, weights: Any = None, model: Any = None, **asked: Any) -> Healed:
    loaded = Loaded(deep("llama", 5) if model is None else model, None, "own")
    return heal(
        loaded, plan, **{"recipe": "exit-heads", **asked}, weights=fresh(loaded.model) if weights is None else weights,
        tokens=tokens, batch=4, held=8, data=random_data(200, 16), watch=random_data(4, 16, 1), length=16,
    )  # fmt: skip


@pytest.mark.parametrize("settings", [{}, {"labels": 1.0, "by": "aligned"}, {"labels": 0.5, "learn": "lora:rank=4"}])
def test_exits_stay_and_what_the_end_says_stays(settings: dict[str, Any]) -> None:
    """Bit for bit where nothing else moves."""
    found = healed(settings=settings)
    assert str(ungated(found.plan)) == ("0:heal-0,1:heal-1,3:heal-3,4:heal-4" if "learn" in settings else "0-1,3-4")
    left, brought = ([step for step in plan.split(",") if "!" in step] for plan in (str(found.plan), CUTS))
    assert left == brought
    assert all(not torch.equal(found.weights[name], one) for name, one in fresh(found.loaded.model).items())
    assert found.stages[0]["held_after"] < found.stages[0]["held_before"]
    held = found.texts["held out"]
    assert (held.before.nll == held.after.nll) == ("learn" not in settings)
    if "learn" not in settings:
        assert found.better
    model, ids = found.loaded.model, random_data(4, 16, 2).ids
    with torch.no_grad(), running(model, found.plan, found.weights, policy="exit:confidence=1,layers=1,3"):
        never = model(ids).logits
    with torch.no_grad(), running(model, ungated(found.plan), found.weights):
        assert torch.equal(model(ids).logits, never)


def test_nothing_is_trained_without_tokens() -> None:
    found = healed(tokens=0)
    assert (found.plan, found.tokens) == (found.start, 0)
    assert all(torch.equal(found.weights[name], one) for name, one in fresh(found.loaded.model).items())


def test_planted_a_lens_becomes_the_layer_that_is_an_affine_map() -> None:
    """The exit in front of it says what the end says, for more than 95 of 100 tokens of another text."""
    model = answers("llama")
    size = model.config.hidden_size
    start = {"lens-2.lens": torch.eye(size), "lens-2.lens_bias": torch.zeros(size)}
    plan = f"0-{LINEAR - 1},!after-2=lens-2?exit,{LINEAR}/project"
    found = healed(plan, 12_000, start, model, settings={"rate": 1e-2})
    ids, agree = random_data(32, 16, 5).ids, []
    with torch.no_grad(), running(model, f"0-{LINEAR}"):
        end = model(ids).logits.argmax(-1)
    for weights in (start, found.weights):
        with torch.no_grad(), running(model, found.plan, weights, policy="exit:after=2,prefill=true"):
            agree.append(float((model(ids).logits.argmax(-1) == end).float().mean()))
    assert agree[0] < 0.7 and agree[1] > 0.95, agree


def test_what_has_learned_is_written_read_and_used(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """A folder with plan and heads: for `generate`, at the exits that it brings."""
    lenses, out, file = tmp_path / "lenses", tmp_path / "out", tmp_path / "text.txt"
    file.write_text("the shoal swims; the whale sings. " * 60)
    words = ["--data", str(file), "--length", "16"]
    shoal("fit-exits", str(folder), "--policy", "exit:layers=1,3", *words, "--limit", "20", "--output", str(lenses))
    told = ["--plan", str(lenses), *words, "--tokens", "2k", "--batch", "2", "--held", "2", "--output", str(out)]
    said_so = json.loads(shoal("heal", str(folder), *told, "--recipe", "exit-heads", "--json", "-q"))
    assert said_so["policy"] == "" and said_so["plan"] == str(load_plan(lenses))
    before, after = load_weights(lenses), load_weights(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[n], one) == ("probe" in n) for n, one in before.items())
    asked = ["--plan", str(out), "--policy", "exit:confidence=0.01,layers=1"]
    asked += ["--max-new-tokens", "4", "--raw", "--json"]
    trace = json.loads(shoal("generate", str(folder), "the shoal", *asked))["trace"]
    assert trace["counts"]["mean_depth"] < 5
    # and the plan that ends at such an exit is one that needs no policy
    found = healed()
    place = publish_healed(found, tmp_path / "own")
    assert isinstance(place, Path) and not (place / "shoal" / "policy.json").exists()
    model, ids = found.loaded.model, random_data(4, 16, 2).ids
    with torch.no_grad(), running(model, load_plan(place), load_weights(place), policy="exit:after=3,prefill=true"):
        left = model(ids).logits
    with torch.no_grad(), running(model, "0-1,3,!end=lens-3", found.weights):
        torch.testing.assert_close(model(ids).logits, left)


@pytest.mark.parametrize(
    ("code", "words", "asked"),
    [
        ("U502", "finds no exit", {"plan": "0-1,3-4"}),
        ("U502", "finds no exit", {"plan": "0-1,3-4", "settings": {"labels": 1}}),
        ("U502", "labels=2", {"settings": {"labels": 2}}),
        ("U502", "at=somewhere", {"terms": ["exit-loss:at=somewhere"]}),
        ("U502", "temperature=0", {"settings": {"temperature": 0}}),
        ("U641", "removes nothing", {"plan": "0-1,!a?exit,2-4", "recipe": "lora"}),
        ("U721", "layer 3 stands behind the gate mine", {"plan": "0-1,3?mine/project,4", "recipe": "lora"}),
        ("U722", "0-1.* has exits", {"recipe": "layer-skip"}),
        ("U722", "0-1.* has exits", {"recipe": "skip-layer"}),
        ("U675", "plan finds nothing", {"plan": "0-1,!a?exit,3-4", "weights": {}}),
    ],
)
def test_what_cannot_be_learned_at_exits_is_one_sentence(code: str, words: str, asked: dict[str, Any]) -> None:
    with pytest.raises(ShoalError, match=rf"{code}.*{words}"):
        healed(**asked)


def test_a_plan_with_exits_is_healed_as_it_is_without_them() -> None:
    """By recipes that do not look at exits; they stay where they are."""
    plain, found = (healed(plan, 160, recipe="lora:rank=4") for plan in ("0-1,3-4", CUTS))
    assert found.texts["held out"].after.nll == plain.texts["held out"].after.nll
    assert all(torch.equal(found.weights[name], one) for name, one in plain.weights.items())
    assert found.weights.keys() - plain.weights.keys() == fresh(found.loaded.model).keys()
    assert str(Plan.identity(found.loaded.opened.spec)) == "0-4" and str(ungated(found.plan)) == str(plain.plan)
