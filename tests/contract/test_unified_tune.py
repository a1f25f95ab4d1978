"""Training as a schedule decodes: prompts whole, answers by fewer layers; the recipe unified-tune."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import AutoModelForCausalLM

from shoal.api.heal import Healed, heal
from shoal.deciding.policy_text import make_policy
from shoal.errors import ShoalError
from shoal.healing.shown import side_of
from shoal.healing.windows import Windows, collated
from shoal.live import running
from shoal.models.load import Loaded
from shoal.models.opened import open_model
from shoal.plan import Plan

from .healing import batch_of, deep, gradients, learner_of
from .planted import random_data
from .test_api import folder  # noqa: F401
from .test_cli import shoal
from .test_loops import counted

PROMPTS = (5, 3, 8, 1)
"""Tokens of the prompts of the four rows."""
SCHEDULES = ("unified:speedup=3", "apart:decode=0,2,5", "by-position:last=2,length=9")


def answered() -> dict[str, torch.Tensor]:
    """A batch in which rows have prompts of unlike length; the last two tokens of each row do not count either."""
    data = random_data(4, 12, seed=1)
    columns = torch.arange(12)
    answers = torch.stack([(columns >= prompt) & (columns < 10) for prompt in PROMPTS])
    windows = Windows(type(data)(data.ids, None, data.info, answers))
    return collated([windows[row] for row in range(4)])


def spared(policy: str, ids: torch.Tensor) -> list[torch.Tensor]:
    """Logits [tokens, vocabulary] of each row alone, told where its prompt ends."""
    model, found = deep(), []
    with torch.no_grad(), running(model, "0-5", policy=policy) as handle:
        for row, prompt in zip(ids, PROMPTS, strict=True):
            handle.prompt = prompt
            found.append(model(row[None]).logits[0])
    return found


@pytest.mark.parametrize("policy", SCHEDULES)
def test_the_loss_is_that_of_prompts_run_whole_and_of_answers_as_they_are_decoded(policy: str) -> None:
    """Of rows whose prompts are of unlike length, in one batch."""
    batch = answered()
    labels = batch["shift_labels"]
    with learner_of(deep(), "cross-entropy", plan="0-5", policy=policy) as learner, torch.no_grad():
        found = float(learner(**batch)["loss"])
    logits = torch.stack(spared(policy, batch["ids"]))
    assert found == pytest.approx(float(cross_entropy(logits.flatten(0, 1), labels.flatten())), rel=1e-5)
    with torch.no_grad():
        whole = float(cross_entropy(deep()(batch["ids"]).logits.flatten(0, 1), labels.flatten()))
    assert abs(found - whole) > 1e-3, "a schedule that does something"


def test_a_speed_up_of_one_is_plain_training_bit_for_bit() -> None:
    found = []
    for policy in ("unified:speedup=1", ""):
        with learner_of(deep(), "cross-entropy", plan="0-5", policy=policy) as learner:
            found.append(gradients(learner, answered(), 4))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(one, found[1][name]) for name, one in found[0].items())


def test_the_whole_path_by_hand() -> None:
    """Its cross-entropy is the whole plan's; its cosine is between the last states of both paths."""
    batch, policy = answered(), "unified:speedup=3"
    labels = batch["shift_labels"]
    terms = ("whole-path", "whole-path:by=cosine", "cross-entropy")
    with learner_of(deep(), *terms, plan="0-5", policy=policy) as learner, torch.no_grad():
        learner(**batch)
        parts = {name: float(value) for name, value in learner.parts.items()}
    with learner_of(deep(), "cross-entropy", plan="0-5") as learner, torch.no_grad():
        assert parts["whole-path"] == pytest.approx(float(learner(**batch)["loss"]), rel=1e-6)
    opened = open_model(deep())
    states = []
    for who in (policy, ""):
        plan = Plan.identity(opened.spec)
        if who:
            plan = make_policy(who, plan, opened.spec).plan
        side = side_of(opened, plan, {}, plan.stack_name(), who)
        written = torch.arange(12) >= torch.tensor(PROMPTS)[:, None]
        with torch.no_grad():
            states.append(side.show(batch["ids"], None, written).last[labels != -100])
        side.remove()
    assert parts["whole-path:by=cosine"] == pytest.approx(float((1 - cosine_similarity(*states)).mean()), rel=1e-5)


def tuned(recipe: str = "unified-tune", tokens: int = 12_000, **settings: Any) -> Healed:
    loaded = Loaded(deep("llama", 6), None, "own")
    return heal(
        loaded, Plan.identity(loaded.opened.spec), recipe, settings=settings, tokens=tokens, batch=4, held=16,
        data=counted(400, 0), watch=counted(16, 1), length=16,
    )  # fmt: skip


def test_planted_answers_are_right_on_the_layers_that_are_left() -> None:
    """Numbers that count up: after training more than 95 of 100 are right by two layers of six, none of them before."""
    found, ids = tuned(learn="all", rate=1e-2, speedup=3.0), counted(32, 5).ids
    policy = "unified:speedup=3.0,layout=even"
    assert found.policy == policy and found.better
    right = []
    for plan, weights in (("0-5", None), (found.plan, found.weights)):
        with torch.no_grad(), running(found.loaded.model, plan, weights, policy=policy) as handle:
            handle.prompt = 1
            guessed = found.loaded.model(ids).logits[:, 1:-1].argmax(-1)
            assert handle.trace.counts.asked / handle.trace.counts.tokens == pytest.approx((6 + 15 * 2) / 16)
        right.append(float((guessed == ids[:, 2:]).float().mean()))
    assert right[0] < 0.2 and right[1] > 0.95, right
    judged = found.texts["watched"]
    assert judged.layers == pytest.approx((6 + 15 * 2) / 16), "texts are judged as they are decoded"
    assert judged.after.nll < 1 < judged.before.nll


def test_the_result_is_a_checkpoint_of_the_whole_depth(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """Which `shoal write` has proved, and which runs under the policy that the verb names."""
    file, out = tmp_path / "text.txt", tmp_path / "out"
    file.write_text("the shoal swims; the whale sings. " * 60)
    words = ["--data", str(file), "--length", "16", "--batch", "2", "--held", "2", "--tokens", "256"]
    words += ["--recipe", "unified-tune", "--set", "cosine=0.1", "--set", "whole=0.5", "--set", "rate=1e-2"]
    told = shoal("heal", str(folder), *words, "--output", str(out), "-q")
    assert "run it with --policy unified:speedup=2.0,layout=even" in told
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_hidden_layers == 5
    record = json.loads((out / "shoal" / "records.jsonl").read_text().splitlines()[-1])
    assert record["numbers"]["policy"] == "unified:speedup=2.0,layout=even"
    asked = ["--policy", "unified:speedup=2.0", "--max-new-tokens", "4", "--raw", "--json"]
    trace = json.loads(shoal("generate", str(out), "the shoal", *asked))["trace"]
    assert trace["counts"]["mean_depth"] < 5


@pytest.mark.parametrize(
    ("code", "asked"),
    [
        ("U587", {"speedup": 4.0}),
        ("U502", {"layout": "odd"}),
        ("U502", {"cosine": -1.0}),
    ],
)
def test_what_cannot_be_tuned_is_one_sentence(code: str, asked: dict[str, Any]) -> None:
    with pytest.raises(ShoalError, match=code):
        tuned(tokens=64, **asked)


def test_the_whole_path_needs_a_policy_that_leaves_something_out() -> None:
    with learner_of(deep(), "whole-path") as learner, pytest.raises(ShoalError, match=r"U675.*unified-tune"):
        learner(**batch_of())
