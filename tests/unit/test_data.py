"""Data: what is read, how it is cut, how it is described, and what each mistake is told."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, trainers

from shoal.data import Data, DataInfo, load_data
from shoal.data.builtin import SPLITS, builtin_text, split_topics
from shoal.errors import DataError


class Characters:
    """One token a character; counts what it was asked to read."""

    bos_token_id: int | None = 1

    def __init__(self) -> None:
        self.longest = 0

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        assert not verbose
        self.longest = max(self.longest, len(text))
        return {"input_ids": [ord(c) for c in text]}


class Merging:
    """A byte pair encoding without any pre-tokenizer: merges cross spaces and lines."""

    bos_token_id = None

    def __init__(self, text: str) -> None:
        self.model = Tokenizer(models.BPE())
        self.model.train_from_iterator([text[:4000]], trainers.BpeTrainer(vocab_size=400, show_progress=False))

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": self.model.encode(text).ids}


def text_of(data: Data) -> list[str]:
    return ["".join(map(chr, row)) for row in data.ids.tolist()]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_windows_follow_each_other_and_the_last_incomplete_one_is_left_out(tmp_path: Path) -> None:
    data = load_data(write(tmp_path / "a.txt", "abcdefghijk"), Characters(), length=4)
    assert text_of(data) == ["abcd", "efgh"]
    assert data.mask is None
    assert len(data) == 2
    expected = hashlib.sha256(struct.pack("<8q", *map(ord, "abcdefgh"))).hexdigest()
    assert data.info == DataInfo("a.txt", "calibrate", 4, 2, 4, "none", 8, expected)


def test_limit_stride_and_bos() -> None:
    texts = ["abcdefghijk"]
    assert text_of(load_data(texts, Characters(), length=4, limit=1)) == ["abcd"]
    assert text_of(load_data(texts, Characters(), length=4, stride=3)) == ["abcd", "defg", "ghij"]
    with_bos = load_data(texts, Characters(), length=4, bos=True)
    assert text_of(with_bos) == ["\1abc", "\1def", "\1ghi"]
    assert (with_bos.info.length, with_bos.info.stride, with_bos.info.bos) == (4, 3, "each")


def test_a_seed_chooses_windows_in_order_and_again() -> None:
    texts = ["".join(map(chr, range(300, 1300)))]
    first, second, other = (load_data(texts, Characters(), length=10, limit=5, seed=s) for s in (3, 3, 4))
    assert torch.equal(first.ids, second.ids)
    assert first.info == second.info
    assert first.info.sha256 != other.info.sha256
    starts = first.ids[:, 0].tolist()
    assert starts == sorted(starts)
    assert starts != [300, 310, 320, 330, 340]


def test_describe_says_all_that_a_number_depends_on() -> None:
    info = DataInfo("valid.txt", "calibrate", 512, 16, 512, "none", 8192, "0" * 64)
    assert info.describe() == "valid.txt, calibrate, 16 x 512 tokens, stride 512, no BOS, 8,192 tokens"
    drawn = DataInfo("valid.txt", "test", 8, 1, 7, "each", 8, "0" * 64, seed=5)
    assert drawn.describe().endswith("stride 7, BOS before each window, 8 tokens, windows drawn with seed 5")
    assert DataInfo(**json.loads(json.dumps(drawn.to_dict()))) == drawn


def test_batches_cut_ids_and_mask_alike() -> None:
    data = load_data(["abcdefghij"], Characters(), length=2)
    masked = Data(data.ids, torch.ones_like(data.ids), data.info)
    assert [len(ids) for ids, mask in data.batches(2) if mask is None] == [2, 2, 1]
    assert all(mask is not None and mask.shape == ids.shape for ids, mask in masked.batches(2))
    with pytest.raises(DataError, match="D406"):
        next(data.batches(0))
    with pytest.raises(DataError, match="D406"):
        Data(data.ids, torch.ones(1, 2), data.info)


def test_the_text_is_tokenised_as_one_and_only_as_far_as_needed(tmp_path: Path) -> None:
    text = "".join(builtin_text("whole")[:400_000])
    path = write(tmp_path / "long.txt", text)
    merging = Merging(text)
    whole = merging(text)["input_ids"]
    for length in (32, 4096):
        data = load_data(path, merging, length=length, limit=8)
        assert data.ids.flatten().tolist() == whole[: 8 * length]
    assert load_data(path, merging, length=64, limit=10**6).info.tokens == len(whole) // 64 * 64
    reader = Characters()
    load_data(path, reader, length=32, limit=8)
    assert reader.longest < len(text)


def test_documents_are_joined_by_a_blank_line(tmp_path: Path) -> None:
    rows = [{"text": "ab", "other": "xy"}, {"text": "cd", "other": "z"}]
    path = write(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, rows)))
    assert text_of(load_data(path, Characters(), length=6)) == ["ab\n\ncd"]
    assert text_of(load_data(path, Characters(), length=5, text_key="other")) == ["xy\n\nz"]
    assert text_of(load_data(iter(["ab", "cd"]), Characters(), length=6)) == ["ab\n\ncd"]


@pytest.mark.parametrize(
    ("name", "content", "code", "words"),
    [
        ("none.txt", None, "D401", "there is no data file"),
        ("empty.txt", "", "D404", "holds no text"),
        ("blank.txt", " \n\n ", "D404", "holds no text"),
        ("latin.txt", b"caf\xe9 " * 9, "D404", "not UTF-8"),
        ("binary.bin", b"\0\1\2", "D404", "binary"),
        ("table.csv", "a,b\n1,2\n", "D408", "its keys are: a, b"),
        ("book.zip", "PK", "D410", "zip is not read"),
        ("short.txt", "abcde", "D405", "5 tokens, fewer than one window of 8; use --length 5"),
        ("line.jsonl", '{"text": "a"}\n{"text": \n', "D407", "line 2 is not JSON"),
        ("array.jsonl", "[1]\n", "D407", "line 1 holds a list"),
        ("keys.jsonl", '{"story": "a", "id": 1}\n', "D408", "its keys are: story, id"),
        ("number.jsonl", '{"text": 1}\n', "D408", "holds a int, not text"),
    ],
)
def test_each_bad_file_is_told_what_is_wrong(
    tmp_path: Path, name: str, content: str | bytes | None, code: str, words: str
) -> None:
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(DataError, match=words) as caught:
        load_data(str(tmp_path / name), Characters(), length=8)
    assert caught.value.code == code


def test_other_mistakes(tmp_path: Path) -> None:
    silent = Characters()
    silent.bos_token_id = None
    cases: list[tuple[str, Any, dict[str, Any]]] = [
        ("D403", tmp_path, {}),
        ("D406", ["a", 1], {}),
        ("D406", 5, {}),
        ("D406", "two\nlines of text", {}),
        ("D406", ["abc"], {"limit": 0}),
        ("D406", ["abc"], {"length": 1}),
        ("D406", ["abc"], {"stride": 0}),
        ("D406", ["abc"], {"split": "train"}),
        ("D401", "wikitext", {}),
        ("D401", "folder/none.txt", {}),
    ]
    for code, source, options in cases:
        with pytest.raises(DataError) as caught:
            load_data(source, Characters(), **options)
        assert caught.value.code == code, (source, options)
    with pytest.raises(DataError, match="D412"):
        load_data(["abc"], silent, bos=True)


def test_the_built_in_text_is_split_without_overlap() -> None:
    texts = {split: builtin_text(split) for split in SPLITS}
    paragraphs = {split: [p.strip() for p in text.split("\n\n")] for split, text in texts.items()}
    everything = [paragraph for pieces in paragraphs.values() for paragraph in pieces]
    assert len(everything) == len(set(everything))
    assert all(len(text) > 50_000 for text in texts.values())
    data = load_data("builtin", Characters(), split="tune", length=64, limit=2)
    assert data.info.source.startswith("builtin (Python 3.")
    assert "".join(text_of(data)) == texts["tune"][:128]


@given(st.dictionaries(st.text(max_size=6), st.text("ab\n", max_size=12), max_size=12))
def test_no_paragraph_of_a_topic_is_lost(topics: dict[str, str]) -> None:
    def pieces(texts: Any) -> set[str]:
        return {piece.strip() for text in texts for piece in text.split("\n\n")} - {""}

    assert pieces(split_topics(topics).values()) == pieces(topics.values())


def test_a_hub_data_set_is_streamed_by_the_datasets_package(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, str]]:
        calls.append((name, config, split, streaming))
        if config == "none":
            raise ValueError("no such config\nand a long list")
        return [{"text": "ab"}, {"text": "cd"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    data = load_data("Salesforce/wikitext:wikitext-2-raw-v1:test", Characters(), length=6)
    assert text_of(data) == ["ab\n\ncd"]
    assert data.info.source == "Salesforce/wikitext:wikitext-2-raw-v1:test"
    assert load_data("a/b", Characters(), length=6, split="tune").info.source == "a/b::validation"
    assert calls == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", True),
        ("a/b", None, "validation", True),
    ]
    with pytest.raises(DataError, match=r"D411: .*\(no such config\)"):
        load_data("a/b:none", Characters())
    with pytest.raises(DataError, match=r"D408: .* its keys are: text"):
        load_data("a/b", Characters(), text_key="story")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    for source in ("owner/name", write(tmp_path / "a.parquet", "x")):
        with pytest.raises(DataError, match=r"D409: .*pip install shoal\[eval\]"):
            load_data(source, Characters())


def test_parquet_reads_one_column(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow comes with the eval extra")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow comes with the eval extra")
    parquet.write_table(pyarrow.table({"text": ["ab", "cd"], "id": [1, 2]}), tmp_path / "a.parquet")
    assert text_of(load_data(tmp_path / "a.parquet", Characters(), length=6)) == ["ab\n\ncd"]
    with pytest.raises(DataError, match=r"D408: .* its keys are: text, id"):
        load_data(tmp_path / "a.parquet", Characters(), text_key="story")
    with pytest.raises(DataError, match="D404"):
        load_data(write(tmp_path / "b.parquet", "not parquet"), Characters())


def test_facts_about_data_cost_no_torch() -> None:
    code = "import sys; from shoal.data import DataInfo; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
