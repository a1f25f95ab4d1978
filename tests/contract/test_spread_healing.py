"""`shoal heal` by several processes that torchrun has started: what one process heals, and one result."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import multiprocessing
from transformers import AutoModelForCausalLM

from shoal.api.prune import prune
from shoal.api.prune_and_heal import prune_and_heal
from shoal.errors import UsageError
from shoal.healing.processes import Processes
from shoal.models.load import Loaded

from . import spread_healing
from .families import tiny_of
from .planted import random_data
from .test_api import folder  # noqa: F401
from .test_cli import shoal

CLOSE = 1e-5
RECIPES = ("logit-kd:learn=near", "lora", "answers")


def both(function: Any, place: Path, *args: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (place / "port").write_text(str(free.getsockname()[1]))
    multiprocessing.start_processes(function, (2, *args), nprocs=2, start_method="spawn")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_heal_as_one_that_accumulates(recipe: str, tmp_path: Path) -> None:
    one = spread_healing.healed(recipe, batch=1, accumulate=2)
    both(spread_healing.process, tmp_path, recipe, str(tmp_path), 0)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert sorted(first) == sorted(one.weights) and first
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert max(float((first[name] - tensor).abs().max()) for name, tensor in one.weights.items()) < CLOSE
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [one_said["tokens"] for one_said in said] == [one.tokens] * 2
    assert [one_said["asked"]["processes"] for one_said in said] == [2, 2]
    assert said[0]["after"] == pytest.approx([judged.after.nll for judged in one.texts.values()], abs=1e-5)
    assert said[0]["said"] > 0 and said[1]["said"] == 0, "the first process speaks"


@pytest.mark.slow
def test_what_one_process_is_told_stops_both_and_resuming_ends_with_the_same_bytes(tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    straight.mkdir()
    broken.mkdir()
    both(spread_healing.process, straight, "lora", str(straight), 0)
    both(spread_healing.process, broken, "lora", str(broken), 3)
    assert [json.loads((broken / f"{rank}.json").read_text())["stopped"] for rank in (0, 1)] == [True, True]
    both(spread_healing.process, broken, "lora", str(broken), 0)
    want, found = load_file(straight / "0.safetensors"), load_file(broken / "0.safetensors")
    assert all(torch.equal(want[name], tensor) for name, tensor in found.items())
    other = json.loads((broken / "run" / "run.json").read_text())
    assert other["processes"] == 2


@pytest.mark.slow
def test_what_the_first_refuses_is_refused_by_all(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"plan": "0-2"}')
    both(spread_healing.refused, tmp_path, str(tmp_path))
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert said[0] == said[1] and said[0].startswith("UsageError U642")


@pytest.mark.slow
def test_torchrun_writes_one_proved_folder(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    text, output = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("the shoal swims; the whale sings. " * 60)
    words = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "shoal"),
        *("heal", str(folder), "--plan", "0-1,3-4", "--recipe", "lora", "--tokens", "256", "--length", "16"),
        *("--held", "2", "--data", str(text), "--watch", str(text), "--output", str(output), "--anyway", "--json"),
    ]
    ran = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert said["asked"]["processes"] == 2 and said["proof"]
    assert AutoModelForCausalLM.from_pretrained(output).config.num_hidden_layers == 4
    assert {one.name for one in tmp_path.iterdir()} == {"text.txt", "out"}


def test_pruning_with_healing_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_data(8, 16)
    pruned = prune(Loaded(tiny_of("llama", 6), None, "tiny"), method="shortgpt", budget="layers=0.8", data=data)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="U676"):
        prune_and_heal(pruned, "lora", tokens=32, data=data, length=16)


@pytest.mark.parametrize("verb", ["prune", "compare"])
def test_it_is_refused_before_anything_is_loaded(
    verb: str,
    folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = {
        "prune": ("--drop", "1", "--heal", "lora", "--tokens", "64", "--output", str(tmp_path / "out")),
        "compare": ("--output", str(tmp_path / "out"), "-m", "shortgpt", "-b", "layers=0.8", "--heal", "lora"),
    }
    more = ("--tokens", "64") if verb == "compare" else ()
    said = shoal(verb, str(folder), *words[verb], *more, code=1)
    assert "U676" in said
    assert not (tmp_path / "out").exists()


def test_one_process_needs_no_group() -> None:
    alone = Processes.join()
    assert alone == Processes() and alone.first
    assert alone.any(True, False) == (True, False)
    assert alone.told(lambda: 3) == 3
    assert alone.summed(0.5) == 0.5
    alone.wait()
    Processes.leave()
