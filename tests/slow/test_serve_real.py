"""`shoal serve` with the real model, as a process, and the client that people will use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

ASK: Any = [{"role": "user", "content": "Name three rivers in Europe."}]
WAYS = {
    "plain": (),
    "plan": ("--plan", "0-11,14-29"),
    "policy": ("--policy", "exit:confidence=0.95,first=24"),
    "draft": ("--speculate", "lookup+dynamic-exit"),
}


@contextmanager
def served(*words: str) -> Iterator[tuple[str, int]]:
    """The address and the process of `shoal serve smollm2`."""
    code = "import shoal.cli; shoal.cli.main()"
    command = [sys.executable, "-c", code, "serve", "smollm2", "--port", "0", "--json", "--queue", "8", *words]
    own: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": dict(os.environ)}
    with subprocess.Popen(command, **own) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["address"], process.pid
        process.terminate()
        _, complaints = process.communicate(timeout=60)
        assert process.returncode == 0, complaints
        assert "Traceback" not in complaints


def _resident(pid: int) -> float:
    """MiB"""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def _figure(address: str, name: str) -> float:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("way", WAYS)
def test_a_day_of_a_server(way: str) -> None:
    with (
        served(*WAYS[way]) as (address, pid),
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600) as client,
    ):
        own: Any = {"model": "smollm2", "messages": ASK, "temperature": 0, "max_tokens": 24}
        whole = client.chat.completions.create(**own)
        pieces = client.chat.completions.create(**own, stream=True)
        assert whole.choices[0].message.content
        assert "".join(p.choices[0].delta.content or "" for p in pieces) == whole.choices[0].message.content
        before = _resident(pid)
        for _ in range(3):
            _crowd(client, own)
            _leave(client, own)
            _mistakes(client, address, own)
        # three rounds of 64 requests leave nothing behind that grows with them
        assert _resident(pid) < before + 64
        again = client.chat.completions.create(**own)
        assert again.choices[0].message.content == whole.choices[0].message.content
        assert _figure(address, "shoal_queue_length") == 0


def _crowd(client: openai.OpenAI, own: dict[str, Any]) -> None:
    """64 at once: as many as there are places are answered, the others are told so."""

    def ask(number: int) -> str:
        try:
            if number % 2:
                return "answered" if client.chat.completions.create(**own).choices[0].message.content else "empty"
            pieces = client.chat.completions.create(**own, stream=True)
            return "answered" if any(p.choices[0].delta.content for p in pieces) else "empty"
        except openai.RateLimitError:
            return "refused"

    with ThreadPoolExecutor(64) as pool:
        told = Counter(pool.map(ask, range(64)))
    assert set(told) == {"answered", "refused"}
    assert told["answered"] >= 9  # one at work, eight in the line; more where one ended before the last had asked


def _leave(client: openai.OpenAI, own: dict[str, Any]) -> None:
    """A client that closes its stream frees the model at once."""
    stream = client.chat.completions.create(**own | {"max_tokens": 1000}, stream=True)
    next(iter(stream))
    stream.close()
    started = time.monotonic()
    client.chat.completions.create(**own | {"max_tokens": 1})
    assert time.monotonic() - started < 20


def _mistakes(client: openai.OpenAI, address: str, own: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError, match="context"):
        client.chat.completions.create(**own | {"messages": [{"role": "user", "content": "river " * 20_000}]})
    answer = httpx.post(
        f"{address}/v1/chat/completions", content=b'{"model": ', headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    assert "error" in answer.json()
