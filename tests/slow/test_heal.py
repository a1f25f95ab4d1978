"""A healing run that is killed, in processes of its own."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

RESUMED = """
import sys, json, os, signal
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import torch
torch.set_num_threads(1)
from tests.contract.healing import *
from shoal.healing.stage import Settings
from shoal.healing.train import Run, train
from shoal.healing.windows import part
from safetensors.torch import save_file
folder, kill = Path(sys.argv[1]), int(sys.argv[2])
texts = part(random_data(14, 12), 2)
def tell(entry, step, of):
    if kill and step == kill and "loss" in entry:
        os.kill(os.getpid(), signal.SIGKILL)
with learner_of(deep(), "logit-kd", "cross-entropy", learn=("lora:rank=4,dropout=0.2", "near:rate=1e-3")) as learner:
    found = train(learner, (texts.train, texts.held), Settings(rate=1e-2, evaluations=3), 12, Run(batch=2, accumulate=2,
        save_every=0), folder=folder / "run", keep=True, causal=True, tell=tell, resume=True)
    save_file(learner.copies(), folder / "end.safetensors")
    (folder / "curve.json").write_text(json.dumps(found.curve))
"""


def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """Dropout in the adapters, two learners with rates of their own, accumulation, evaluations on the way."""
    step = random.Random().randrange(2, 12)

    def run(name: str, kill: int) -> int:
        (tmp_path / name).mkdir(exist_ok=True)
        words = [sys.executable, "-c", RESUMED, str(tmp_path / name), str(kill), str(Path(__file__).parents[2])]
        return subprocess.Popen(words).wait(120)

    assert run("whole", 0) == 0
    assert run("killed", step) == -9
    assert not (tmp_path / "killed" / "end.safetensors").exists()
    assert run("killed", 0) == 0
    for file in ("end.safetensors", "curve.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes(), (file, step)
    saved = tmp_path / "whole" / "run" / "checkpoint-12"
    assert {one.name for one in saved.iterdir()} >= {"learnt.safetensors", "trainer_state.json"}
    curve = json.loads((tmp_path / "whole" / "curve.json").read_text())
    assert [entry["step"] for entry in curve if "held_loss" in entry] == [0, 4, 8, 12]
