"""Last words and multiple choice: read, scored, refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shoal.api.task_scores import load_task_sets
from shoal.errors import DataError
from shoal.evaluation.tasks import Item, Tasks, load_tasks, score_tasks

from .families import tiny


class Letters:
    """A tokenizer with one id for each byte; 0 begins a text."""

    bos_token_id = 0
    eos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1 + b % 60 for b in text.encode()]}


def by_hand(model: Any, context: str, option: str) -> tuple[float, bool]:
    head = Letters()(context.rstrip())["input_ids"]
    space = context[len(context.rstrip()) :] or (" " if context else "")
    tail = Letters()(space + option)["input_ids"]
    ids = torch.tensor([(head or [0]) + tail])
    with torch.no_grad():
        scores = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
    rows = scores[-len(tail) :]
    wanted = torch.tensor(tail)
    return float(rows.gather(-1, wanted[:, None]).sum()), bool((rows.argmax(-1) == wanted).all())


ITEMS = (
    Item("ab cd", ("x", "yy zz", "w")),
    Item("longer context here ", ("q", "rr", "s"), 2),
    Item("", ("a", "b", "cc"), 1),
)


@pytest.mark.parametrize("batch", [1, 4])
def test_scores_are_log_likelihoods_whatever_the_padding(batch: int) -> None:
    model = tiny("llama")
    found = score_tasks(model, Letters(), Tasks("t", ITEMS, ""), batch=batch)
    hand = [[by_hand(model, item.context, option)[0] for option in item.options] for item in ITEMS]
    right = [max(range(3), key=totals.__getitem__) == item.gold for item, totals in zip(ITEMS, hand, strict=True)]
    assert found.correct == tuple(right) and found.items == 3
    assert found.nll == pytest.approx(-sum(t[i.gold] for i, t in zip(ITEMS, hand, strict=True)) / 3, rel=1e-4)
    assert found.normalised is not None


class Alphabet(torch.nn.Module):
    """Predicts the next letter of the alphabet after each letter, and after a space an `a`."""

    device = torch.device("cpu")
    config = tiny("llama").config

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        space = 1 + ord(" ") % 60
        following = torch.where(input_ids == space, 1 + ord("a") % 60, input_ids + 1)
        return SimpleNamespace(logits=10.0 * torch.nn.functional.one_hot(following, 64))


def test_a_word_counts_when_greedy_decoding_writes_all_of_it() -> None:
    before = "["  # the tokenizer's id below that of a space
    assert Letters()(before)["input_ids"][0] + 1 == Letters()(" ")["input_ids"][0]
    items = tuple(Item(f"x{before}", (word,)) for word in ("abc", "abd", "bcd"))
    found = score_tasks(Alphabet(), Letters(), Tasks("t", items, ""))
    assert found.correct == (True, False, False) and found.accuracy == pytest.approx(1 / 3)
    assert found.normalised is None and found.error == pytest.approx((1 / 3 * 2 / 3 / 2) ** 0.5)


def test_a_broken_model_gets_nothing_right() -> None:
    model = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    assert score_tasks(model, Letters(), Tasks("t", ITEMS, "")).accuracy == 0


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_both_kinds_of_file_are_read(tmp_path: Path) -> None:
    words = load_tasks(
        write(tmp_path / "w.jsonl", {"context": "a", "continuation": "b"}, "", {"context": "c", "continuation": "d"})
    )
    assert words.items == (Item("a", ("b",)), Item("c", ("d",))) and words.name == "w"
    choice = load_tasks(write(tmp_path / "c.jsonl", {"query": "a", "choices": ["x", "y"], "gold": 1}), limit=1)
    assert choice.items == (Item("a", ("x", "y"), 1),)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("not json", "D450"),
        ([1], "D450"),
        ({"context": "a"}, "D450"),
        ({"context": "a", "continuation": " "}, "D450"),
        ({"query": "a", "choices": ["x"], "gold": 0}, "D450"),
        ({"query": "a", "choices": ["x", "y"], "gold": 2}, "D450"),
        ({"query": "a", "choices": ["x", 3], "gold": 0}, "D450"),
        ("[" * 100_000, "D450"),
        ("", "D451"),
    ],
)
def test_other_files_are_refused_by_line(tmp_path: Path, line: Any, code: str) -> None:
    with pytest.raises(DataError, match=code) as caught:
        load_tasks(write(tmp_path / "t.jsonl", line))
    assert "t.jsonl" in str(caught.value)


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    for name in ("b.jsonl", "none.jsonl"):
        with pytest.raises(DataError, match="D450"):
            load_tasks(tmp_path / name)


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "qa.jsonl" for folder in ("one", "two")]
    for number, path in enumerate([*paths, tmp_path / "other.jsonl"]):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"context": f"{number}", "continuation": "x"}))
    found = load_task_sets([*paths, tmp_path / "other.jsonl"])
    assert [one.name for one in found] == ["one/qa", "two/qa", "other"]
    assert [one.name for one in load_task_sets(paths[:1])] == ["qa"]
