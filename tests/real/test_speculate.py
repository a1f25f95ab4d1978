"""Self-speculation on the built-in model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from shoal.api.prompts import encoded, read_prompts
from shoal.cli import app
from shoal.errors import ShoalError
from shoal.speculating.speculator import Speculator


@pytest.mark.parametrize("draft", ["skip:0-20,23-29", "lookup+exit:20"])
def test_the_text_is_that_of_plain_decoding(smollm2: Any, draft: str) -> None:
    inputs = encoded(smollm2, "Count from one to five, twice.", None)
    asked = {"max_new_tokens": 8, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    speculator = Speculator(smollm2.model, draft)
    assert torch.equal(speculator.generate(**inputs, **asked), smollm2.model.generate(**inputs, **asked))


def test_stop_strings_are_heard(smollm2: Any) -> None:
    inputs = encoded(smollm2, "Count from one to ten.", None)
    asked = {"max_new_tokens": 24, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    asked |= {"stop_strings": [" two", "2"], "tokenizer": smollm2.tokenizer}
    plain = smollm2.model.generate(**inputs, **asked)
    assert plain.shape[1] < inputs["input_ids"].shape[1] + 24
    assert torch.equal(Speculator(smollm2.model, "lookup").generate(**inputs, **asked), plain)


def test_the_command_line_drafts_and_says_so() -> None:
    told = CliRunner().invoke(
        app, ["generate", "smollm2", "Say hello.", "--speculate", "exit:20", "--max-new-tokens", "6", "--json", "-q"]
    )
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert found["draft"] == "exit:20"
    assert found["stats"]["draft"] == "0-19"
    assert found["stats"]["shared"] == 20


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--speculate", "exit:40"], "U610"),
        (["--speculate", "exit:8", "--plan", "0-20"], "U620"),
        (["--speculate", "exit:8", "--policy", "exit:after=20"], "U620"),
    ],
)
def test_the_command_line_refuses_by_name(words: list[str], code: str) -> None:
    told = CliRunner().invoke(app, ["generate", "smollm2", "Hello", "-q", *words])
    assert told.exit_code == 1
    assert code in told.stderr
    assert "Traceback" not in told.stderr


def test_files_of_prompts(tmp_path: Path) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("one\n\ntwo\n", encoding="utf-8")
    lines.write_text('{"prompt": "one\\nline"}\n', encoding="utf-8")
    assert read_prompts(text) == ["one", "two"]
    assert read_prompts(lines) == ["one\nline"]
    for name, content, code in (("c.txt", b"", "D461"), ("d.jsonl", b"{", "D407"), ("e.jsonl", b"{}", "D408"),
                                ("f.txt", b"\xff\xfe\x00", "D404")):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ShoalError) as refused:
            read_prompts(tmp_path / name)
        assert refused.value.code == code
    with pytest.raises(ShoalError, match="D401"):
        read_prompts(tmp_path / "none.txt")
