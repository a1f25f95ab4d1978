"""Full memory, while a model is read and while a verb works, is one sentence that says what may help, and no output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from shoal.cli._errors import TRACEBACK

from .test_api import model_folder
from .verbs import COMMANDS, run, typed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


VERBS = {"measure", "prune", "fuse", "heal", "compare", "evaluate", "bench", "generate", "fit-exits", "calibrate",
         "tune-draft", "write"}  # fmt: skip
OTHER = {"--stream", "--dry-run", "OUT.gguf", "--graph", "--cascade"}
LOADS = [verb for verb, words in COMMANDS.items() if words[0] in VERBS and not OTHER & set(words)]


@pytest.mark.parametrize("while_it", ["loads", "works"])
@pytest.mark.parametrize("verb", LOADS)
def test_full_memory_is_one_sentence_and_leaves_nothing(
    verb: str, while_it: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TRACEBACK, raising=False)
    (tmp_path / "data.txt").write_text("the cat sat on the mat and ran away. " * 60)
    (tmp_path / "prompts.txt").write_text("abc\nthe cat\n")
    names = {"MODEL": str(folder), "DATA": str(tmp_path / "data.txt"), "PLAN": "0-1,3", "OUT": str(tmp_path / "out"),
             "PROMPTS": str(tmp_path / "prompts.txt")}  # fmt: skip
    if while_it == "loads":
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: torch.empty(1 << 60))
    else:
        forward = LlamaMLP.forward

        def full(self: Any, x: torch.Tensor) -> torch.Tensor:
            # more than the one token by which Shoal finds out what layers do
            return forward(self, x) if x.shape[1] == 1 else torch.empty(1 << 60)

        monkeypatch.setattr(LlamaMLP, "forward", full)
    done = run(typed(verb, names))
    if while_it == "works" and done.exit_code == 0:
        assert verb in ("prune", "fuse grow", "write"), verb  # these need no forward of many tokens
        return
    assert done.exit_code == 1, done.output
    assert "--stream" in done.output or "memory is too small for 1 windows" in done.output
    assert not (tmp_path / "out").exists() or verb == "compare"
