"""A streamed write against a write: the same folder, the same refusals, the same commands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from shoal.cli import app
from shoal.errors import ModelError, PlanError, UsageError, WriteError
from shoal.models.shards import INDEX, stored_tensors
from shoal.plan import load_plan
from shoal.writing import stream as stream_module
from shoal.writing.container import parse_size
from shoal.writing.stream import stream

from .shares import every
from .stream_folders import bases, config_of, content, plan_of, streamed, weights, written

__all__ = ["bases"]

PLANS = ("0,2-3", "1-3", "0,1x2,3")
SAME_FILES = ("llama", "gpt2", "qwen3", "gemma3_text", "bloom", "falcon", "opt", "mamba2")
CONVERTED = ("mixtral", "qwen2_moe")
"""transformers merges their experts when it loads; files keep them apart."""


@pytest.mark.parametrize("family", every(3, SAME_FILES))
def test_a_stream_is_a_write(family: str, bases: Any, tmp_path: Path) -> None:
    base = bases(family)
    for number, text in enumerate((*PLANS, *(() if family == "gemma3_text" else ("0,2,1,3",)))):
        ours, theirs = tmp_path / f"stream{number}", tmp_path / f"write{number}"
        made = streamed(base, text, ours)
        written(base, text, theirs)
        assert made.proof.passed
        assert made.files > 3
        assert content(ours) == content(theirs)
        assert config_of(ours) == config_of(theirs)
        assert load_plan(ours) == load_plan(theirs)
        assert (ours / "generation_config.json").exists()


@pytest.mark.parametrize("family", CONVERTED)
def test_converted_files_keep_their_format(family: str, bases: Any, tmp_path: Path) -> None:
    base = bases(family)
    for number, text in enumerate(("0,2-3", "0,2x2,3")):
        ours, theirs = tmp_path / f"stream{number}", tmp_path / f"write{number}"
        streamed(base, text, ours)
        written(base, text, theirs)
        assert config_of(ours) == config_of(theirs)
        a, b = weights(ours), weights(theirs)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert any(".experts.0." in name for name in stored_tensors(ours)) == any(
            ".experts.0." in name for name in stored_tensors(base)
        )


def test_zero_parts(bases: Any, tmp_path: Path) -> None:
    text, base = "0,2m,1a,3", bases("llama")
    with pytest.raises(WriteError, match="W201"):
        streamed(base, text, tmp_path / "refused")
    assert streamed(base, text, tmp_path / "a", zero_parts=True).proof.passed
    written(base, text, tmp_path / "b", zero_parts=True)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert config_of(tmp_path / "a") == config_of(tmp_path / "b")
    streamed(bases("mixtral"), text, tmp_path / "c", zero_parts=True)
    assert not weights(tmp_path / "c")["model.layers.1.mlp.experts.down_proj"].any()


def test_the_dtype_is_kept(bases: Any, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(bases("llama"), dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    mixed = load_file(file)
    mixed["model.norm.weight"] = mixed["model.norm.weight"].float()
    save_file(mixed, file, metadata={"format": "pt"})
    made = streamed(tmp_path / "base", "0,3", tmp_path / "out")
    kinds = {name: s.dtype for name, s in stored_tensors(made.folder).items()}
    assert kinds.pop("model.norm.weight") == "F32"
    assert set(kinds.values()) == {"BF16"}
    assert config_of(made.folder)["dtype"] == "bfloat16"


def test_names_without_the_prefix_and_a_tied_head(bases: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases("gpt2"), base)
    for file in base.glob("*.safetensors"):
        tensors = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    index = json.loads((base / INDEX).read_text())
    index["weight_map"] = {name.removeprefix("transformer."): f for name, f in index["weight_map"].items()}
    (base / INDEX).write_text(json.dumps(index))
    streamed(base, "3,0", tmp_path / "out")
    assert "h.1.attn.c_attn.weight" in stored_tensors(tmp_path / "out")
    got, had = weights(tmp_path / "out"), weights(base)
    assert torch.equal(got["transformer.h.0.mlp.c_fc.weight"], had["transformer.h.3.mlp.c_fc.weight"])
    assert torch.equal(got["lm_head.weight"], got["transformer.wte.weight"])


def test_lineage_papers_and_the_next_prune(bases: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases("llama"), base)
    (base / "LICENSE").write_text("MIT License")
    (base / "modeling_evil.py").write_text("raise SystemExit")
    streamed(base, "0,2-3", tmp_path / "one", records=[{"a": 1}], config="verb: write\n")
    made = streamed(tmp_path / "one", "1-2", tmp_path / "two")
    assert AutoConfig.from_pretrained(made.folder).shoal["base_layers"] == [2, 3]
    names = {p.name for p in (tmp_path / "one").iterdir()} | {p.name for p in (tmp_path / "one" / "shoal").iterdir()}
    assert {"LICENSE", "README.md", "plan.json", "proof.json", "records.jsonl", "config.yaml"} <= names
    assert "modeling_evil.py" not in names
    card = (tmp_path / "one" / "README.md").read_text()
    assert "byte by byte" in card
    assert "None" not in card


def test_the_forward_check(bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = streamed(bases("llama"), "0,2-3", tmp_path / "out", forward=True)
    names = {check.name for check in made.proof.checks}
    assert {"tensors", "dtypes and shapes", "logits uncached", "greedy tokens"} <= names
    monkeypatch.setattr(stream_module, "_free_memory", lambda: 1000)
    with pytest.raises(WriteError, match="W219"):
        streamed(bases("llama"), "0,2-3", tmp_path / "two", forward=True)


def test_progress_and_one_large_file(bases: Any, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    made = streamed(
        bases("llama"), "0,2-3", tmp_path / "out", shard_size="5GB", progress=lambda *args: seen.append(args)
    )
    assert made.files == 1
    assert not (made.folder / INDEX).exists()
    assert {stage for _, _, stage in seen} == {"copy and compare tensors (MB)"}
    assert made.bytes == sum(s.size for s in stored_tensors(made.folder).values())


def test_sizes() -> None:
    assert [parse_size(t) for t in ("5GB", "20kb", "1.5 MiB", "7")] == [5 * 10**9, 20_000, 1_572_864, 7]
    for text in ("", "GB", "-1GB", "0", "5XB", "1e9"):
        with pytest.raises(UsageError, match="U524"):
            parse_size(text)


def test_refused_outputs_and_plans(bases: Any, tmp_path: Path) -> None:
    base = bases("llama")
    with pytest.raises(WriteError, match="W221"):
        streamed(base, "0,2-3", base / "inside")
    with pytest.raises(WriteError, match="W222"):
        streamed(base, "0,2-3", tmp_path / "no" / "parent")
    with pytest.raises(PlanError, match="P1"):
        stream(base, plan_of(bases("qwen3"), "0,2-3"), tmp_path / "out")
    with pytest.raises(ModelError, match="M317"):
        stream("owner/name", plan_of(base, "0,2-3"), tmp_path / "out")
    streamed(base, "0,2-3", tmp_path / "out")
    with pytest.raises(WriteError, match="W220"):
        streamed(base, "0,3", tmp_path / "out")
    streamed(base, "0,3", tmp_path / "out", overwrite=True)
    assert str(load_plan(tmp_path / "out")) == "0,3"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL; runs on Linux and macOS")
def test_a_kill_leaves_the_old_folder(bases: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    streamed(bases("llama"), "0,2-3", out)
    script = textwrap.dedent(
        """
        import os, signal, sys
        from shoal.models.load import inspect_source
        from shoal.plan import Plan, parse_plan
        from shoal.writing.stream import stream

        def kill(done, total, stage):
            seen.append(stage)
            if len(seen) == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        seen, (base, out) = [], sys.argv[1:]
        stream(base, parse_plan("0,3", Plan.identity(inspect_source(base))), out, overwrite=True, progress=kill)
        """
    )
    environment = os.environ | {"PYTHONPATH": str(Path(stream_module.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(bases("llama")), str(out)], env=environment, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert str(load_plan(out)) == "0,2-3"
    assert len(list(tmp_path.glob(".out.shoal-*"))) == 1
    streamed(bases("llama"), "0,3", out, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_command_line(bases: Any, tmp_path: Path) -> None:
    base, out = str(bases("llama")), tmp_path / "out"

    def shoal(*words: str) -> Any:
        return CliRunner().invoke(app, ["write", base, "--plan", "0,2-3", *words], prog_name="shoal")

    result = shoal("--output", str(out), "--stream", "--shard-size", "30KB", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["proof"]["passed"] is True
    assert json.loads((out / "shoal" / "records.jsonl").read_text())["what"] == "write"
    assert "stream: true" in (out / "shoal" / "config.yaml").read_text()
    for words in (("--stream", "--dtype", "float16"), ("--forward",)):
        result = shoal("--output", str(tmp_path / "no"), *words)
        assert result.exit_code == 1
        assert "U525" in result.stderr
