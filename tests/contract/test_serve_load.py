"""A server under pressure: many at once, clients that leave, timeouts, faults, the end; and nothing is left."""

from __future__ import annotations

import gc
import json
import socket
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from shoal.decoding.listening import OnTokens
from shoal.errors import PlanError
from shoal.models.load import Loaded, load
from shoal.serve.engine import ClosedError, Engine, FullError, QueuedRequest
from shoal.serve.generating import GenerationCounts, GenerationRequest, under_plan
from shoal.serve.limits import Limits
from shoal.serve.prompts import Prompts
from shoal.serve.running_request import Events, RunningRequest

from .serving import Script, events, ids_of, instead, new_threads, serving, streamed, until
from .test_api import folder  # noqa: F401

TEXT = "/v1/completions"
LONG = {"model": "tiny", "prompt": "a", "max_tokens": 1000}
SHORT = {"model": "tiny", "prompt": "a", "max_tokens": 4}


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:  # noqa: F811
    found = load(folder, device="cpu")
    found.model.config.max_position_embeddings = 4096  # the script that stands in for the model has no positions
    return found


def test_64_requests_at_once_are_bounded_in_number(loaded: Loaded) -> None:
    script = Script(ids_of(loaded.tokenizer, "abcd"), gate=threading.Event())
    refused = threading.Semaphore(0)
    with serving(loaded, script, limits=Limits(waiting=8)) as (client, _):

        def ask(n: int) -> httpx.Response:
            with httpx.Client(base_url=client.base_url, timeout=60) as own:
                response = own.post(TEXT, json=SHORT | {"stream": n % 2 == 0})
            if response.status_code == 429:
                refused.release()
            return response

        with ThreadPoolExecutor(64) as pool:
            asked = [pool.submit(ask, n) for n in range(64)]
            for _ in range(64 - 9):  # one at work, eight in the line: the others are told at once
                assert refused.acquire(timeout=60)
            assert "shoal_queue_length 8.0" in client.get("/metrics").text
            assert script.gate is not None
            script.gate.set()
            answers = [one.result() for one in asked]
        assert "shoal_queue_length 0.0" in client.get("/metrics").text
    kinds = [answer.status_code for answer in answers]
    assert (kinds.count(200), kinds.count(429)) == (9, 55)
    assert (script.runs, script.most) == (9, 1)
    for answer in answers:
        if answer.status_code == 429:
            assert answer.json()["error"]["code"] == "queue_full" and int(answer.headers["retry-after"]) >= 1
        elif answer.headers["content-type"] == "application/json":
            assert answer.json()["choices"][0]["text"] == "abcd"
        else:
            assert "".join(one["choices"][0]["text"] for one in events(answer)) == "abcd"


def test_prompts_on_their_way_into_the_line_count(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, gate, refused = Prompts.encode, threading.Event(), threading.Semaphore(0)
    monkeypatch.setattr(Prompts, "encode", lambda *own: gate.wait(30) and encode(*own))
    with serving(loaded, Script([100]), limits=Limits(waiting=2)) as (client, _):

        def ask(_: int) -> int:
            with httpx.Client(base_url=client.base_url, timeout=60) as own:
                status = own.post(TEXT, json=SHORT).status_code
            if status == 429:
                refused.release()
            return status

        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(ask, n) for n in range(8)]
            told = [refused.acquire(timeout=8) for _ in range(8 - 3)]
            gate.set()
            assert all(told) and sorted(one.result() for one in asked) == [200] * 3 + [429] * 5


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_worker_within_a_token(loaded: Loaded, stream: bool) -> None:
    script = Script([100], every=0.02)
    with serving(loaded, script) as (client, _):
        sock = posted(client, LONG | {"stream": stream})
        assert until(lambda: script.given >= 3)
        sock.close()
        assert until(lambda: script.now == 0)
        given = script.given
        assert given < 100
        assert client.post(TEXT, json=SHORT).status_code == 200
        assert script.given == given + 4
        page = client.get("/metrics").text
        assert 'shoal_generations_total{reason="cancelled"} 1.0' in page
        assert ('shoal_requests_total{path="/v1/completions",status="499"} 1.0' in page) != stream


def test_a_client_that_leaves_the_line_is_never_served(loaded: Loaded) -> None:
    script = Script([100], every=0.01)
    with serving(loaded, script, limits=Limits(waiting=1)) as (client, _):
        with posted(client, LONG | {"stream": True}):
            assert script.begun.wait(5)
            with posted(client, SHORT):
                assert until(lambda: "shoal_queue_length 1.0" in client.get("/metrics").text)
                assert client.post(TEXT, json=SHORT).status_code == 429
            assert until(lambda: "shoal_queue_length 0.0" in client.get("/metrics").text)
        assert client.post(TEXT, json=SHORT).status_code == 200
        assert script.runs == 2


def test_a_model_stops_within_a_token_when_its_client_leaves(loaded: Loaded) -> None:
    with under_plan(loaded)() as generate:
        seen: list[int] = []

        def enough(new: list[int]) -> bool:
            seen.extend(new)
            return len(seen) == 3

        generate(GenerationRequest((5, 6, 7), 50), enough)
    assert len(seen) == 3


def posted(client: httpx.Client, body: dict[str, Any]) -> socket.socket:
    """A connection over which a request was sent whose answer nobody has read."""
    sock = socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=10)
    data = json.dumps(body).encode()
    head = [
        f"POST {TEXT} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
    ]
    sock.sendall("\r\n".join([*head, "", ""]).encode() + data)
    return sock


def test_time_that_is_over_frees_the_worker(loaded: Loaded) -> None:
    script = Script(ids_of(loaded.tokenizer, "a"), every=0.02)
    with serving(loaded, script, limits=Limits(timeout=0.5)) as (client, _):
        response = client.post(TEXT, json=LONG)
        assert response.status_code == 504 and response.json()["error"]["code"] == "timeout"
        _, chunks = streamed(client, TEXT, LONG)
        assert chunks[-1]["error"]["code"] == "timeout" and len(chunks) >= 2
        assert until(lambda: script.now == 0) and script.given < 60
        assert client.post(TEXT, json=SHORT).status_code == 200


def test_a_fault_is_one_request_s(loaded: Loaded, caplog: pytest.LogCaptureFixture) -> None:
    broken = True

    def generate(request: GenerationRequest, on_tokens: OnTokens) -> GenerationCounts:
        on_tokens([100])
        if broken:
            raise RuntimeError("a secret of the machine")
        return GenerationCounts()

    with serving(loaded, generate) as (client, _):
        response = client.post(TEXT, json=SHORT)
        assert response.status_code == 500 and "secret" not in response.text
        _, chunks = streamed(client, TEXT, SHORT)
        assert chunks[-1]["error"]["code"] == "generation_failed"
        broken = False
        assert client.post(TEXT, json=SHORT).status_code == 200
    assert caplog.text.count("RuntimeError: a secret of the machine") == 2


def test_stopping_lets_finish_what_was_begun(loaded: Loaded) -> None:
    script = Script(ids_of(loaded.tokenizer, "abcd"), every=0.05)
    texts = []
    with serving(loaded, script) as (client, _):
        asker = threading.Thread(target=lambda: texts.append(streamed(client, TEXT, SHORT | {"max_tokens": 8})[0]))
        asker.start()
        assert script.begun.wait(5)
    asker.join()
    assert texts == ["abcdabcd"]


def test_nothing_is_left_behind(loaded: Loaded) -> None:
    threads = set(threading.enumerate())
    script = Script(ids_of(loaded.tokenizer, "abcd"))
    with serving(loaded, script) as (client, _):

        def some(n: int) -> None:
            for _ in range(n):
                client.post(TEXT, json=SHORT)
                streamed(client, TEXT, SHORT)
                client.post(TEXT, json={})
                posted(client, LONG).close()

        some(4)
        assert gone(QueuedRequest, RunningRequest, Events)
        here = len(threading.enumerate())
        tracemalloc.start()
        try:
            some(2)
            assert gone(QueuedRequest, RunningRequest, Events)
            before = tracemalloc.get_traced_memory()[0]
            some(10)
            assert gone(QueuedRequest, RunningRequest, Events)
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        assert grown < 64_000, f"{grown} bytes after 40 requests"
        assert len(threading.enumerate()) == here
    assert set(threading.enumerate()) <= threads


def gone(*kinds: type) -> bool:
    """Whether the last of them goes away; a look at all objects takes a tenth of a second."""
    return any(not alive(*kinds) or pause.wait(0.1) for pause in [threading.Event()] * 20)


def alive(*kinds: type) -> list[object]:
    gc.collect()
    return [one for one in gc.get_objects() if type(one) in kinds]  # isinstance would ask lazy modules for their class


def test_an_engine_that_cannot_start_says_why_and_leaves_no_thread(loaded: Loaded) -> None:
    before = set(threading.enumerate())
    with pytest.raises(PlanError, match="P1"), Engine(under_plan(loaded, "0-9"), str):
        pass
    assert not new_threads(before)


def test_an_engine_that_is_closed_takes_nothing(loaded: Loaded) -> None:
    told: list[object] = []
    script = Script([100], every=0.01)
    with Engine(instead(script), str, waiting=1) as engine:
        jobs = [engine.submit(GenerationRequest((1,), 1000), told.append)]
        assert script.begun.wait(5)
        jobs.append(engine.submit(GenerationRequest((1,), 1000), told.append))
        with pytest.raises(FullError):
            engine.submit(GenerationRequest((1,), 1), told.append)
    assert not engine.alive and all(job.cancelled for job in jobs)
    assert [getattr(one, "reason", None) for one in told][-2:] == ["cancelled", "cancelled"]
    with pytest.raises(ClosedError):
        engine.submit(GenerationRequest((1,), 1), told.append)


def test_an_engine_whose_model_goes_away_says_so(loaded: Loaded) -> None:
    @contextmanager
    def leaving() -> Iterator[Any]:
        def generate(request: GenerationRequest, on_tokens: OnTokens) -> GenerationCounts:
            raise SystemExit

        yield generate

    told: list[Any] = []
    with Engine(leaving, str) as engine:
        engine.submit(GenerationRequest((1,), 1), told.append)
        assert until(lambda: not engine.alive and bool(told))
    assert [one.reason for one in told] == ["error"]
