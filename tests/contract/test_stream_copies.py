"""How a stream copies bytes, compares them again, and what becomes of a copy that fails."""

from __future__ import annotations

import json
import os
import struct
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import ModelError, WriteError
from shoal.models.shards import Stored, stored_tensors
from shoal.writing import container, copy_check
from shoal.writing import stream as stream_module
from shoal.writing.copy_check import same_bytes

from .stream_folders import bases, content, streamed

__all__ = ["bases"]


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
    true = copy_check.copy_checks

    def spoiled(folder: Path, *rest: Any, **more: Any) -> Any:
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
        return true(folder, *rest, **more)

    monkeypatch.setattr(stream_module, "copy_checks", spoiled)
    with pytest.raises(WriteError, match=r"W230.*weights: 2.*up_proj"):
        streamed(bases("llama"), "0,2-3", tmp_path / "out", shard_size="5GB")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("zero_parts", [False, True])
def test_a_wrong_copy_fails_the_proof(
    zero_parts: bool, bases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, spoilt = copy_check.CopyCheck.add, list[str]()

    def spoiled(self: Any, item: Any, copy: Stored) -> None:
        if not spoilt and item.zero == zero_parts and "mlp" in item.name:
            spoilt.append(item.name)
            with copy.file.open("r+b") as file:
                file.seek(copy.start + copy.size - 1)
                file.write(b"\x99")
        true(self, item, copy)

    monkeypatch.setattr(copy_check.CopyCheck, "add", spoiled)
    with pytest.raises(WriteError, match=r"W230.*weights: 1.*mlp"):
        streamed(bases("llama"), "0,1a,3", tmp_path / "out", zero_parts=True)
    assert len(spoilt) == 1
    assert list(tmp_path.iterdir()) == []


def test_bytes_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy_check, "_BUFFER", 64)
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
    pairs = copy_check.CopyCheck()
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


def test_a_source_that_shrinks_is_named(bases: Any, tmp_path: Path) -> None:
    file = tmp_path / "short"
    file.write_bytes(b"abc")
    item = container.Item("x", Stored(file, "U8", (9,), 0, 9))
    with pytest.raises(ModelError, match="M309"):
        container.write_shards(tmp_path, [item], 100, lambda _: None)
