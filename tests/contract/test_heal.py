"""`shoal heal`: every recipe of the registry, what is written, what is refused, from Python and the command line."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import shoal.api.heal as verb
import shoal.api.heal_stages as stages
import shoal.api.heal_texts as texts
from shoal.api.heal import heal
from shoal.cli.heal import stopping
from shoal.data import Data
from shoal.deciding.gating import ungated
from shoal.errors import ModelError, ShoalError, UsageError
from shoal.examples import RecipeExamples
from shoal.fitting.lens import fit_lenses
from shoal.live import running
from shoal.models.load import Loaded, load
from shoal.plan import Plan, load_plan, parse_plan
from shoal.plan.select import exits
from shoal.registry import entries

from .kinds import kind
from .planted import random_data
from .shares import every
from .test_api import folder  # noqa: F401
from .test_cli import shoal

RECIPES = sorted(entries("recipes"))
SMALL = {"batch": 2, "length": 16, "held": 2, "plan": "0-1,3-4"}
WORDS = ["--plan", "0-1,3-4", "--length", "16", "--batch", "2", "--held", "2", "--tokens", "96"]


def text(count: int = 16, seed: int = 0) -> Data:
    return random_data(count, 16, seed=seed)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:  # noqa: F811
    return load(folder)


@pytest.fixture
def data(tmp_path: Path) -> str:
    """A text of which there is something to learn."""
    file = tmp_path / "text.txt"
    file.write_text("the shoal swims; the whale sings. " * 60)
    return str(file)


@pytest.mark.parametrize("recipe", every(3, RECIPES))
def test_every_recipe_takes_two_steps(recipe: str, loaded: Loaded) -> None:
    """Each stage moves what it says, and the model is afterwards what it was."""
    before = {name: p.detach().clone() for name, p in loaded.model.named_parameters()}
    own = entries("recipes")[recipe].examples or RecipeExamples()
    weights = {f"own.{name}": tensor for name, tensor in loaded.model.model.layers[3].named_parameters()}
    plan = parse_plan(own.plan, Plan.identity(loaded.opened.spec))
    lenses = fit_lenses(loaded.model, plan, None, text(4)) if exits(plan.steps()) else None
    asked = SMALL | {"plan": plan, "weights": weights if ":own" in own.plan else lenses}
    found = heal(loaded, recipe=recipe, tokens=64, data=text(), watch=text(4, 1), **asked)
    stages = [stage for stage in found.stages if "curve" in stage]
    assert stages
    assert all(stage["steps"] >= 1 and stage["moving"] > 0 for stage in stages)
    assert {name for name, _ in loaded.model.named_parameters()} == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in loaded.model.named_parameters())
    assert found.texts.keys() == {"held out", "watched"}
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["tokens"] >= 64
    plan = found.plan if found.policy else ungated(found.plan)
    with running(loaded.model, plan, found.weights, policy=found.policy or None), torch.no_grad():
        assert torch.isfinite(loaded.model(text().ids[:1]).logits).all()
    assert set(found.plan.dropped()) >= {2}


def test_each_round_reads_what_the_plan_of_its_start_writes(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """On-policy: greedily, behind beginnings of the text; the dense model writes something else."""
    seen: list[tuple[Data, Data]] = []
    writers: list[torch.Tensor] = []
    real = texts.written_by

    def noted(model: Any, data: Data, **more: Any) -> Data:
        seen.append((data, made := real(model, data, **more)))
        with torch.no_grad():
            logits = model(made.ids).logits
            writers.append(model(text().ids[:1]).logits)
        start = int(made.answers.int().argmax())  # type: ignore[union-attr]
        assert torch.equal(logits[:, start - 1 : -1].argmax(-1), made.ids[:, start:])
        return made

    monkeypatch.setattr(texts, "written_by", noted)
    words = SMALL | {"plan": "0-2,4", "tokens": 640, "data": text(), "watch": text(4, 1)}
    found = heal(loaded, recipe="on-policy:rounds=2,rate=1e-3,share=1", **words)
    (first, one), (second, two) = seen
    assert found.data["train"]["sha256"] not in {one.info.sha256, two.info.sha256}
    assert not torch.equal(first.ids, second.ids)  # other beginnings
    with running(loaded.model, found.start):
        assert torch.equal(real(loaded.model, first, temperature=0.0).ids, one.ids)
    assert not torch.equal(*writers)  # the second round's writer has learned in the first


def test_what_is_held_out_is_also_what_the_plan_writes(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the plan's own writing has formulas of its own: in the same shares, by what the stage begins with; the text
    alone decides elsewhere."""
    seen: list[tuple[Data, Data]] = []
    real = stages.train

    def noted(learner: Any, data: tuple[Data, Data], *rest: Any, **more: Any) -> Any:
        seen.append(data)
        return real(learner, data, *rest, **more)

    monkeypatch.setattr(stages, "train", noted)
    words = SMALL | {"held": 4, "tokens": 320, "data": text(40), "watch": text(4, 1)}
    heal(loaded, recipe="less-repetition:own=0.5,windows=0", **words)
    (_, plain), (read, held) = seen
    assert (plain.own, len(plain)) == (None, 4)
    assert read.own is not None and held.own is not None
    assert held.own.tolist() == [False] * 4 + [True] * 4
    assert torch.equal(held.ids[:4], plain.ids)
    assert torch.equal(held.ids[4:, :8], plain.ids[:, :8])  # the beginnings
    assert not torch.equal(held.ids[4:], plain.ids)
    assert float(read.own.float().mean()) == 0.5
    seen.clear()
    heal(loaded, recipe="on-policy:rounds=1", **words)
    assert seen[0][1].own is None


def test_no_tokens_leave_the_start_bit_for_bit(loaded: Loaded) -> None:
    found = heal(loaded, tokens=0, data=text(), watch=text(4, 1), **SMALL)
    assert (found.plan, found.weights, found.tokens) == (found.start, {}, 0)
    assert found.texts["held out"].before.nll == found.texts["held out"].after.nll


def test_a_closed_form_is_fitted_on_as_many_windows_as_it_asks_for(loaded: Loaded, data: str) -> None:
    """However few tokens are trained on: fitted on two windows, it is a system with more unknowns than equations."""
    said: list[str] = []
    heal(loaded, recipe="refit-kd:windows=5", tokens=32, data=data, say=said.append, **SMALL)
    assert any("fitted on 80 tokens" in line for line in said), said


def test_minutes_are_turned_into_tokens(loaded: Loaded) -> None:
    said: list[str] = []
    found = heal(loaded, minutes=0.02, data=text(), watch=text(4, 1), say=said.append, **SMALL)
    assert found.tokens >= 32
    assert any(line.startswith("0.02 minutes are") for line in said)
    assert any("tokens a second" in line for line in said)


def test_an_encoder_is_healed_by_its_states() -> None:
    """No labels and no distribution: all real tokens count, and held-out states say whether it is better."""
    model = Loaded(kind("bert"), None, "bert")
    ids = torch.randint(3, model.model.config.vocab_size, (16, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 9:] = 0
    given = Data(ids, mask, random_data(16, 12).info)
    found = heal(
        model, "0,2,4,5", "patient:labels=-1,rate=3e-3", tokens=400, data=given, batch=2, length=12, held=2
    )  # fmt: skip
    assert found.texts == {}
    assert found.stages[0]["held_after"] < found.stages[0]["held_before"]
    assert found.better
    with pytest.raises(ModelError, match="M322"):
        heal(model, "0,2,4,5", "logit-kd", tokens=400, data=given, batch=2, held=2)


def test_the_written_folder_is_a_stock_model_that_is_better(folder: Path, tmp_path: Path, data: str) -> None:  # noqa: F811
    out = tmp_path / "healed"
    words = [str(folder), *WORDS[:-1], "2k", "--recipe", "lora:rank=4", "--set", "rate=1e-2", "--data", data]
    said = json.loads(shoal("heal", *words, "--output", str(out), "--json", "-q"))
    held = said["texts"]["held out"]
    assert held["after"]["nll"] < held["before"]["nll"]
    assert said["proof"]["passed"]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_hidden_layers == 4
    base, mine = load_file(folder / "model.safetensors"), model.state_dict()
    layers = {0: 0, 1: 1, 2: 3, 3: 4}
    for name, tensor in mine.items():
        old = name
        for now, then in layers.items():
            old = old if f"layers.{now}." not in name else name.replace(f"layers.{now}.", f"layers.{then}.")
        learns = name.endswith("proj.weight")
        assert torch.equal(tensor, base[old]) != learns, name
    record = json.loads((out / "shoal" / "records.jsonl").read_text().splitlines()[-1])
    assert record["what"] == "heal"
    assert record["numbers"]["stages"][0]["curve"]
    assert "healed on tokens" in (out / "README.md").read_text()
    assert str(load_plan(out / "shoal" / "plan.json")) == "0:heal-0,1:heal-1,3:heal-3,4:heal-4"
    assert not Path(f"{out}.healing").exists()


def test_a_plan_that_no_stock_class_holds_is_kept_as_a_plan(folder: Path, tmp_path: Path, data: str) -> None:  # noqa: F811
    out = tmp_path / "healed"
    words = [str(folder), "--plan", "0,1a,3-4", *WORDS[2:-1], "1k", "--data", data, "--set", "rate=1e-2"]
    said = shoal("heal", *words, "--output", str(out), "-q")
    assert "a plan with its tensors" in said
    assert "heal" in (out / "shoal" / "records.jsonl").read_text()
    again = [str(folder), "--plan", str(out), "--data", data, "--window", "16", "--limit", "2", "--no-generation"]
    shoal("evaluate", *again)


def test_gates_are_trained_written_and_used_from_the_command_line(folder: Path, tmp_path: Path, data: str) -> None:  # noqa: F811
    """No plan is needed: gates decide about the whole model."""
    out = tmp_path / "routed"
    words = [
        "--length",
        "16",
        "--batch",
        "2",
        "--held",
        "2",
        "--tokens",
        "96",
        "--data",
        data,
        "--set",
        "recover=gates",
    ]
    said = shoal("heal", str(folder), *words, "--recipe", "skip-layer", "--output", str(out), "--anyway")
    policy = out / "shoal" / "policy.json"
    assert f"--plan {out} --policy {policy}" in said and "layers a token" in said
    told = ["--plan", str(out), "--policy", str(policy), "--max-new-tokens", "3", "--raw"]
    assert json.loads(shoal("generate", str(folder), "the shoal", *told, "--json"))["trace"]["layers"] == 5
    assert "U523" in shoal("heal", str(folder), *words[:-2], code=1)


def test_a_recipe_typed_by_hand(folder: Path, data: str) -> None:  # noqa: F811
    words = [str(folder), *WORDS, "--data", data, "--term", "logit-kd:temperature=2", "--term", "hidden-kd:weight=0.1"]
    said = json.loads(shoal("heal", *words, "--learn", "near:rate=1e-3", "--json", "-q"))
    assert said["recipe"] == "logit-kd:temperature=2 + hidden-kd:weight=0.1 · near:rate=1e-3"


def test_what_is_worse_leaves_no_folder(folder: Path, tmp_path: Path, data: str) -> None:  # noqa: F811
    out = tmp_path / "healed"
    words = [str(folder), *WORDS, "--data", data, "--set", "rate=1", "--output", str(out), "-q"]
    assert "U640" in shoal("heal", *words, code=1)
    assert not out.exists()


@pytest.mark.parametrize("recipe", ["restore", "less-repetition:windows=0"])
def test_a_stopped_run_goes_on_where_it_was(recipe: str, loaded: Loaded, tmp_path: Path) -> None:
    """The second stage of a recipe is stopped: the first is not done again, and the end is the same."""
    steps: list[int] = []
    how: dict[str, Any] = {**SMALL, "data": text(40), "watch": text(4, 1), "tokens": 512, "recipe": recipe}
    whole = heal(loaded, folder=tmp_path / "whole", **how)
    stopped = heal(
        loaded, folder=tmp_path / "parts", stop=lambda: len(steps) > 12, progress=lambda *a: steps.append(a[0]), **how
    )
    assert stopped.stopped
    assert len(stopped.stages) == 2
    with pytest.raises(UsageError, match=r"U642.*--resume"):
        heal(loaded, folder=tmp_path / "parts", **how)
    with pytest.raises(UsageError, match=r"U643.*its seed is 0 and not 1"):
        heal(loaded, folder=tmp_path / "parts", resume=True, seed=1, **how)
    with pytest.raises(UsageError, match=r"U643.*its plan"):
        heal(loaded, folder=tmp_path / "parts", resume=True, **{**how, "plan": "0-2,4"})
    again = heal(loaded, folder=tmp_path / "parts", resume=True, **how)
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in whole.weights.items())
    assert [stage["curve"] for stage in again.stages] == [stage["curve"] for stage in whole.stages]


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("U641", {"plan": "0-4"}),
        ("U641", {"plan": "0,1-4"}),
        ("U673", {"tokens": None}),
        ("U673", {"tokens": 100, "minutes": 1.0}),
        ("U673", {"tokens": -1}),
        ("U501", {"recipe": "logit-dk"}),
        ("U502", {"recipe": "lora:rnak=3"}),
        ("U502", {"recipe": "lora:rank=0"}),
        ("U502", {"recipe": "less-repetition:own=1"}),
        ("U502", {"recipe": "less-repetition:weight=0"}),
        ("U502", {"terms": ["logit-kd:temperature=0"]}),
        ("U502", {"terms": ["logit-kd:fresh=-1"]}),
        ("U502", {"terms": ["logit-kd:weight=-1"]}),
        ("U502", {"terms": ["hidden-kd:at=sometimes"]}),
        ("U502", {"learn": ["lora:rate=fast"]}),
        ("U501", {"learn": ["lroa"]}),
        ("U675", {"learn": ["plan"]}),
        ("U552", {"plan": "4,3,1,0", "learn": ["near"]}),
        ("D494", {"data": Data(text().ids, None, text().info, torch.zeros(16, 16, dtype=torch.bool))}),
        ("D413", {"data": text(1)}),
        ("U511", {"teacher": Loaded(kind("t5"), None, "other")}),
        ("U653", {"source": Loaded(kind("t5"), None, "t5"), "plan": "encoder: 0-3; decoder: 0-3"}),
    ],
)  # fmt: skip
def test_what_cannot_be_healed_is_one_sentence(code: str, how: dict[str, Any], loaded: Loaded) -> None:
    asked = {"tokens": 64, "data": text(), "watch": text(2, 1), "source": loaded, **SMALL, **how}
    with pytest.raises(ShoalError) as found:
        heal(**asked)
    assert found.value.code == code, found.value
    assert not any("lora" in name for name, _ in loaded.model.named_modules())
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())


def test_what_cannot_be_watched_is_said_before_anything_is_trained(loaded: Loaded, tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"context": "a"}\n')
    with pytest.raises(ShoalError, match=r"D408.*no key 'text'"):
        heal(loaded, tokens=64, data=text(), watch=str(tmp_path / "other.jsonl"), folder=tmp_path / "run", **SMALL)
    assert not (tmp_path / "run").exists()


def test_memory_that_is_too_small_says_what_helps(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr("shoal.healing.learner.Learner.forward", full)
    with pytest.raises(UsageError, match=r"U674.*--batch 1 with --accumulate 2"):
        heal(loaded, tokens=64, data=text(), watch=text(2, 1), **SMALL)


@pytest.mark.parametrize(("words", "code"), [(["--tokens", "many"], "U673"), (["--recipe", "nothing"], "U501")])
def test_the_command_line_refuses_before_anything_is_loaded(
    words: list[str],
    code: str,
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shoal.models.load.load", lambda *_, **__: pytest.fail("loaded"))
    assert code in shoal("heal", str(folder), *WORDS, *words, code=1)


def test_a_new_term_is_one_file(loaded: Loaded, tmp_path: Path) -> None:
    mine = tmp_path / "quiet.py"
    mine.write_text(
        '"""Small logits."""\n\n\ndef quiet(seen, *, power: float = 2.0):\n'
        '    """|logits|^power, summed over tokens. Source: a test."""\n'
        "    return seen.over_logits(lambda s, teacher, labels: s.abs().pow(power).mean(-1).sum(), 'quiet')\n"
    )
    found = heal(loaded, terms=[f"{mine}:power=1.0"], tokens=256, data=text(), watch=text(2, 1), **SMALL)
    assert found.stages[0]["held_after"] < found.stages[0]["held_before"]


def test_a_signal_ends_a_run_behind_its_step_and_a_second_one_at_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stopping() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGTERM)
        assert stop()
    with stopping():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_verb_is_a_name_of_the_package() -> None:
    import shoal as package

    assert package.heal is verb.heal


def test_prune_heals_what_it_found_in_one_command(folder: Path, tmp_path: Path, data: str) -> None:  # noqa: F811
    out = tmp_path / "out"
    words = [str(folder), "--drop", "1", "--data", data, "--length", "32", "--limit", "2", "--no-assess", "-q"]
    words += ["--heal", "lora:rate=1e-2,rank=4", "--tokens", "8k", "--output", str(out)]
    said = json.loads(shoal("prune", *words, "--json"))
    assert said["plan"] == "0:heal-0,1:heal-1,3:heal-3,4:heal-4"
    assert said["proof"]["passed"]
    kinds = [json.loads(line)["what"] for line in (out / "shoal" / "records.jsonl").read_text().splitlines()]
    assert kinds == ["prune", "heal"]
    page = (out / "report.html").read_text()
    assert "<h2>Healing</h2>" in page
    assert "Loss of cross-entropy" in page
    assert not Path(f"{out}.healing").exists()
    assert "U640" in shoal("prune", *words[:-6], "--heal", "lora:rate=1", "--tokens", "96", code=1)
    assert "U673" in shoal("prune", *words[:-6], "--heal", "lora", code=1)


def test_compare_heals_every_plan_on_as_many_tokens(folder: Path, tmp_path: Path, data: str) -> None:  # noqa: F811
    words = [str(folder), "--output", str(tmp_path / "r"), "--data", data, "--test-data", data, "--length", "16"]
    words += ["--limit", "2", "--window", "16", "--windows", "4", "--new", "0", "--pairs", "0", "-b", "layers=0.8"]
    said = json.loads(
        shoal("compare", *words, "-m", "position", "--heal", "lora:rate=1e-2,rank=4", "--tokens", "8k", "--json", "-q")
    )
    (row,) = [row for row in said["rows"] if row["key"] != "dense"]
    assert "heal-0" in row["result"]["plan"]
    assert next(iter(row["result"]["perplexity"].values())) < row["result"]["unhealed"]
    assert row["measured"]["healing"] > 0
    assert "before healing" in (tmp_path / "r" / "results.md").read_text()
