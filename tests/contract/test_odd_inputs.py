"""Every verb on broken and unusual inputs: no traceback, a coded sentence, nothing half-written."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from shoal.cli import VERBS
from shoal.models.load import Loaded, load
from shoal.plan import Plan, parse_plan, save_plan
from shoal.writing.folder import write
from shoal.writing.gguf_out.write import convert_model

from ..documented.place import proving_here
from ..gguf_files import tiny_model, tiny_tokenizer
from .odd_inputs import DATA, MODELS, NAME, NUL, OUTPUTS, PLANS, UNUSUAL, Make
from .verbs import CHOICE, CODED, COMMANDS, run, snapshot, typed


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the commands name, all of it sound."""
    root = tmp_path_factory.mktemp("sound")
    tokenizer = tiny_tokenizer()
    base = Loaded(tiny_model("llama", num_hidden_layers=3, hidden_size=32), tokenizer, "tiny")
    one = tiny_model("llama", num_hidden_layers=1, hidden_size=32)
    for name, model in (("base", base.model), ("bare", base.model), ("one", one)):
        model.save_pretrained(root / name)
        if name != "bare":
            tokenizer.save_pretrained(root / name)
    convert_model(base, Plan.identity(base.opened.spec), root / "model.gguf")
    loaded = load(root / "base", device="cpu")
    plan = parse_plan("0,2", Plan.identity(loaded.opened.spec, source=str(root / "base")))
    save_plan(plan, root / "plan.json")
    write(loaded, plan, root / "written", prove=False)
    (root / "data.txt").write_text("the cat sat on the mat; " * 40, encoding="utf-8")
    (root / "prompts.txt").write_text("the cat\n", encoding="utf-8")
    (root / "choices.jsonl").write_text(CHOICE * 4, encoding="utf-8")
    files = {"MODEL": "base", "BARE": "bare", "ONE": "one", "GGUF": "model.gguf", "PLAN": "plan.json",
             "WRITTEN": "written", "DATA": "data.txt", "PROMPTS": "prompts.txt", "TASKS": "choices.jsonl"}  # fmt: skip
    return {name: str(root / file) for name, file in files.items()}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Proofs in this process, no server, a cache of this test's own."""
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr("shoal.serve.listen.listen", lambda *_, **__: None)
    monkeypatch.setattr(socket, "getaddrinfo", _asked(socket.getaddrinfo))
    with proving_here():
        yield


def _asked(known: Callable[..., Any]) -> Callable[..., Any]:
    """What a system without a network says of a host that is none."""

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host == "300.1.1.1":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return known(host, *args, **kwargs)

    return getaddrinfo


def pairs(slot: str, inputs: dict[str, Make], share: int) -> list[object]:
    """Every verb that has the slot with every input; one in `share` by default, each verb and each input among them."""
    verbs = [verb for verb, words in COMMANDS.items() if any(slot in (word, word[:3]) for word in words)]
    return [
        pytest.param(verb, odd, marks=[] if (i + j) % share == 0 else pytest.mark.slow, id=f"{verb}, {odd}")
        for i, verb in enumerate(verbs)
        for j, odd in enumerate(inputs)
    ]


Tried = Callable[[str, str, Make], int]


@pytest.fixture
def tried(sound: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tried:
    """(verb, slot, what makes the odd input) -> exit code; everything that must never happen is ruled out."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd").mkdir()

    def outcome(verb: str, slot: str, make: Make) -> int:
        names = {"OUT": str(tmp_path / "out"), "KIND": "methods", **sound, slot: make(tmp_path / "odd", sound)}
        before = snapshot(tmp_path), snapshot(Path(sound["MODEL"]).parent)
        result = run(typed(verb, names))
        assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
        if result.exit_code == 0:
            return 0
        assert result.exit_code in (1, 2), result.output
        if result.exit_code == 1:
            last = result.stderr.strip().splitlines()[-1:]
            assert last and CODED.match(last[0]) and len(last[0]) < 1000, result.stderr
        assert (snapshot(tmp_path), snapshot(Path(sound["MODEL"]).parent)) == before
        return int(result.exit_code)

    return outcome


@pytest.mark.parametrize(("verb", "odd"), pairs("MODEL", MODELS, 24))
def test_what_is_no_model_is_refused(verb: str, odd: str, tried: Tried) -> None:
    assert tried(verb, "MODEL", MODELS[odd]) == 1


@pytest.mark.parametrize(("verb", "odd"), pairs("MODEL", UNUSUAL, 9))
def test_an_unusual_model_works_or_is_refused(verb: str, odd: str, tried: Tried) -> None:
    tried(verb, "MODEL", UNUSUAL[odd])


@pytest.mark.parametrize(("verb", "odd"), pairs("DATA", DATA, 14))
def test_what_is_no_text_is_refused(verb: str, odd: str, tried: Tried) -> None:
    assert tried(verb, "DATA", DATA[odd]) == 1


@pytest.mark.parametrize(("verb", "odd"), pairs("PLAN", PLANS, 15))
def test_what_is_no_plan_is_refused(verb: str, odd: str, tried: Tried) -> None:
    assert tried(verb, "PLAN", PLANS[odd]) == 1


@pytest.mark.parametrize(("verb", "odd"), pairs("OUT", OUTPUTS, 9))
def test_where_nothing_may_be_written_is_refused(verb: str, odd: str, tried: Tried) -> None:
    tried(verb, "OUT", OUTPUTS[odd])


@pytest.mark.parametrize(
    ("verb", "slot", "make"),
    [
        ("verify", "MODEL", MODELS[NUL]),
        ("verify --base", "MODEL", UNUSUAL["one layer"]),
        ("compare", "OUT", OUTPUTS[NAME]),
        ("fit-exits", "OUT", OUTPUTS[NAME]),
    ],
)
def test_what_once_had_no_sentence_of_its_own(verb: str, slot: str, make: Make, tried: Tried) -> None:
    assert tried(verb, slot, make) == 1


VALUES = [
    ("measure", ["-m", "nothing"]), ("measure", ["-o", "nothing=1"]), ("measure", ["-o", "nothing"]),
    ("measure", ["--stack", "nothing"]), ("measure", ["--length", "1"]), ("measure", ["--length", "99999999"]),
    ("measure", ["--dtype", "float7"]), ("measure", ["--plot", "scores.png"]), ("measure", ["--seed", "x"]),
    ("prune", ["-m", "nothing"]), ("prune", ["--drop", "-1"]), ("prune", ["--drop", "0"]), ("prune", ["--drop", "x"]),
    ("prune", ["--keep", "nan"]), ("prune", ["--keep", "2"]), ("prune", ["--budget", "gold=0.5"]),
    ("prune", ["--budget", "params"]), ("prune", ["--then", "nothing"]), ("prune", ["--stack", "nothing"]),
    ("prune", ["--ray", "local"]), ("prune", ["--workers", "0"]), ("prune", ["-m", "sleb", "--journal", "DATA"]),
    ("fuse", ["--with", "nothing"]), ("fuse", ["--with", "refit:nothing=1"]), ("fuse", ["--dtype", "int8"]),
    ("heal", ["-r", "nothing"]), ("heal", ["--term", "nothing"]), ("heal", ["--learn", "lora:rank=x"]),
    ("heal", ["--tokens", "-1"]), ("heal", ["--minutes", "nan"]), ("heal", ["--teacher", "nowhere"]),
    ("heal", ["--save-every", "-1"]), ("heal", ["--watch", "nowhere.txt"]), ("heal", ["--stack", "nothing"]),
    ("compare", ["-b", "nothing"]), ("compare", ["-b", "params=2"]), ("compare", ["-m", "nothing"]),
    ("compare", ["--tasks", "nowhere.jsonl"]), ("evaluate", ["--tasks", "nothing"]), ("evaluate", ["--window", "1"]),
    ("evaluate", ["--against", "nowhere"]), ("bench", ["--policy", "nothing"]), ("bench", ["--against", "nowhere"]),
    ("generate", ["--policy", "nothing"]), ("generate", ["--policy", "nowhere.json"]),
    ("generate", ["--temperature", "0"]), ("generate --speculate", ["--speculate", "nothing"]),
    ("generate --speculate", ["--speculate", "exit:99"]), ("fit-exits", ["--policy", "nothing"]),
    ("fit-exits", ["--what", "nothing"]), ("calibrate", ["--target", "nothing"]), ("calibrate", ["--target", "loss=x"]),
    ("calibrate", ["--confidence", "2"]), ("calibrate", ["--bound", "nothing"]), ("calibrate", ["--features", "DATA"]),
    ("tune-draft", ["--also", "nothing"]), ("tune-draft", ["--prompts", "nowhere.txt"]),
    ("serve", ["--port", "99999"]), ("serve", ["--host", "300.1.1.1"]), ("write", ["--shard-size", "nothing"]),
    ("write", ["--shard-size", "-1GB"]), ("write", ["--dtype", "nothing"]), ("write gguf", ["--outtype", "nothing"]),
    ("write gguf", ["--tokenizer-from", "DATA"]), ("doctor", ["--kept", "nothing"]), ("doctor", ["--kept", "0-99"]),
    ("convert", ["--to", "nothing"]), ("convert", ["--from", "nothing"]), ("write", ["--config", "nowhere.yaml"]),
    ("write", ["--config", "DATA"]), ("ls", ["--nothing"]), ("write", ["--nothing"]),
    ("push WRITTEN", ["--base", "no good"]), ("push WRITTEN", ["--endpoint", "nowhere"]),
    ("push WRITTEN", ["--nothing"]),
]  # fmt: skip
"""(verb, what is typed behind its command): values that no option takes."""


@pytest.mark.parametrize(
    ("verb", "more"),
    [
        pytest.param(verb, more, marks=[] if place % 6 == 0 else pytest.mark.slow, id=" ".join([verb, *more]))
        for place, (verb, more) in enumerate(VALUES)
    ],
)
def test_a_value_that_no_option_takes_is_refused(
    verb: str, more: list[str], tried: Tried, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(COMMANDS, "this", (*COMMANDS[verb], *more))
    assert tried("this", "none", lambda *_: "") in (1, 2)


def test_every_verb_is_among_the_commands() -> None:
    assert {words[0] for words in COMMANDS.values()} == {verb.__name__.replace("_", "-") for verb in VERBS}
    assert len(MODELS) >= 20


def test_a_fault_of_shoal_is_no_refusal_here(sound: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests see it as an exception; outside of tests no traceback reaches a terminal."""
    fault = Mock(side_effect=IndexError("none"))
    monkeypatch.setattr("shoal.models.load.check_source", fault)
    assert isinstance(run(["inspect", sound["MODEL"]]).exception, IndexError)
    monkeypatch.delenv("SHOAL_TRACEBACK")
    assert run(["inspect", sound["MODEL"]]).stderr.startswith("shoal: U639: ")
