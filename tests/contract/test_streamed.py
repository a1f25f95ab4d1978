"""Layers that stay in their files: the same figures bit for bit, one layer in memory at a time, each read once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import accelerate.utils.offload
import pytest
import torch
from typer.testing import CliRunner

from shoal.api.assess import evaluate
from shoal.api.journal import Journaled, journaled
from shoal.api.measuring import measure
from shoal.api.prune import prune
from shoal.cli import app
from shoal.errors import ModelError, UsageError, WriteError
from shoal.evaluation import layer_major_loss
from shoal.evaluation.layer_major_loss import LayerMajorLoss
from shoal.evaluation.plan_loss import PlanLoss
from shoal.live import running
from shoal.models import streamed as streamed_module
from shoal.models.inspect import inspect
from shoal.models.load import Loaded, load
from shoal.models.stacks import find_stack
from shoal.models.streamed import is_streamed, weights_loaded
from shoal.plan import Plan, drop, parse_plan
from shoal.recording.layer_major import LayerMajor
from shoal.recording.observe import observe
from shoal.search.greedy import greedy
from shoal.writing.stream import stream

from .families import FAMILIES, tiny
from .planted import random_data
from .shares import only
from .test_api import model_folder
from .test_fast import CARRIES_MORE, DATA, candidates

EVERY_DAY = {"bloom", "deepseek_v3", "gemma3n_text", "gpt2", "jamba", "llama"}
SOME = only(EVERY_DAY, sorted(FAMILIES))
ASKED: dict[str, Any] = {"length": 24, "limit": 6, "batch": 4}
IDS = torch.randint(3, 60, (5, 12), generator=torch.Generator().manual_seed(0))
MEASURES = {
    "block-influence": {}, "cosine-span": {"span": 2}, "residual-ratio": {"part": "attention"}, "linearity": {},
    "cka": {"part": "mlp"},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return load(folder, device="cpu")


@pytest.fixture(scope="module")
def streamed(folder: Path) -> Loaded:
    return load(folder, device="cpu", stream=True)


def states(model: Any, *, layer_major: bool) -> dict[tuple[int, int], list[torch.Tensor]]:
    """The input and the output of every layer, by layer and batch, of two batches."""
    seen: dict[tuple[int, int], list[torch.Tensor]] = {}
    first = [0]
    mask = torch.ones_like(IDS)
    mask[3:, :4] = 0
    batches = [(IDS[:3], None), (IDS[3:], mask[3:])]

    def watch(index: int, x: torch.Tensor, y: torch.Tensor) -> None:
        seen[index, first[0]] = [x.clone(), y.clone()]

    def before_layer(_: Any, __: Any, row: int) -> None:
        first[0] = row

    def before(ids: torch.Tensor, _: Any) -> None:
        first[0] = 0 if len(ids) == 3 else 3

    observe(model, batches, watch, before=before, before_layer=before_layer if layer_major else None)
    return seen


def same(a: dict[tuple[int, int], list[torch.Tensor]], b: dict[tuple[int, int], list[torch.Tensor]]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(p, q) for key in a for p, q in zip(a[key], b[key], strict=True))


@pytest.mark.parametrize("family", SOME)
def test_layer_by_layer_makes_the_states_that_the_stock_forward_makes(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(family, "eager").eval()
    wanted = states(model, layer_major=False)
    monkeypatch.setattr("shoal.recording.observe.is_streamed", lambda _: True)
    found = states(model, layer_major=True)
    assert list(found) != list(wanted) and sorted(found) == sorted(wanted)
    assert same(found, wanted)


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_of_a_streamed_model_is_the_same_bit_for_bit(name: str, loaded: Loaded, streamed: Loaded) -> None:
    one, other = (measure(model, name, settings=MEASURES[name], **ASKED) for model in (loaded, streamed))
    assert one.samples == other.samples and str(one) == str(other)


def test_one_layer_is_in_memory_at_a_time_and_each_is_read_once(
    streamed: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack, reads, present = find_stack(streamed.model), Counter[str](), list[set[int]]()
    assert is_streamed(stack)
    states(streamed.model, layer_major=True)  # the first run also tries the model
    fetch = accelerate.utils.offload.OffloadedWeightsLoader.__getitem__

    def counted(self: Any, key: str) -> torch.Tensor:
        reads[key] += 1
        present.append({i for i in range(stack.depth) if any(not p.is_meta for p in stack.layer(i).parameters())})
        return fetch(self, key)

    monkeypatch.setattr(accelerate.utils.offload.OffloadedWeightsLoader, "__getitem__", counted)
    states(streamed.model, layer_major=True)
    assert len(reads) == 9 * stack.depth and set(reads.values()) == {1}
    assert all(len(layers) <= 1 for layers in present)
    reads.clear()
    states(streamed.model, layer_major=False)
    assert set(reads.values()) == {2}
    assert all(p.is_meta for i in range(stack.depth) for p in stack.layer(i).parameters())


def test_a_held_layer_is_there_until_the_end_whatever_happens(loaded: Loaded, streamed: Loaded) -> None:
    layer, other = find_stack(streamed.model).layer(1), find_stack(loaded.model).layer(1)
    with suppress(KeyError), weights_loaded(layer):
        assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), other.parameters(), strict=True))
        with torch.no_grad():
            streamed.model(IDS)
        assert not any(p.is_meta for p in layer.parameters())
        raise KeyError
    assert all(p.is_meta for p in layer.parameters())
    for plan in ("0-4", "0,2-4"):
        with running(streamed.model, plan), running(loaded.model, plan), torch.no_grad():
            assert torch.equal(streamed.model(IDS).logits, loaded.model(IDS).logits)
    with weights_loaded(other):
        assert not any(p.is_meta for p in other.parameters())


def test_states_that_fit_nowhere_are_one_sentence_and_a_disk_is_enough(loaded: Loaded) -> None:
    model, stack = loaded.model, find_stack(loaded.model)
    rows = [(IDS[:3], None), (IDS[3:], None)]
    small = LayerMajor(model, stack, rows, memory=0)
    small.run(lambda *_: None)
    assert small._states.spilled
    small = LayerMajor(model, stack, rows, memory=0)
    small._states.close()
    with pytest.raises(UsageError, match=r"U576.*2 batches"):
        small.run(lambda *_: None)


@pytest.mark.parametrize("method", ["shortgpt", "gromov", "sleb"])
def test_a_streamed_model_is_pruned_to_the_same_plan(method: str, loaded: Loaded, streamed: Loaded) -> None:
    one, other = (prune(model, method=method, drop=2, **ASKED) for model in (loaded, streamed))
    assert str(one.plan) == str(other.plan) and one.to_dict() == other.to_dict()


@pytest.mark.parametrize("family", SOME)
def test_losses_layer_by_layer_are_those_of_the_running_plans(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(family, "eager").eval()
    plans = candidates(model)
    exact = PlanLoss(model, DATA, batch=2, share=False)
    monkeypatch.setattr(layer_major_loss, "is_streamed", lambda _: True)
    loss = LayerMajorLoss(exact, memory=4096)
    taken = loss.takes(plans)
    assert taken or family in CARRIES_MORE
    if taken:
        plans.append(parse_plan("0x2,1,3", plans[0]))
        assert loss(plans, exact.batches) == [exact(plan) for plan in plans]
    assert not loss.takes([parse_plan("0,2,1,3", plans[0])])


def test_a_search_reads_each_layer_once_a_round(
    loaded: Loaded, streamed: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[str] = Counter()
    fetch = accelerate.utils.offload.OffloadedWeightsLoader.__getitem__

    def counted(self: Any, key: str) -> torch.Tensor:
        reads[key] += 1
        return fetch(self, key)

    plan = Plan.identity(inspect(streamed.model))
    text = random_data(6, 20)
    found = {}
    for name, model in (("streamed", streamed.model), ("in memory", loaded.model)):
        objective = journaled(model, plan, path=tmp_path / name, batch=2)(text)
        assert isinstance(objective, Journaled)
        if name == "streamed":
            objective.race([drop(plan, [0]), drop(plan, [1])])  # also tries whether layer by layer is exact
            monkeypatch.setattr(accelerate.utils.offload.OffloadedWeightsLoader, "__getitem__", counted)
        found[name] = greedy(plan, objective=objective, legal=lambda _: True, drop=2).plan, objective.known
    assert found["streamed"][0] == found["in memory"][0]
    common = found["streamed"][1].keys() & found["in memory"][1].keys()
    assert len(common) >= 2 and all(found["streamed"][1][key] == found["in memory"][1][key] for key in common)
    # two rounds, the second without what went in the first; the head needs no layer
    times = {int(key.split(".")[2]): n for key, n in reads.items() if ".layers." in key}
    (gone,) = (layer for layer, n in times.items() if n == 1)
    assert gone in found["streamed"][0].dropped() and times | {gone: 2} == dict.fromkeys(range(5), 2)


def test_the_verbs_stream(folder: Path, loaded: Loaded, tmp_path: Path) -> None:
    small = ["--length", "24", "--limit", "3", "-q", "--json"]
    told = [CliRunner().invoke(app, ["measure", str(folder), *small, *more]) for more in ([], ["--stream"])]
    assert told[0].exit_code == 0 and told[0].stdout == told[1].stdout, told[1].output
    output = ["--output", str(tmp_path / "written")]
    done = CliRunner().invoke(app, ["prune", str(folder), "--drop", "2", *small, *output, "--stream"])
    assert done.exit_code == 0, done.output
    written = load(tmp_path / "written", device="cpu")
    with running(loaded.model, json.loads(done.stdout)["plan"]), torch.no_grad():
        assert torch.equal(written.model(IDS).logits, loaded.model(IDS).logits)
    assert written.model.config.num_hidden_layers == 3 and json.loads(done.stdout)["evaluation"] is None


WITH = ["refit", "replaceme", "compensate", "slerp", "streamline:kind=layer,epochs=1", "linear-map"]
"""Transforms that read one layer after the other, or two."""


@pytest.mark.parametrize("transform", WITH)
def test_a_stand_in_is_fitted_on_layers_in_files_bit_for_bit(transform: str, loaded: Loaded, streamed: Loaded) -> None:
    how: dict[str, Any] = {"plan": "0-1,4", "then": [transform], "assess": False, "writable": False, **ASKED}
    one, other = (prune(model, **how) for model in (loaded, streamed))
    assert str(one.plan) == str(other.plan) and one.then == other.then
    assert one.found.weights.keys() == other.found.weights.keys() != set()
    assert all(torch.equal(tensor, other.found.weights[name]) for name, tensor in one.found.weights.items())
    assert all(p.is_meta for p in find_stack(streamed.model).layer(1).parameters())


def test_a_transform_that_reads_all_layers_is_refused(streamed: Loaded) -> None:
    with pytest.raises(UsageError, match=r"U738: fuse-group.*lie in files"):
        prune(streamed, plan="0-1,4", then=["fuse-group"], assess=False, writable=False, **ASKED)


def test_evaluation_reads_each_layer_once_for_all_windows(
    loaded: Loaded, streamed: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"window": 24, "limit": 5, "batch": 2, "generation": False}
    for plan in (None, "0-1,3-4", "0,1x2,2a,3", "0,2,1,3-4"):
        one, other = (evaluate(model, plan=plan, **how) for model in (loaded, streamed))
        assert one.to_dict() == other.to_dict(), plan
    reads: Counter[str] = Counter()
    fetch = accelerate.utils.offload.OffloadedWeightsLoader.__getitem__

    def counted(self: Any, key: str) -> torch.Tensor:
        reads[key] += 1
        return fetch(self, key)

    monkeypatch.setattr(accelerate.utils.offload.OffloadedWeightsLoader, "__getitem__", counted)
    for plan in (None, "0-1,3-4"):
        times = []
        for limit in (2, 6):
            reads.clear()
            evaluate(streamed, plan=plan, **how | {"limit": limit, "batch": 1})
            times.append({key: n for key, n in reads.items() if ".layers." in key})
        assert times[0] == times[1] and len(times[0]) == 9 * 5


def test_new_tensors_are_written_from_file_to_file(folder: Path, loaded: Loaded, tmp_path: Path) -> None:
    small = ["--plan", "0-1,4", "--length", "24", "--limit", "4", "-q", "--json", "--no-assess"]
    outs = {}
    for how in ("memory", "stream"):
        kept = ["--save-plan", str(tmp_path / f"{how}-plan"), "--output", str(tmp_path / how)]
        more = ["--stream"] if how == "stream" else []
        done = CliRunner().invoke(app, ["fuse", str(folder), "--with", "refit", *small, *kept, *more])
        assert done.exit_code == 0, done.output
        outs[how] = load(tmp_path / how, device="cpu").model
        assert json.loads(done.stdout)["proof"]["passed"]
    pair = [model.state_dict() for model in outs.values()]
    assert pair[0].keys() == pair[1].keys() and all(torch.equal(pair[0][name], pair[1][name]) for name in pair[0])
    again = ["write", str(folder), "--plan", str(tmp_path / "memory-plan"), "--output", str(tmp_path / "third"), "-q"]
    done = CliRunner().invoke(app, [*again, "--stream", "--forward"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "third" / "shoal" / "weights.safetensors").is_file()
    done = CliRunner().invoke(app, ["verify", str(tmp_path / "third"), "-q"])
    assert done.exit_code == 0, done.output


def test_new_tensors_for_experts_that_lie_apart_are_refused(tmp_path: Path) -> None:
    base = tiny("mixtral")
    base.save_pretrained(tmp_path / "base")
    own = {f"x.{n}": p.detach() for n, p in find_stack(base).layer(1).named_parameters() if "experts" in n}
    with pytest.raises(WriteError, match=r"W281.*lie apart"):
        stream(tmp_path / "base", "0,1:x,3", tmp_path / "out", weights=own)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_streamed_is_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"M341.*bfloat16"):
        load(folder, stream=True, dtype="bfloat16")
    monkeypatch.setattr(streamed_module, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"M340.*pip install"):
        load(folder, stream=True)


PEAK = """
import sys, torch
from shoal.data import Data
from shoal.data.info import DataInfo
from shoal.api.measuring import measure
from shoal.models.load import load
def peak():  # not ru_maxrss, which begins with that of the process that started this one
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
ids = torch.arange(4 * 64).reshape(4, 64) % 500
data = Data(ids, None, DataInfo("made", "whole", 64, 4, 64, "none", 256, "0"))
load(sys.argv[1] + "/warm", device="cpu", stream=True)
base = peak()
model = load(sys.argv[1] + "/deep", device="cpu", stream=sys.argv[2] == "stream")
measure(model, data=data)
print(peak() - base)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; runs on Linux")
def test_the_peak_is_about_one_layer(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "vocab_size": 512}
    for name, depth in (("warm", 1), ("deep", 16)):
        LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=depth)).save_pretrained(tmp_path / name)
    layer = 4 * (4 * 512 * 512 + 3 * 512 * 2048)
    grown = {}
    for how in ("memory", "stream"):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(tmp_path), how], capture_output=True, text=True, check=True
        )
        grown[how] = 1024 * int(done.stdout.split()[-1])
    assert grown["memory"] > 14 * layer and grown["stream"] < 5 * layer
