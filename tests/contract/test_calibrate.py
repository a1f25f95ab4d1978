"""Recorded exits against the running policy, the verb and its mistakes, and the depth trace, on a tiny model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoal.data import Data, DataInfo
from shoal.deciding.policies.calibrated import Calibrated
from shoal.deciding.policy_file import Level, load_policy
from shoal.deciding.policy_text import make_policy
from shoal.errors import ShoalError
from shoal.evaluation.exit_search import Target, losses, replay, search_path
from shoal.evaluation.exit_tradeoff import trade_off
from shoal.evaluation.exits import Features, live_losses, load_features, record_exits
from shoal.live import running
from shoal.models.inspect import inspect
from shoal.plan import Plan
from shoal.report.depth import render_depth

from .families import VOCAB, tiny
from .test_api import folder  # noqa: F401
from .test_cli import model, shoal  # noqa: F401

SMALL = ["--length", "12", "--prompt", "4", "--limit", "60", "--target", "agreement=0.9", "--policy"]


def _data(rows: int = 6, length: int = 14) -> Data:
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(2))
    return Data(ids, None, DataInfo("own", "whole", length, rows, length, "none", ids.numel(), "0", None))


def _recorded(family: str, fill: str) -> tuple[Any, Plan, Features]:
    found = tiny(family)
    spec = inspect(found)
    gated = make_policy(f"exit:confidence=1,first=0,fill={fill}", Plan.identity(spec), spec).plan
    return found, gated, record_exits(found, gated, _data(), prompt=5, batch=4)


def _nested(features: Features, by: str) -> Sequence[float]:
    path = search_path(features, Target("agreement", 0.5), by, ceiling=1.0)
    return path[len(path) // 2].thresholds


def _weighed(features: Features, by: str) -> Sequence[float]:
    return trade_off(features, by, (0.45,))[0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("by", ["probability", "saturation"])
@pytest.mark.parametrize("chosen", [_nested, _weighed])
def test_replayed_exits_are_what_the_policy_does(
    family: str, by: str, chosen: Callable[[Features, str], Sequence[float]]
) -> None:
    """With keys and values that are exact, token for token; both targets, both searches."""
    found, gated, features = _recorded(family, "defer")
    setting = chosen(features, by)
    again = replay(features, by, setting)
    assert 0 < (again.left < len(features.layers)).mean() < 1, "the setting must let some leave and some not"
    pairs = zip(features.layers, setting, strict=True)
    thresholds = {layer: value for layer, value in pairs if np.isfinite(value)}
    for target in (Target("agreement", 0.5), Target("loss", 0.5)):
        policy = Calibrated(gated, (Level("one", thresholds),), by, False)
        seen, deep = live_losses(
            found, policy, gated, _data(), features, batch=4, nats=target.kind == "loss"
        )  # fmt: skip
        np.testing.assert_allclose(target.scaled(seen), losses(features, target, again.left), atol=1e-5)
        assert deep == pytest.approx(again.layers)


def test_recorded_exits_come_back_from_their_file(tmp_path: Path) -> None:
    *_, features = _recorded("llama", "project")
    features.save(tmp_path / "exits.safetensors")
    back = load_features(tmp_path / "exits.safetensors")
    assert back.layers == features.layers
    assert back.made == features.made
    np.testing.assert_array_equal(back.choice, features.choice)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(ShoalError, match="D472"):
        load_features(tmp_path / "bad.safetensors")


def test_calibrate_writes_a_policy_that_generate_runs(model: str, tmp_path: Path) -> None:  # noqa: F811
    file, page, kept = tmp_path / "policy.json", tmp_path / "page.html", tmp_path / "exits.safetensors"
    words = [*SMALL, "exit:first=1", "--features", str(kept), "--bound", "betting", "--tradeoff", "0.9",
             "--tradeoff", "0", "--target", "loss=0.5"]  # fmt: skip
    said = json.loads(shoal("calibrate", model, *words, "--json", "--output", str(file), "--report", str(page)))
    assert [one["target"] for one in said["promises"]] == ["agreement=0.9", "loss=0.5"]
    layers = [row["layers"] for row in said["table"]]
    assert layers[0] == 5
    assert layers == sorted(layers, reverse=True)
    assert any("teacher-forced" in note for note in said["notes"])
    policy = load_policy(file)
    assert {"agreement=0.9", "loss=0.5", "setting-0"} <= {level.name for level in policy.levels}
    html = page.read_text(encoding="utf-8")
    assert [row["setting"] for row in said["tradeoffs"]] == ["tradeoff=0", "tradeoff=0.9"]
    assert [level.name for level in policy.levels][2:4] == ["tradeoff=0", "tradeoff=0.9"]
    assert not policy.level("tradeoff=0").promised
    assert said["tradeoffs"][0]["layers"] == 2, "without a weight on what differs all leave at the first exit"
    assert said["tradeoffs"][0]["layers"] <= said["tradeoffs"][1]["layers"]
    for word in ("promised agreement=0.9", "All settings", "tradeoff=0.9", "<svg"):
        assert word in html, word
    for level in (policy.levels[-1].name, "tradeoff=0"):
        answer = json.loads(
            shoal("generate", model, "abc", "--policy", f"calibrated:file={file},level={level}", "--json",
                  "--max-new-tokens", "6")
        )  # fmt: skip
        assert len(answer["trace"]["written"]) == answer["tokens"]
    assert "layers per token written" in shoal("generate", model, "abc", "--policy", str(file), "--max-new-tokens", "2")
    assert "D473" in shoal("calibrate", model, *words[:-1], "loss=0.4", "--seed", "3", code=1)
    assert "conformal" in shoal("calibrate", model, *words, "--guarantee", "conformal", "--check", "recorded", "--json")


def test_levels_switch_while_the_model_runs() -> None:
    found = tiny("llama")
    spec = inspect(found)
    plan = make_policy("calibrated:at=0:-1+2:-1", Plan.identity(spec), spec).plan
    policy = Calibrated(plan, (Level("deep", {}), Level("flat", {0: -1.0})), "probability", True)
    ids = _data(1).ids
    with running(found, Plan.identity(spec), policy=policy) as handle, torch.no_grad():
        seen = []
        for level in ("deep", "flat", "deep"):
            policy.use(level)
            found(input_ids=ids, use_cache=False)
            seen.append(handle.trace.depths[0][0])
        with pytest.raises(ShoalError, match="U606"):
            policy.use("steep")
    assert seen == [4.0, 1.0, 4.0]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["exit", "--confidence", "1"], "U600"),
        (["exit", "--target", "speed=2"], "U601"),
        (["exit", "--target", "agreement=1.5"], "U602"),
        (["patience"], "U603"),
        (["exit:confidence=0.5"], "U603"),
        (["exit:after=2"], "U603"),
        (["exit", "--limit", "8"], "D470"),
        (["exit", "--length", "5"], "D471"),
        (["exit:nothing=1"], "U502"),
        (["exit", "--tradeoff", "1.5"], "U700"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(model: str, words: list[str], code: str) -> None:  # noqa: F811
    assert code in shoal("calibrate", model, *SMALL, *words, code=1)


def test_too_few_sequences_say_how_many_are_needed(model: str) -> None:  # noqa: F811
    said = shoal("calibrate", model, *SMALL, "exit", "--limit", "20", code=1)
    assert "needs 22; give --limit 44" in said


def test_a_policy_of_another_model_and_broken_files_are_refused(model: str, tmp_path: Path) -> None:  # noqa: F811
    level = {"name": "one", "thresholds": {"1": 0.5}}
    whole = {
        "format": "shoal-policy/1", "policy": "calibrated", "family": "other", "fingerprint": "sha256:0", "plan": "x",
        "levels": [level], "by": "margin", "head": "base", "fill": "project", "prefill": False,
    }  # fmt: skip
    file = tmp_path / "policy.json"
    for change, code in (
        ({}, "U605"), ({"levels": []}, "N006"), ({"by": "mood"}, "N006"), ({"format": "x"}, "N006"),
        ({"levels": [{"name": "a", "thresholds": {"x": 1}}]}, "N006"), ({"levels": 3}, "N006"),
    ):  # fmt: skip
        file.write_text(json.dumps(whole | change), encoding="utf-8")
        assert code in shoal("generate", model, "abc", "--policy", str(file), code=1), change
    file.write_bytes(b"\x80")
    assert "N006" in shoal("generate", model, "abc", "--policy", str(file), code=1)
    assert "N006" in shoal("generate", model, "abc", "--policy", str(tmp_path / "none.json"), code=1)
    for text in ("calibrated", "calibrated:at=x:1", "calibrated:at=1:2", "calibrated:at=1"):
        assert "U604" in shoal("generate", model, "abc", "--policy", text, code=1)


def test_trace_in_the_terminal_and_as_a_page(model: str, tmp_path: Path) -> None:  # noqa: F811
    page = tmp_path / "trace.html"
    words = ["--policy", "exit:after=1", "--max-new-tokens", "5", "--raw"]
    said = shoal("generate", model, "abc <b>", *words, "--trace", "--trace-page", str(page))
    assert "[2]" in said, "without colours the layers stand in brackets"
    assert "took fewer than 5" in said
    html = page.read_text(encoding="utf-8")
    assert len(re.findall(r'title="[25] of 5 layers, confidence', html)) >= 1
    assert "abc &lt;b&gt;" in html
    assert "U608" in shoal("generate", model, "abc", "--trace", code=1)
    assert "U608" in shoal("generate", model, "abc", "--trace-page", str(page), code=1)
    assert "W229" in shoal("generate", model, "abc", *words, "--trace-page", str(tmp_path / "no" / "a.html"), code=1)


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_the_page_escapes_text_and_loads_nothing() -> None:
    evil = "<script>alert(1)</script>\"'&"
    written = [
        {"text": evil, "layers": 2.0, "confidence": 0.5},
        {"text": "", "layers": 4.0, "confidence": None},
        {"text": "fine", "layers": 3.5, "confidence": 1.0},
    ]
    html = render_depth(
        {"title": evil, "policy": evil, "prompt": evil, "layers": 4.0, "written": written, "command": evil,
         "facts": {evil: evil}}
    )  # fmt: skip
    tags = _Tags()
    tags.feed(html)
    assert sum(tag == "script" for tag, _ in tags.seen) == 1
    assert not any({"src", "href"} & set(attrs) for _, attrs in tags.seen)
    assert "alert(1)<" not in html.replace("&lt;", "")
    titles = [attrs["title"] for tag, attrs in tags.seen if tag == "span" and "title" in attrs]
    assert titles == [
        "2 of 4 layers, confidence 0.50", "4 of 4 layers, part of the next character",
        "3.5 of 4 layers, confidence 1.00",
    ]  # fmt: skip
    assert [attrs["data-n"] for tag, attrs in tags.seen if "data-n" in attrs] == ["2", "4", "3.5"]
