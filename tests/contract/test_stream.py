"""A plan applied file to file: the same checkpoint as a write through memory, and bad folders refused whole."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from shoal.cli import app
from shoal.errors import ModelError, PlanError, ShoalError, UsageError, WriteError
from shoal.models.inspect import inspect
from shoal.models.load import inspect_source, load
from shoal.models.shards import INDEX, Stored, stored_tensors
from shoal.plan import Plan, load_plan, parse_plan
from shoal.writing import container, twins
from shoal.writing import stream as stream_module
from shoal.writing.container import parse_size
from shoal.writing.folder import write
from shoal.writing.stream import Streamed, stream
from shoal.writing.twins import same_bytes

from .families import tiny

PLANS = ("0,2-3", "1-3", "0,1x2,3")
SAME_FILES = ("llama", "gpt2", "qwen3", "gemma3_text", "bloom", "falcon", "opt", "mamba2")
CONVERTED = ("mixtral", "qwen2_moe")
"""transformers merges their experts when it loads; files keep them apart."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny model, in several shards."""
    root = tmp_path_factory.mktemp("bases")

    def base(family: str) -> Path:
        folder = root / family
        if not folder.exists():
            model = tiny(family, "eager" if family in ("bloom", "mamba2") else "sdpa")
            model.save_pretrained(folder, max_shard_size="20KB")
        return folder

    return base


def plan_of(folder: Path, text: str) -> Plan:
    return parse_plan(text, Plan.identity(inspect_source(folder)))


def streamed(folder: Path, text: str, output: Path, **options: Any) -> Streamed:
    return stream(folder, plan_of(folder, text), output, **({"shard_size": "20KB"} | options))


def written(folder: Path, text: str, output: Path, **options: Any) -> Path:
    loaded = load(folder, device="cpu")
    return write(loaded, parse_plan(text, Plan.identity(inspect(loaded.model))), output, prove=False, **options).folder


def content(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (s.dtype, s.shape, bytes_of(s)) for name, s in stored_tensors(folder).items()}


def bytes_of(stored: Stored) -> bytes:
    with stored.file.open("rb") as file:
        file.seek(stored.start)
        return file.read(stored.size)


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load(folder, device="cpu").model.state_dict()


@pytest.mark.parametrize("family", SAME_FILES)
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
    text, base = "0,1a,2m,3", bases("llama")
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


def test_without_the_system_s_copy(bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(*_: Any) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", elsewhere, raising=False)
    monkeypatch.setattr(container, "_BUFFER", 1000)
    streamed(bases("llama"), "0,2-3", tmp_path / "one")
    monkeypatch.delattr(os, "copy_file_range")
    streamed(bases("llama"), "0,2-3", tmp_path / "two")
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_a_header_that_names_another_place_fails_the_proof(
    bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = twins.compared

    def spoiled(folder: Path, *rest: Any) -> Any:
        first, second = (stored_tensors(folder)[f"model.layers.{n}.mlp.up_proj.weight"] for n in (0, 1))
        data = first.file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        one, two = (header[f"model.layers.{n}.mlp.up_proj.weight"] for n in (0, 1))
        one["data_offsets"], two["data_offsets"] = two["data_offsets"], one["data_offsets"]
        text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
        assert (len(text), first.file) == (length, second.file)
        with first.file.open("r+b") as file:  # the header alone: what was copied is still being compared
            file.write(data[:8] + text)
        return true(folder, *rest)

    monkeypatch.setattr(stream_module, "compared", spoiled)
    with pytest.raises(WriteError, match=r"W230.*weights: 2.*up_proj"):
        streamed(bases("llama"), "0,2-3", tmp_path / "out", shard_size="5GB")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("zero_parts", [False, True])
def test_a_wrong_copy_fails_the_proof(
    zero_parts: bool, bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, spoilt = twins.Twins.add, list[str]()

    def spoiled(self: Any, item: Any, copy: Stored) -> None:
        if not spoilt and item.zero == zero_parts and "mlp" in item.name:
            spoilt.append(item.name)
            with copy.file.open("r+b") as file:
                file.seek(copy.start + copy.size - 1)
                file.write(b"\x99")
        true(self, item, copy)

    monkeypatch.setattr(twins.Twins, "add", spoiled)
    with pytest.raises(WriteError, match=r"W230.*weights: 1.*mlp"):
        streamed(bases("llama"), "0,1a,3", tmp_path / "out", zero_parts=True)
    assert len(spoilt) == 1
    assert list(tmp_path.iterdir()) == []


def test_bytes_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twins, "_BUFFER", 64)
    data = bytes(range(1, 201))
    (tmp_path / "one").write_bytes(b"head" + data)
    one = Stored(tmp_path / "one", "U8", (200,), 4, 200)
    for at in (None, 0, 63, 64, 127, 192, 199):
        changed = bytearray(data)
        if at is not None:
            changed[at] ^= 1
        (tmp_path / "two").write_bytes(bytes(changed))
        assert same_bytes(one, replace(one, file=tmp_path / "two", start=0)) == (at is None)
    (tmp_path / "zeros").write_bytes(bytes(200))
    assert same_bytes(replace(one, file=tmp_path / "zeros", start=0), None)
    (tmp_path / "zeros").write_bytes(bytes(199) + b"\x01")
    assert not same_bytes(replace(one, file=tmp_path / "zeros", start=0), None)
    (tmp_path / "two").write_bytes(data[:-1])  # ends too early
    assert not same_bytes(one, replace(one, file=tmp_path / "two", start=0))
    assert not same_bytes(one, replace(one, size=199))


def test_a_place_that_was_not_compared_is_not_the_same(bases: Any) -> None:
    first, second = list(stored_tensors(bases("llama")).values())[:2]
    pairs = twins.Twins()
    pairs.add(container.Item("a", first), first)
    assert pairs.same(container.Item("b", first), first)
    for item, place in (
        (container.Item("a", second), second),
        (container.Item("a", first), second),
        (container.Item("a", first, zero=True), first),
    ):
        assert not pairs.same(item, place)


def test_a_failure_stops_the_other_threads(bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [container.Item(name, place) for name, place in stored_tensors(bases("llama")).items()]
    seen: list[str] = []

    def fails(item: Any, place: Stored) -> None:
        seen.append(item.name)
        if len(seen) == 1:
            raise OSError(5, "Input/output error")
        time.sleep(0.1)  # all others together would take seconds

    monkeypatch.setattr(container, "THREADS", 2)
    with pytest.raises(OSError, match="Input/output error"):
        container.write_shards(tmp_path, items, 10**9, lambda _: None, copied=fails)
    assert len(seen) < len(items)


def test_files_reach_the_disk_while_they_grow(bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [container.Item(name, place) for name, place in stored_tensors(bases("llama")).items()]
    done, at = [0], list[int]()
    monkeypatch.setattr(container, "_SETTLE", 20_000)
    container.write_shards(
        tmp_path, items, 10**9, lambda size: done.append(done[-1] + size), settle=lambda _: at.append(done[-1])
    )
    assert len(at) > 3
    assert all(later - earlier >= 20_000 for earlier, later in pairwise(at[:-1]))
    assert at[-1] == done[-1] == sum(item.source.size for item in items)


def test_a_file_that_does_not_reach_the_disk(bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(stream_module, "sync_path", fails)
    with pytest.raises(WriteError, match="Input/output error"):
        streamed(bases("llama"), "0,2-3", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def edit_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The header of the shard of one known tensor, changed as JSON or as text."""
    file = stored_tensors(folder)[UP].file
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    made = change(header)
    text = (made if isinstance(made, str) else json.dumps(header)).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def rename(folder: Path, new: str) -> None:
    edit_header(folder, lambda h: h.update({new: h.pop(UP)}))
    edit_index(folder, lambda m: m.update({new: m.pop(UP)}))


def link_away(folder: Path) -> None:
    file = stored_tensors(folder)[UP].file
    away = folder.parent / "away.safetensors"
    shutil.move(file, away)
    file.symlink_to(away)


def cut(folder: Path) -> None:
    file = stored_tensors(folder)[UP].file
    file.write_bytes(file.read_bytes()[:-8])


def twice(folder: Path) -> None:
    place = stored_tensors(folder)[UP]
    other = next(s.file for s in stored_tensors(folder).values() if s.file != place.file)
    save_file(load_file(other) | {UP: torch.zeros(64, 32)}, other, metadata={"format": "pt"})


def reshape(folder: Path) -> None:
    edit_header(folder, lambda h: h[UP].update(shape=h[UP]["shape"][::-1]))


UP = "model.layers.1.mlp.up_proj.weight"
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard cut short": (cut, "M309"),
    "a missing shard": (lambda d: stored_tensors(d)[UP].file.unlink(), "M309"),
    "an index that names a missing tensor": (lambda d: edit_index(d, lambda m: m.update(x=m[UP])), "M309"),
    "an index that names another file": (
        lambda d: edit_index(d, lambda m: m.update({UP: next(f for f in m.values() if f != m[UP])})),
        "M309",
    ),
    "an index that leaves the folder": (lambda d: edit_index(d, lambda m: m.update({UP: "../x.safetensors"})), "M309"),
    "an absolute path": (lambda d: edit_index(d, lambda m: m.update({UP: "/etc/passwd"})), "M309"),
    "an index without a map": (lambda d: (d / INDEX).write_text("{}"), "M309"),
    "an index of brackets": (lambda d: (d / INDEX).write_text("[" * 1_000_000), "M302"),
    "a link out of the folder": (link_away, "M309"),
    "a tensor in two files": (twice, "M309"),
    "a header of brackets": (lambda d: edit_header(d, lambda _: "[" * 100_000), "M309"),
    "a header with a tensor twice": (
        lambda d: edit_header(d, lambda h: json.dumps(h)[:-1] + f', "{UP}": {json.dumps(h[UP])}}}'),
        "M309",
    ),
    "overlapping tensors": (
        lambda d: edit_header(d, lambda h: h[UP].update(data_offsets=[0, 8192]) or h.update(z=h[UP])),
        "M309",
    ),
    "a wrong size": (lambda d: edit_header(d, lambda h: h[UP].update(shape=[1, 1])), "M309"),
    "a negative size": (lambda d: edit_header(d, lambda h: h[UP].update(shape=[-64, -32])), "M309"),
    "a shape that is turned": (reshape, "W218"),
    "a tensor of no part": (lambda d: rename(d, "model.layers.1.mlp.mystery.weight"), "W217"),
    "a tensor of a layer too many": (lambda d: rename(d, "model.layers.9.mlp.up_proj.weight"), "W217"),
    "a layer too many in the config": (lambda d: set_config(d, num_hidden_layers=5), "M310"),
    "a quantised model": (lambda d: set_config(d, quantization_config={"quant_method": "gptq", "bits": 4}), "W212"),
    "code of its own": (
        lambda d: set_config(d, model_type="evil", auto_map={"AutoConfig": "evil.Config"}),
        "M312",
    ),
    "another kind of model": (lambda d: (d / "config.json").write_text('{"model_type": "vit"}'), "W217"),
    "no config": (lambda d: (d / "config.json").unlink(), "M302"),
}


def set_config(folder: Path, **fields: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config_of(folder) | fields))


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_refused_whole(name: str, bases: Any, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(bases("llama"), base)
    plan = plan_of(base, "0,2-3")
    change, code = BAD[name]
    change(base)
    with pytest.raises(ShoalError) as caught:
        stream(base, plan, out / "model")
    assert caught.value.code == code, caught.value
    assert len(str(caught.value).splitlines()) == 1
    assert not out.exists()


def test_links_of_the_hub_s_cache_are_followed(bases: Any, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    shutil.copytree(bases("llama"), blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    made = streamed(snapshot, "0,2-3", tmp_path / "out")
    assert not any(path.is_symlink() for path in made.folder.rglob("*"))
    assert (made.folder / "generation_config.json").exists()


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


def test_a_source_that_shrinks_is_named(bases: Any, tmp_path: Path) -> None:
    file = tmp_path / "short"
    file.write_bytes(b"abc")
    item = container.Item("x", Stored(file, "U8", (9,), 0, 9))
    with pytest.raises(ModelError, match="M309"):
        container.write_shards(tmp_path, [item], 100, lambda _: None)
