"""A .gguf file pruned to another: blocks, per-layer arrays, lineage, damaged files, refused places."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_files import raw_file
from shoal.errors import ModelError, PlanError, ShoalError, WriteError
from shoal.models.gguf_source import open_source, spec_of
from shoal.plan import Plan, save_plan
from shoal.writing.gguf_out import published
from shoal.writing.gguf_out.copied import copied_manifest
from shoal.writing.gguf_out.write import copy_file, plan_for
from shoal.writing.output import refuse_output

from .gguf_contents import contents, refused, tensors

ARRAYS: dict[str, list[Any]] = {
    "attention.head_count": [1, 2, 3, 4, 5, 6],
    "attention.head_count_kv": [6, 5, 4, 3, 2, 1],
    "feed_forward_length": [10, 20, 30, 40, 50, 60],
    "attention.sliding_window_pattern": [True, True, False, True, False, False],
    "rope.dimension_sections": [1, 1, 2, 2, 3, 3],
}


def plan_on(file: Path, text: str) -> Plan:
    return plan_for(open_source(file), text, str(file))[0]


@settings(max_examples=6)
@given(slots=st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_blocks_and_per_layer_arrays_follow_any_order(
    slots: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("order")
    base, out = raw_file(place / "base.gguf", arrays=ARRAYS), place / "out.gguf"
    written = copy_file(open_source(base), plan_on(base, ",".join(map(str, slots))), out)
    before, after = tensors(base), tensors(out)
    assert after.keys() == {
        "token_embd.weight",
        "output_norm.weight",
        *(f"blk.{slot}.{name}.weight" for slot in range(len(slots)) for name in ("attn_q", "attn_norm")),
    }
    for slot, layer in enumerate(slots):
        for name in ("attn_q", "attn_norm"):
            assert after[f"blk.{slot}.{name}.weight"] == before[f"blk.{layer}.{name}.weight"]
    assert after["token_embd.weight"] == before["token_embd.weight"]
    assert contents(out, "openelm.block_count") == len(slots)
    for key, values in ARRAYS.items():
        whole = key == "rope.dimension_sections"
        assert contents(out, f"openelm.{key}") == (values if whole else [values[i] for i in slots])
    assert contents(out, "general.tags") == ["tiny"] * 6
    assert contents(out, "shoal.base_layers") == list(slots) == list(written.base_layers)
    assert written.proof.passed
    assert written.bytes == out.stat().st_size


def test_lineage_is_composed_over_repeated_pruning(tmp_path: Path) -> None:
    base = raw_file(tmp_path / "base.gguf", arrays=ARRAYS)
    told: list[tuple[int, int, str]] = []
    copy_file(
        open_source(base),
        plan_on(base, "1,3,5,5"),
        tmp_path / "one.gguf",
        progress=lambda done, total, stage: told.append((done, total, stage)),
    )
    assert {stage for _, _, stage in told} == {"write tensors (MB)", "compare tensors (MB)"}
    one = tmp_path / "one.gguf"
    copy_file(open_source(one), plan_on(one, "0,2-3"), tmp_path / "two.gguf")
    two = tmp_path / "two.gguf"
    assert contents(two, "shoal.base_layers") == [1, 5, 5]
    assert contents(two, "shoal.plan") == "1,5x2"
    assert json.loads(contents(two, "shoal.base")) == json.loads(contents(one, "shoal.base"))
    assert json.loads(contents(one, "shoal.base"))["source"] == "base.gguf"
    assert contents(two, "openelm.feed_forward_length") == [20, 60, 60]


def test_a_type_converts_matrices_and_leaves_vectors(tmp_path: Path) -> None:
    base, out = raw_file(tmp_path / "base.gguf"), tmp_path / "out.gguf"
    copy_file(open_source(base), plan_on(base, "0-3"), out, outtype="f16")
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(out).tensors}
    assert kinds["blk.3.attn_q.weight"] == kinds["token_embd.weight"] == "F16"
    assert kinds["blk.3.attn_norm.weight"] == "F32"
    assert contents(out, "general.file_type") == 1


def test_sliding_layers_are_listed_when_the_rule_would_give_another_kind(tmp_path: Path) -> None:
    base = raw_file(tmp_path / "base.gguf", "gemma3", numbers={"attention.sliding_window": 8})
    key = "gemma3.attention.sliding_window_pattern"
    copy_file(open_source(base), plan_on(base, "0-3"), tmp_path / "prefix.gguf")
    assert key not in GGUFReader(tmp_path / "prefix.gguf").fields  # layers 0-3 slide where the rule says so
    copy_file(open_source(base), plan_on(base, "0,3-5"), tmp_path / "moved.gguf")
    assert contents(tmp_path / "moved.gguf", key) == [True, True, True, False]
    stated = raw_file(
        tmp_path / "stated.gguf",
        "gemma3",
        numbers={"attention.sliding_window": 8, "attention.sliding_window_pattern": 2},
    )
    copy_file(open_source(stated), plan_on(stated, "0,2,1"), tmp_path / "every.gguf")
    assert contents(tmp_path / "every.gguf", key) == [True, True, False]


def test_files_that_are_no_whole_model_are_refused(tmp_path: Path) -> None:
    short = raw_file(tmp_path / "short.gguf", stated=7)
    assert "7 layers" in refused("W260", lambda: open_source(short))
    split = GGUFWriter(None, "llama")
    split.add_uint16("split.count", 3)
    for step in ("header_to_file", "kv_data_to_file", "ti_data_to_file"):
        getattr(split, f"write_{step}")(*([tmp_path / "split.gguf"] if step == "header_to_file" else []))
    split.close()
    refused("W260", lambda: open_source(tmp_path / "split.gguf"))
    refused("M307", lambda: open_source(tmp_path / "none.gguf"))
    whole = short.read_bytes()
    for name, data in {"empty": b"", "text": b"hello, this is text", "cut": whole[:200], "end": whole[:-40]}.items():
        (tmp_path / f"{name}.gguf").write_bytes(data)
        refused("M315", lambda name=name: open_source(tmp_path / f"{name}.gguf"))  # type: ignore[misc]


@settings(max_examples=40)
@given(data=st.data())
def test_damaged_headers_end_in_a_documented_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("damaged")
    whole = bytearray(raw_file(place / "base.gguf", "llama", 2).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, 700))] = data.draw(st.integers(0, 255))
    (place / "bad.gguf").write_bytes(bytes(whole))
    try:
        source = open_source(place / "bad.gguf")
        copied_manifest(source, plan_for(source, "0", "bad")[0])
    except ShoalError:
        pass


def test_places_that_llama_cpp_counts_are_refused(tmp_path: Path) -> None:
    def draw(base: Path, text: str) -> Callable[[], object]:
        return lambda: copied_manifest(open_source(base), plan_on(base, text))

    assert "unknown-arch" in refused("W262", draw(raw_file(tmp_path / "a.gguf", "unknown-arch"), "0-3"))
    draw(tmp_path / "a.gguf", "0-5")()  # a copy moves nothing
    counted = raw_file(tmp_path / "b.gguf", "qwen3moe", numbers={"leading_dense_block_count": 1})
    assert "leading_dense_block_count = 1" in refused("W262", draw(counted, "1-5"))
    scaled = raw_file(tmp_path / "c.gguf", "gemma2", 46)
    refused("W263", draw(scaled, "0-40"))
    refused("W263", draw(raw_file(tmp_path / "d.gguf", "gemma3", 63), "0-61"))
    refused("P105", draw(raw_file(tmp_path / "e.gguf"), "0-3,4a"))
    refused("W261", draw(tmp_path / "e.gguf", "0-2,(3|4),5"))
    refused("P103", draw(tmp_path / "e.gguf", "0-6"))


def test_the_output_is_not_taken_from_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = raw_file(tmp_path / "base.gguf")
    plan, source = plan_on(base, "0-3"), open_source(base)
    refused("W225", lambda: refuse_output(tmp_path / "folder.gguf"))
    refused("W221", lambda: copy_file(source, plan, base, overwrite=True))
    refused("W222", lambda: copy_file(source, plan, tmp_path / "no" / "out.gguf"))
    out = tmp_path / "out.gguf"
    out.write_text("my notes")
    refused("W220", lambda: copy_file(source, plan, out))
    refused("W225", lambda: copy_file(source, plan, out, overwrite=True))
    out.unlink()
    copy_file(source, plan, out)
    before = out.read_bytes()
    monkeypatch.setattr(published, "digest", lambda data: "another")
    assert "weights" in refused("W230", lambda: copy_file(source, plan_on(base, "0-1"), out, overwrite=True))
    monkeypatch.undo()
    monkeypatch.setattr(published, "require_space", lambda *_: None)
    monkeypatch.setattr(published, "write_file", _full)
    refused("W223", lambda: copy_file(source, plan, out, overwrite=True))
    assert out.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.gguf", "out.gguf"]


def _full(file: Path, *_: object) -> dict[str, str]:
    file.write_bytes(b"GGUF")
    raise OSError(28, "No space left on device")


def test_a_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    base, other = raw_file(tmp_path / "a.gguf", depth=5), raw_file(tmp_path / "b.gguf")
    save_plan(Plan.identity(spec_of(open_source(base))), tmp_path / "plan.json")
    with pytest.raises(PlanError, match="another model"):
        plan_for(open_source(other), str(tmp_path / "plan.json"), "b")
    (tmp_path / "same").mkdir()
    alike = raw_file(tmp_path / "same" / "c.gguf", "qwen3")
    save_plan(Plan.identity(spec_of(open_source(alike))), tmp_path / "plan.json")
    with pytest.raises(ModelError):  # transformers is asked what the file is, and cannot read it
        plan_for(open_source(other), str(tmp_path / "plan.json"), "b")


def test_types_of_blocks_that_cannot_be_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shoal.writing.gguf_out import copied

    def unknown(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(copied, "decoded", unknown)
    base = raw_file(tmp_path / "base.gguf")
    with pytest.raises(WriteError, match="Q8_0"):
        copy_file(open_source(base), plan_on(base, "0-3"), tmp_path / "x.gguf", outtype="f32")
    assert [p.name for p in tmp_path.iterdir()] == ["base.gguf"]
