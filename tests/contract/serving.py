"""A real server on this machine around a tiny model, or around a script instead of a model."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2 as httpx

from shoal.decoding.listening import OnTokens
from shoal.models.load import Loaded
from shoal.serve.app import Service
from shoal.serve.generating import Generate, GenerationCounts, GenerationRequest, Prepare, under_plan
from shoal.serve.limits import Limits
from shoal.serve.listen import bind, server, service, url

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass
class Script:
    """Writes given ids in place of a model, one every `every` seconds, and keeps who was served."""

    ids: list[int]
    every: float = 0.0
    counts: GenerationCounts = field(default_factory=GenerationCounts)
    at_once: int = 1
    """Tokens of a step, as with a draft."""
    given: int = 0
    runs: int = 0
    now: int = 0
    most: int = 0
    gate: threading.Event | None = None
    """What is waited for before anything is written."""
    begun: threading.Event = field(default_factory=threading.Event)

    def __call__(self, request: GenerationRequest, on_tokens: OnTokens) -> GenerationCounts:
        self.now += 1
        self.most = max(self.most, self.now)
        self.runs += 1
        self.begun.set()
        if self.gate is not None:
            self.gate.wait(30)
        pause = threading.Event()
        try:
            ids = (self.ids * (1 + request.max_new_tokens // len(self.ids)))[: request.max_new_tokens]
            for at in range(0, len(ids), self.at_once):
                pause.wait(self.every)
                step = ids[at : at + self.at_once]
                self.given += len(step)
                if on_tokens(step):
                    break
        finally:
            self.now -= 1
        return self.counts


def instead(generate: Generate) -> Prepare:
    """Put a function in the place of the model."""

    @contextmanager
    def prepare() -> Iterator[Generate]:
        yield generate

    return prepare


@contextmanager
def serving(
    loaded: Loaded,
    generate: Generate | None = None,
    *,
    prepare: Prepare | None = None,
    plan: str | None = None,
    limits: Limits | None = None,
    **own: Any,
) -> Iterator[tuple[httpx.Client, Service]]:
    """A client of a server that runs in a thread of this process."""
    if prepare is None:
        prepare = under_plan(loaded, plan) if generate is None else instead(generate)
    with service(loaded, prepare, name="tiny", limits=limits, **own) as made, bind("127.0.0.1", 0) as sock:
        sock.listen(128)
        running = server(made.app, drain=5)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [sock]}, name="uvicorn")
        thread.start()
        with httpx.Client(base_url=url(sock), timeout=120) as client:
            try:
                yield client, made
            finally:
                running.should_exit = True
                thread.join()


def until(true: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether something becomes true in time."""
    pause = threading.Event()
    for _ in range(int(seconds * 100)):
        if true():
            return True
        pause.wait(0.01)
    return true()


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """A token for each byte."""
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON of a stream, which must end with [DONE] or with an error."""
    data = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    if data[-1] == "[DONE]":
        return [json.loads(one) for one in data[:-1]]
    found = [json.loads(one) for one in data]
    assert "error" in found[-1]
    return found


def streamed(client: httpx.Client, path: str, body: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """The text of a stream, and its chunks."""
    with client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200, response.read()
        found = events(response)
    choices = [choice for chunk in found for choice in chunk.get("choices", [])]
    return "".join(c["delta"].get("content", "") if "delta" in c else c["text"] for c in choices), found


def new_threads(before: set[threading.Thread]) -> list[threading.Thread]:
    """Those of ours that are left: the monitor of a progress bar comes when it likes and stays."""
    return [t for t in set(threading.enumerate()) - before if not type(t).__module__.startswith("tqdm")]
