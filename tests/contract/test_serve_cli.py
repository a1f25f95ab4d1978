"""shoal serve: mistakes as one sentence, what it prints, and the end that SIGTERM brings."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml
from typer.testing import CliRunner

from shoal.cli import app

from .serving import new_threads
from .test_api import folder  # noqa: F401
from .test_cli import shoal


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOAL_API_KEY", raising=False)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["MODEL", "--host", "no.such.name.invalid"], "U591"),
        (["MODEL", "--host", "192.0.2.1", "--api-key", "x"], "U591"),
        (["MODEL", "--api-key", ""], "U592"),
        (["MODEL", "--api-key", "schlüssel"], "U592"),
        (["MODEL", "--api-key", " x"], "U592"),
        (["nowhere"], "M307"),
        (["MODEL", "--plan", "0-9"], "P103"),
        (["MODEL", "--fast", "--policy", "exit:after=2"], "U567"),
        (["MODEL", "--fast", "--speculate", "exit:2"], "U567"),
        (["MODEL", "--plan", "0-1,2?g,3-4"], "P125"),
        (["MODEL", "--port", "70000"], None),
        (["MODEL", "--timeout", "0"], None),
        (["MODEL", "--queue", "-1"], None),
        (["MODEL", "--max-tokens", "many"], None),
    ],
)
def test_a_mistake_is_one_sentence(
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    code: str | None,
) -> None:
    monkeypatch.setattr("shoal.serve.listen.listen", None)  # whatever gets so far has not been refused
    monkeypatch.setattr("socket.getaddrinfo", _numbers_only)
    before = set(threading.enumerate())
    typed = ["serve", "--port", "0", *(str(folder) if word == "MODEL" else word for word in words)]
    if code is None:
        assert CliRunner().invoke(app, typed).exit_code == 2
    else:
        assert f"shoal: {code}" in shoal(*typed, code=1)
    assert not new_threads(before)


def _numbers_only(host: str, port: int, **own: object) -> list[tuple[object, ...]]:
    if host.endswith(".invalid"):
        raise socket.gaierror(-2, "Name or service not known")
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))]


def test_a_port_that_is_taken_is_refused_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = shoal("serve", "nowhere", "--port", str(taken.getsockname()[1]), code=1)
    assert "U591" in said and "--port" in said


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    said = shoal("serve", "nowhere", code=1)
    assert "U590" in said and "shoal[serve]" in said and "uvicorn" in said


def test_an_open_address_without_a_key_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.getaddrinfo", _numbers_only)
    every = ".".join("0000")
    words = ["serve", "nowhere", "--host", every, "--port", "0"]
    warned = CliRunner().invoke(app, words).stderr
    assert "--api-key" in warned.splitlines()[0] and every in warned
    assert "--api-key" not in CliRunner().invoke(app, [*words, "--api-key", "x"]).stderr
    assert "--api-key" not in CliRunner().invoke(app, ["serve", "nowhere", "--port", "0"]).stderr


def test_a_dry_run_is_the_config_file_without_the_key(tmp_path: Path) -> None:
    said = json.loads(shoal("serve", "nowhere", "--api-key", "s3cret", "--queue", "3", "--dry-run", "--json"))["config"]
    assert "s3cret" not in said and yaml.safe_load(said)["queue"] == 3
    file = tmp_path / "serve.yaml"
    file.write_text(said, encoding="utf-8")
    assert yaml.safe_load(shoal("serve", "--config", str(file), "--dry-run")) == yaml.safe_load(said)


def test_it_says_where_it_is_and_sigterm_lets_it_finish(folder: Path) -> None:  # noqa: F811
    code = "import shoal.cli; shoal.cli.main()"
    words = ["serve", str(folder), "--port", "0", "--name", "tiny", "--json", "--plan", "0-1,3-4"]
    own: Any = {"env": os.environ | {"SHOAL_API_KEY": "s3cret"}, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, *words], text=True, **own) as process:
        assert process.stdout is not None and process.stderr is not None
        said = json.loads(process.stdout.readline())
        assert said["model"] == "tiny" and said["plan"] == "0-1,3-4"
        body = {"model": "tiny", "prompt": "a", "max_tokens": 200, "temperature": 0, "stream": True}
        key = {"Authorization": "Bearer s3cret"}
        with httpx.stream("POST", f"{said['address']}/v1/completions", json=body, headers=key) as response:
            lines = response.iter_lines()
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert "data: " in first and "finish_reason" in rest[-2] and rest[-1] == "data: [DONE]"
        assert process.wait(20) == 0, process.stderr.read()
        (told,) = [json.loads(line) for line in process.stdout]
        assert (told["method"], told["path"], told["status"]) == ("POST", "/v1/completions", 200)
        assert process.stderr.read() == ""
    with pytest.raises(httpx.ConnectError):
        httpx.get(said["address"])
