"""Many requests in one forward: each has the text that it has alone, whatever else is written, and nothing is left."""

from __future__ import annotations

import copy
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.decoding import continuous as module
from shoal.errors import PlanError, ShoalWarning, UsageError
from shoal.models.load import Loaded, load
from shoal.serve.batched import batched, where_it_fits
from shoal.serve.engine import ClosedError, Engine
from shoal.serve.generating import Generate, GenerationRequest, Prepare, at_once_of, under_plan
from shoal.serve.limits import Limits

from .families import tiny
from .serving import new_threads, serving, streamed, until
from .test_api import folder  # noqa: F401

TEXT = "/v1/completions"


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:  # noqa: F811
    return load(folder, device="cpu", dtype="float32")


def requests(count: int) -> list[GenerationRequest]:
    """Greedy ones and drawn ones, of unequal lengths."""
    drawn = torch.randint(3, 60, (count, 40), generator=torch.Generator().manual_seed(3)).tolist()
    return [
        GenerationRequest(tuple(ids[: 3 + 5 * (n % 8)]), 6 + n % 7, temperature=0.8 * (n % 2), top_p=0.9, seed=n)
        for n, ids in enumerate(drawn)
    ]


def written(write: Generate, asked: list[GenerationRequest], threads: int) -> list[list[int]]:
    texts: list[list[int]] = [[] for _ in asked]

    def one(at: int) -> None:
        def keep(new: list[int]) -> bool:
            texts[at] += new
            return False

        write(asked[at], keep)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, range(len(asked))))
    return texts


def alone(found: Loaded, plan: str | None, asked: list[GenerationRequest]) -> list[list[int]]:
    with under_plan(found, plan)() as write:
        return written(write, asked, 1)


@pytest.mark.parametrize("plan", [None, "0,2-3", "0,1x2,2-3", "0-1,2@0,3", "0,(1|2),3", "0,1a,2m,3,1"])
@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_each_request_has_the_tokens_that_it_has_alone(plan: str | None, family: str) -> None:
    found, asked = Loaded(tiny(family), None, family), requests(12)
    with batched(found, plan, at_once=5, cached=512)() as write:
        assert at_once_of(write) == 5
        texts = written(write, asked, 5)
    assert texts == alone(found, plan, asked)


def test_what_the_generation_config_says_holds_for_each() -> None:
    """Penalties that read the whole text, and lengths."""
    model = copy.deepcopy(tiny("llama"))
    model.generation_config.repetition_penalty = 3.0
    model.generation_config.min_new_tokens = 4
    model.generation_config.eos_token_id = list(range(3, 40))
    found, asked = Loaded(model, None, "own"), requests(8)
    with batched(found, at_once=4, cached=512)() as write:
        texts = written(write, asked, 4)
    assert texts == alone(found, None, asked)
    assert {len(text) for text in texts} != {one.max_new_tokens for one in asked}, "some ended by themselves"


def test_requests_that_find_no_room_are_read_again() -> None:
    """The pages hold one of the texts and a bit."""
    found, asked = Loaded(tiny("llama"), None, "tiny"), requests(8)
    with batched(found, at_once=8, cached=64)() as write:
        texts = written(write, asked, 8)
    assert texts == alone(found, None, asked)


def test_a_server_writes_for_many_clients_at_once(loaded: Loaded) -> None:
    bodies = [{"model": "tiny", "prompt": "ab" * (1 + n % 4), "max_tokens": 5, "temperature": 0} for n in range(12)]
    with serving(loaded, plan="0,1x2") as (client, _):
        one_by_one = [client.post(TEXT, json=body).json()["choices"][0]["text"] for body in bodies]
    before = set(threading.enumerate())
    with serving(loaded, prepare=batched(loaded, "0,1x2", at_once=4, cached=512)) as (client, _):
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda body: client.post(TEXT, json=body).json(), bodies))
        assert [answer["choices"][0]["text"] for answer in answers] == one_by_one
        assert streamed(client, TEXT, bodies[0])[0] == one_by_one[0]
        stopped = client.post(TEXT, json=bodies[1] | {"stop": one_by_one[1][-1:], "max_tokens": 5}).json()
        assert stopped["choices"][0]["finish_reason"] == "stop"
    assert until(lambda: not new_threads(before))


def test_more_wait_and_more_still_are_refused(loaded: Loaded) -> None:
    gate, seen = threading.Event(), threading.Semaphore(0)
    with Engine(batched(loaded, at_once=3, cached=512), str, waiting=2) as engine:

        def hold(_: Any) -> None:
            seen.release()
            gate.wait(30)

        jobs = [engine.submit(GenerationRequest((5, 6, 7), 3), hold) for _ in range(4)]
        jobs.append(engine.submit(GenerationRequest((5, 6, 7), 3), lambda _: None))
        for _ in range(3):
            assert seen.acquire(timeout=30)
        assert (engine.working, engine.waiting) == (3, 2)
        with pytest.raises(Exception, match="full"):
            engine.submit(GenerationRequest((5,), 1), hold)
        engine.cancel(jobs[4])
        assert engine.waiting == 1
        gate.set()
        assert until(lambda: engine.working == 0)
    assert [job.tokens for job in jobs] == [3, 3, 3, 3, 0]


def test_who_leaves_is_written_for_no_longer(loaded: Loaded) -> None:
    with batched(loaded, at_once=2, cached=2048)() as write:
        heard: list[int] = []

        def leave(new: list[int]) -> bool:
            heard.extend(new)
            return len(heard) >= 3

        write(GenerationRequest((5, 6, 7), 1000), leave)
        assert len(heard) == 3
        manager: Any = write.write.manager  # type: ignore[attr-defined]
        assert until(lambda: not manager.batch_processor.scheduler.active_requests)


def test_nothing_of_many_requests_is_kept(loaded: Loaded) -> None:
    with batched(loaded, "0,1x2", at_once=8, cached=512)() as write:
        written(write, requests(8), 8)
        gc.collect()
        before = len(gc.get_objects())
        for _ in range(10):
            written(write, requests(16), 8)
        gc.collect()
        assert len(gc.get_objects()) - before < 200
        assert not write.write.inboxes and not write.write.sampling._draws  # type: ignore[attr-defined]


def test_a_fault_of_the_batch_is_told_and_ends_the_server(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT", 0.02)
    with batched(loaded, at_once=2, cached=512)() as write:
        monkeypatch.setattr(loaded.model, "forward", lambda *_, **__: 1 / 0)
        with module.silent(), pytest.raises(RuntimeError):
            written(write, requests(1), 1)
        with pytest.raises(ClosedError):
            written(write, requests(1), 1)


def one_at_a_time_with_why(prepare: Prepare) -> str:
    with pytest.warns(ShoalWarning, match="U751: one request at a time") as told, prepare() as write:
        assert at_once_of(write) == 1
    return str(told[0].message)


def test_models_and_plans_that_have_no_pages_are_served_one_at_a_time_and_say_why() -> None:
    falcon = Loaded(tiny("falcon"), None, "falcon")
    with pytest.raises(UsageError, match=r"U750.*falcon.*--max-num-seqs 1"), batched(falcon, cached=512)():
        pass
    assert "does not fit falcon" in one_at_a_time_with_why(where_it_fits(falcon, at_once=4, cached=512))
    llama = Loaded(tiny("llama"), None, "llama")
    keys = "0-1,2@k0,3"
    with pytest.raises(PlanError, match="P162"), batched(llama, keys, cached=512)():
        pass
    assert "keys" in one_at_a_time_with_why(where_it_fits(llama, keys, at_once=4, cached=512))
    with pytest.raises(PlanError, match="P1"), where_it_fits(llama, "0,9", at_once=4, cached=512)():
        pass


def test_a_text_may_be_as_long_as_the_pages(loaded: Loaded) -> None:
    for family in ("llama", "gemma3_text"):
        found = Loaded(tiny(family), None, family)
        with batched(found, at_once=4, cached=64)() as write:
            asked = [GenerationRequest(tuple(range(3, 3 + 56)), 8)] * 3
            assert [len(text) for text in written(write, asked, 3)] == [8, 8, 8]
    assert Limits().context is None
