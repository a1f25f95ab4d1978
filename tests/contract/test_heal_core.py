"""Healing against its definitions: what a step computes, what the teacher is, what is left in the model."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from shoal.data import Data
from shoal.examples import TermExamples
from shoal.healing.processes import Processes
from shoal.healing.seen import Seen
from shoal.healing.stage import Settings, term_of
from shoal.healing.terms.logit_kd import _divergence
from shoal.healing.train import Run, train
from shoal.healing.windows import labels_of, part
from shoal.live import running
from shoal.plan.notation import map_weights
from shoal.registry import entries
from shoal.writing.surgery import rewrite

from .families import tiny_of
from .healing import CUT, batch_of, deep, gradients, learner_of
from .planted import LINEAR, answers, data_of, random_data, silence
from .shares import every

TERMS = sorted(entries("terms"))
MERGED = {"rtol": 3e-4, "atol": 3e-5}
"""Of logits by W + s B A against those by W and B A apart; a tenth of it was seen."""


@pytest.mark.parametrize("term", TERMS)
def test_four_micro_batches_are_one_batch(term: str) -> None:
    batch = batch_of()
    batch["labels"][0, 3:] = batch["shift_labels"][0, 3:] = -100  # rows that count differently
    own = entries("terms")[term].examples or TermExamples(term)
    with learner_of(deep(), own.text, learn=own.learn, plan=own.plan, policy=own.policy) as learner:
        for name, parameter in learner.moving_tensors.items():  # B is 0 at first, and so the gradient of A
            if "lora_B" in name or own.policy:
                torch.nn.init.normal_(parameter, 0, 0.1)
        gradients(learner, batch, 2)
        learner.averages.step(Processes())  # what a term knows of the step before
        whole, pieces = gradients(learner, batch, 4), gradients(learner, batch, 1)
    assert whole.keys() == pieces.keys()
    assert any(float(one.abs().max()) > 1e-4 for one in whole.values())
    for name, gradient in whole.items():
        torch.testing.assert_close(pieces[name], gradient, rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_losses_are_those_of_plain_transformers(family: str) -> None:
    """Cross-entropy and KL of the plan in one piece, without chunks, hooks or adapters; gemma2 caps its logits."""
    model, batch = tiny_of(family, 6, "eager"), batch_of()
    with torch.no_grad(), running(model, CUT):
        student = model(batch["ids"]).logits[:, :-1].flatten(0, 1)
    with torch.no_grad():
        teacher = model(batch["ids"]).logits[:, :-1].flatten(0, 1)
    wanted = batch["ids"][:, 1:].flatten()
    with learner_of(model, "cross-entropy", "logit-kd") as learner, torch.no_grad():
        learner(**batch)
        parts = learner.parts
    torch.testing.assert_close(parts["cross-entropy"], cross_entropy(student, wanted))
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    torch.testing.assert_close(parts["logit-kd"], kl_div(q, p, log_target=True, reduction="batchmean"))


def test_gradients_through_chunks_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A live plan with near layers = the rewritten stock model, though logits are made seven tokens at a time."""
    model, batch = deep(), batch_of()
    made = rewrite(model, CUT)
    for parameter in made.parameters():  # they share storage with the base, and are leaves of their own here
        parameter.requires_grad_(True)
    loss = cross_entropy(made(batch["ids"]).logits[:, :-1].flatten(0, 1), batch["ids"][:, 1:].flatten())
    found = torch.autograd.grad(loss, list(made.model.layers[1].parameters()))
    names = [name for name, _ in made.model.layers[1].named_parameters()]
    for parameter in made.parameters():
        parameter.requires_grad_(False)
    monkeypatch.setattr("shoal.evaluation.scoring.CHUNK_ELEMENTS", 7 * model.config.vocab_size)
    with learner_of(model, "cross-entropy", learn=("near",)) as learner:
        mine = gradients(learner, batch, 4)
    for name, gradient in zip(names, found, strict=True):
        torch.testing.assert_close(mine[f"heal-1.{name}"], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_divergences_by_hand(beta: float) -> None:
    p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.1, 0.3, 0.6]])
    m = beta * p + (1 - beta) * q
    kl = {
        0.0: (p * (p / q).log()).sum(),
        1.0: (q * (q / p).log()).sum(),
        0.3: beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum(),
    }
    torch.testing.assert_close(_divergence(p.log(), q.log(), beta), kl[beta])


def test_unlikelihood_is_of_the_last_token_of_what_repeats() -> None:
    """By hand: of two rows one says `5 6 7 8` twice, in the other nothing repeats but three tokens."""
    model, batch = deep(), batch_of(2)
    batch["ids"] = torch.tensor([[1, 5, 6, 7, 8, 2, 5, 6, 7, 8, 3, 4], [9, 5, 6, 7, 1, 2, 5, 6, 7, 8, 3, 4]])
    batch["labels"] = torch.cat([batch["ids"][:, 1:], torch.full((2, 1), -100)], 1)
    batch["shift_labels"] = batch["labels"]
    with torch.no_grad(), running(model, CUT):
        likely = model(batch["ids"]).logits.softmax(-1)
    with learner_of(model, "unlikelihood") as learner, torch.no_grad():
        learner(**batch)
        found = next(iter(learner.parts.values())) * 22  # of 2 x 11 columns that count
    torch.testing.assert_close(found, -(1 - likely[0, 8, 8]).log())
    with learner_of(model, "unlikelihood:ngram=3") as learner, torch.no_grad():
        learner(**batch)
        found = next(iter(learner.parts.values())) * 22
    places = [(0, 7, 7), (0, 8, 8), (1, 7, 7)]
    torch.testing.assert_close(found, sum(-(1 - likely[place]).log() for place in places))


def test_kl_leaves_out_what_ends_a_repeated_ngram() -> None:
    """By hand, and with nothing left out where nothing repeats."""
    model, batch = deep(), batch_of(2)
    batch["ids"] = torch.tensor([[1, 5, 6, 7, 8, 2, 5, 6, 7, 8, 3, 4], [9, 5, 6, 7, 1, 2, 5, 6, 7, 8, 3, 4]])
    batch["labels"] = torch.cat([batch["ids"][:, 1:], torch.full((2, 1), -100)], 1)
    batch["shift_labels"] = batch["labels"]
    with torch.no_grad():
        p = model(batch["ids"]).logits.log_softmax(-1)
        with running(model, CUT):
            q = model(batch["ids"]).logits.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)[:, :-1]
    with learner_of(model, "logit-kd:fresh=4") as learner, torch.no_grad():
        found = learner(**batch)["loss"] * 22  # 2 x 11 columns count, the one before the second 8 does not
    torch.testing.assert_close(found, kl.sum() - kl[0, 8])
    with learner_of(model, "logit-kd:fresh=5") as learner, torch.no_grad():
        torch.testing.assert_close(learner(**batch)["loss"] * 22, kl.sum())


@pytest.mark.parametrize("own", [(1, 0, 0, 1), (0, 0, 0, 0), (1, 1, 1, 1)])
def test_what_the_plan_wrote_has_formulas_of_its_own(own: tuple[int, ...]) -> None:
    """The loss and its gradient are those of two learners that see a part of the windows each."""
    batch = batch_of()
    wrote = torch.tensor(own).bool()
    items = batch["labels"].ne(-100).sum()
    model, words = deep(), {"learn": ("near",)}
    with learner_of(model, "cross-entropy", own_terms=[term_of("logit-kd:weight=0.5")], **words) as learner:
        loss = learner(**batch, own=wrote, num_items_in_batch=items)["loss"].detach()
        found = gradients(learner, batch | {"own": wrote}, 4)
    parts = [(term, {k: t[rows] for k, t in batch.items()}) for term, rows in
             (("cross-entropy", ~wrote), ("logit-kd:weight=0.5", wrote)) if rows.any()]  # fmt: skip
    wanted, sums = torch.zeros(()), dict[str, torch.Tensor]()
    for term, piece in parts:
        with learner_of(model, term, **words) as learner:
            one = learner(**piece, num_items_in_batch=items)["loss"]
            one.backward()
            wanted = wanted + one.detach()
            for name, p in learner.moving_tensors.items():
                sums[name] = sums.get(name, torch.zeros(())) + p.grad
    torch.testing.assert_close(loss, wanted)
    assert found.keys() == sums.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, sums[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "learn", every(3, [("lora:rank=4",), ("near",), ("all",), ("near:rate=1e-3", "lora:where=near")])
)
def test_the_teacher_is_the_dense_model_bit_for_bit_after_training(learn: tuple[str, ...], tmp_path: Path) -> None:
    """And the user's model is what it was: names, values, hooks, modes, which parameters ask for gradients."""
    model = deep()
    model.train()
    model.model.layers[2].eval()
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    ids = batch_of()["ids"]
    model.eval()
    with torch.no_grad():
        dense = model(ids).logits
    model.train()
    model.model.layers[2].eval()
    texts = part(random_data(12, 12), 2)
    with learner_of(model, "logit-kd", learn=learn) as learner:
        start = learner.copies()
        settings = Settings(rate=1e-2, evaluations=1)
        train(
            learner, (texts.train, texts.held), settings, 5, Run(batch=2), folder=tmp_path, keep=False, causal=True,
            tell=lambda *_: None,
        )  # fmt: skip
        assert all(not torch.equal(start[name], tensor) for name, tensor in learner.copies().items())
        teacher = learner.sides[1]
        with torch.no_grad():
            assert torch.equal(teacher.logits(teacher.show(ids, None).last), dense)
            model.eval()
            live = learner.sides[0].logits(learner.sides[0].show(ids, None).last)
        plan, weights = learner.finished()
    model.train()
    model.model.layers[2].eval()
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(torch.equal(after[n], old) and after[n].requires_grad == asks for n, (asks, old) in before.items())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    model.eval()
    with running(model, plan, weights), torch.no_grad():
        torch.testing.assert_close(model(ids).logits, live, **MERGED)


def test_lora_starts_as_the_plan_and_merges_into_it() -> None:
    model, batch = deep(), batch_of()
    with torch.no_grad(), running(model, CUT):
        plain = model(batch["ids"]).logits
    with learner_of(model, "cross-entropy") as learner, torch.no_grad():
        side = learner.sides[0]
        assert torch.equal(side.logits(side.show(batch["ids"], None).last), plain)
        plan, weights = learner.finished()
    assert str(plan) == "0:heal-0,1:heal-1,4:heal-4,5:heal-5"
    own = dict(model.named_parameters())
    for name, tensor in weights.items():
        run, _, rest = name.partition(".")
        assert torch.equal(tensor, own[f"model.layers.{run.removeprefix('heal-')}.{rest}"]), name


def test_lora_on_layers_that_a_transform_has_replaced() -> None:
    """The plan's own matrices stay the start, and the addition goes on top of them."""
    model, batch = deep(), batch_of()
    new = {"mine.mlp.down_proj.weight": 2 * model.model.layers[1].mlp.down_proj.weight.detach()}
    with torch.no_grad(), running(model, "0,1:mine,4,5", new):
        plain = model(batch["ids"]).logits
    with learner_of(model, "cross-entropy", plan="0,1:mine,4,5", weights=new) as learner, torch.no_grad():
        side = learner.sides[0]
        assert torch.equal(side.logits(side.show(batch["ids"], None).last), plain)
        for name, parameter in learner.moving_tensors.items():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, 0, 0.1)
        live = side.logits(side.show(batch["ids"], None).last)
        plan, weights = learner.finished()
    assert float((live - plain).abs().max()) > 1e-3
    with running(model, plan, weights), torch.no_grad():
        torch.testing.assert_close(model(batch["ids"]).logits, live, **MERGED)


def test_only_what_the_assistant_said_counts() -> None:
    data = random_data(1, 6)
    answers = torch.tensor([[False, False, True, True, False, True]])
    data = Data(data.ids, None, data.info, answers)
    ids = data.ids[0]
    assert labels_of(ids, data, 0).tolist() == [-100, int(ids[2]), int(ids[3]), -100, int(ids[5]), -100]
    padded = data_of(data.ids, torch.tensor([[0, 1, 1, 1, 1, 0]]))
    assert labels_of(ids, padded, 0).tolist() == [-100, int(ids[2]), int(ids[3]), int(ids[4]), -100, -100]


def test_held_out_windows_are_never_trained_on() -> None:
    texts = part(random_data(20, 8), 4)
    held, trained = ({tuple(row) for row in one.ids.tolist()} for one in (texts.held, texts.train))
    assert len(held) == 4
    assert len(trained) == 16
    assert not held & trained
    assert texts.held.info.sha256 != texts.train.info.sha256


def test_a_loss_that_is_no_number_ends_the_stage_with_what_was_best(tmp_path: Path, recwarn: Any) -> None:
    texts = part(random_data(12, 12), 2)
    with learner_of(deep(), "cross-entropy") as learner:
        start = learner.copies()
        found = train(
            learner, (texts.train, texts.held), Settings(rate=1e30, clip=0.0, evaluations=8, patience=9), 8,
            Run(batch=2), folder=tmp_path, keep=False, causal=True, tell=lambda *_: None,
        )  # fmt: skip
        assert all(torch.equal(start[name], tensor) for name, tensor in learner.copies().items())
    assert "at step" in found.note
    assert found.held_after == found.held_before
    assert any("not a number at step" in str(one.message) for one in recwarn)


def test_early_stop_keeps_the_best(tmp_path: Path) -> None:
    texts = part(random_data(24, 12), 1)
    with learner_of(deep(), "cross-entropy") as learner:
        found = train(
            learner, (texts.train, texts.held), Settings(rate=3e-2, evaluations=20, patience=2), 40, Run(batch=2),
            folder=tmp_path, keep=False, causal=True, tell=lambda *_: None,
        )  # fmt: skip
    looked = [entry["held_loss"] for entry in found.curve if "held_loss" in entry]
    assert found.steps < 40  # random tokens: what is learned of some says nothing of others
    assert found.held_after == min(looked)


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    """Dropout in the adapters, two learners with rates of their own, accumulation, evaluations on the way."""
    texts = part(random_data(14, 12), 2)

    def run(place: Path, stop_at: int) -> tuple[dict[str, torch.Tensor], Any]:
        at = [0]
        how = Run(batch=2, accumulate=2, save_every=0, stop=lambda: at[0] >= stop_at)
        with learner_of(
            deep(), "logit-kd", "cross-entropy", learn=("lora:rank=4,dropout=0.2", "near:rate=1e-3")
        ) as own:
            found = train(
                own, (texts.train, texts.held), Settings(rate=1e-2, evaluations=3), 12, how, folder=place, keep=True,
                causal=True, tell=lambda _, step, of: at.__setitem__(0, step), resume=True,
            )  # fmt: skip
            return own.copies(), found

    whole, uninterrupted = run(tmp_path / "whole", 99)
    _, first = run(tmp_path / "parts", random.Random().randrange(2, 11))
    assert first.stopped
    again, resumed = run(tmp_path / "parts", 99)
    assert all(torch.equal(whole[name], tensor) for name, tensor in again.items())
    assert resumed.curve == uninterrupted.curve
    assert [entry["step"] for entry in resumed.curve if "held_loss" in entry] == [0, 4, 8, 12]
    saved = {one.name for one in (tmp_path / "whole" / "checkpoint-12").iterdir()}
    assert saved >= {"learnt.safetensors", "best.safetensors", "trainer_state.json"}


def test_a_term_sees_each_thing_once_and_only_what_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[bool] = []
    with learner_of(deep(), "cross-entropy") as learner:
        for side in learner.sides:
            real = side.show
            teacher = side is learner.sides[1]
            monkeypatch.setattr(
                side, "show", lambda *a, real=real, teacher=teacher: (shown.append(teacher), real(*a))[1]
            )
        batch = batch_of()
        learner(**batch)
        assert shown == [False]
        seen = Seen(*learner.sides, batch["ids"], None, batch["shift_labels"])
        assert seen.student is seen.student
        assert seen.teacher is seen.teacher
        assert shown == [False, False, True]


def test_planted_what_did_nothing_needs_no_healing() -> None:
    """The layer that is removed adds nothing, so the blocks beside it make what the dense model makes."""
    model = copy.deepcopy(deep())
    silence(model, 2)
    with learner_of(model, "block-local", learn=("near",), plan="0,1,3,4,5") as learner, torch.no_grad():
        assert float(learner(**batch_of())["loss"]) < 1e-9


def test_planted_block_local_finds_the_map_that_was_taken_out(tmp_path: Path) -> None:
    """Layer 3 of the planted model is an affine map of its input; the map in its place starts as the identity."""
    model, texts = answers("llama"), part(random_data(68, 16), 4)
    name = map_weights(LINEAR, LINEAR)
    start = {f"{name}.weight": torch.eye(32), f"{name}.bias": torch.zeros(32)}
    with learner_of(model, "block-local", learn=("plan",), plan="0-2,~3,4-5", weights=start) as learner:
        found = train(
            learner, (texts.train, texts.held), Settings(rate=1e-2, evaluations=1), 160, Run(batch=16),
            folder=tmp_path, keep=False, causal=True, tell=lambda *_: None,
        )  # fmt: skip
    assert found.held_before > 1e-2
    assert found.held_after < 1e-3
