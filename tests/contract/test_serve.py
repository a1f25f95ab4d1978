"""What the server writes is what the model writes: streamed or not, with a plan or without, up to a stop sequence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

import shoal
from shoal.models.load import Loaded, load
from shoal.serve.generating import GenerationCounts

from .serving import TEMPLATE, Script, ids_of, serving, streamed
from .test_api import folder  # noqa: F401

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PLAN = "0,2-4"


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:  # noqa: F811
    found = load(folder, device="cpu")
    found.tokenizer.chat_template = TEMPLATE
    return found


@pytest.fixture(scope="module")
def client(loaded: Loaded) -> Iterator[httpx.Client]:
    with serving(loaded) as (made, _):
        yield made


def asked(path: str, prompt: str, **own: Any) -> dict[str, Any]:
    said = {"messages": [{"role": "user", "content": prompt}]} if path == CHAT else {"prompt": prompt}
    return {"model": "tiny", "max_tokens": 24, "temperature": 0, **said, **own}


def whole(client: httpx.Client, path: str, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    said = response.json()
    (choice,) = said["choices"]
    return (choice["message"]["content"] if path == CHAT else choice["text"]), said


@pytest.mark.parametrize("plan", [None, PLAN])
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_streamed_equals_whole_equals_generate(loaded: Loaded, path: str, plan: str | None) -> None:
    texts = {}
    with serving(loaded, plan=plan) as (client, _):
        for prompt in ("Once upon", "größer 😀"):
            text, said = whole(client, path, asked(path, prompt))
            again, chunks = streamed(client, path, asked(path, prompt, stream_options={"include_usage": True}))
            texts[prompt] = text
            assert again == text
            assert chunks[-1]["usage"] == said["usage"] and chunks[-1]["choices"] == []
            assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]} != {said["id"]}
            assert chunks[-2]["choices"][0]["finish_reason"] == said["choices"][0]["finish_reason"]
    for prompt, text in texts.items():
        alone = shoal.generate(loaded, prompt, plan=plan, max_new_tokens=24, chat=path == CHAT)
        assert text == alone.text
        dense = shoal.generate(loaded, prompt, max_new_tokens=24, chat=path == CHAT)
        assert (dense.text == text) == (plan is None)


def test_usage_counts_tokens(client: httpx.Client, loaded: Loaded) -> None:
    _, said = whole(client, TEXT, asked(TEXT, "Once"))
    alone = shoal.generate(loaded, "Once", max_new_tokens=24, chat=False)
    assert said["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": alone.tokens,
        "total_tokens": 4 + alone.tokens,
    }
    assert said["choices"][0]["finish_reason"] == "length"


def test_a_prompt_may_be_ids(client: httpx.Client, loaded: Loaded) -> None:
    ids = ids_of(loaded.tokenizer, "Once")
    expected, _ = whole(client, TEXT, asked(TEXT, "Once"))
    for prompt in (ids, [ids], ["Once"]):
        assert whole(client, TEXT, asked(TEXT, "") | {"prompt": prompt})[0] == expected


def test_a_seed_repeats_a_sample(client: httpx.Client) -> None:
    def drawn(**own: Any) -> str:
        return whole(client, TEXT, asked(TEXT, "Once", **{"temperature": 1.0} | own))[0]

    assert drawn(seed=3) == drawn(seed=3)
    assert len({drawn(seed=n) for n in range(4)} | {drawn(), drawn()}) == 6
    greedy, _ = whole(client, TEXT, asked(TEXT, "Once"))
    assert drawn(top_p=0) == drawn(temperature=1e-9) == greedy


def test_parts_of_a_message_are_joined_and_a_developer_is_the_system(client: httpx.Client) -> None:
    def told(*messages: dict[str, Any]) -> str:
        return whole(client, CHAT, {**asked(CHAT, ""), "messages": list(messages)})[0]

    user = {"role": "user", "content": "hello"}
    plain = told({"role": "system", "content": "ab"}, user)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert told({"role": "developer", "content": parts, "refusal": None}, user) == plain != told(user)


TOLD = "Grüße 😀 bis zum END und weiter"


@pytest.mark.parametrize("at_once", [1, 5])
@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("END", "Grüße 😀 bis zum "),
        (["zum E", "END"], "Grüße 😀 bis "),
        (["ENDE", "und weiter!"], TOLD),
        ("ße 😀", "Grü"),
        ([], TOLD),
    ],
)
def test_a_stop_sequence_ends_the_text_across_token_borders(loaded: Loaded, stop: Any, text: str, at_once: int) -> None:
    ids = ids_of(loaded.tokenizer, TOLD)
    script = Script([*ids, 2], at_once=at_once)
    with serving(loaded, script) as (client, _):
        body = asked(TEXT, "x", stop=stop, max_tokens=len(ids) + 1, stream_options=None)
        said, answer = whole(client, TEXT, body)
        again, chunks = streamed(client, TEXT, body)
    assert said == again == text
    assert answer["choices"][0]["finish_reason"] == chunks[-1]["choices"][0]["finish_reason"] == "stop"
    pieces = [chunk["choices"][0]["text"] for chunk in chunks]
    assert not any("\ufffd" in piece for piece in pieces) and len(pieces) >= 2
    if text != TOLD:  # nothing is generated behind the stop sequence
        length = min(
            (TOLD + one)[: (TOLD + one).index(one) + len(one)] for one in ([stop] if isinstance(stop, str) else stop)
        )
        assert answer["usage"]["completion_tokens"] == len(length.encode())
        assert script.given < 2 * (len(length.encode()) + at_once)


def test_a_character_that_is_never_finished_is_replaced(loaded: Loaded) -> None:
    ids = ids_of(loaded.tokenizer, "a😀")[:-1]
    with serving(loaded, Script(ids)) as (client, _):
        body = asked(TEXT, "x", max_tokens=len(ids))
        assert whole(client, TEXT, body)[0] == streamed(client, TEXT, body)[0] == "a\ufffd"


def test_models_are_listed(client: httpx.Client) -> None:
    (found,) = client.get("/v1/models").json()["data"]
    assert found["id"] == "tiny" and found == client.get("/v1/models/tiny").json()
    assert client.get("/health").json() == {"status": "ok"}


def value(page: str, name: str) -> float | None:
    return next((float(line.split()[-1]) for line in page.splitlines() if line.startswith(f"{name} ")), None)


def test_metrics_count(loaded: Loaded) -> None:
    with serving(loaded) as (client, _):
        whole(client, TEXT, asked(TEXT, "Once", max_tokens=3))
        client.post(TEXT, json={})
        client.get("/nowhere/1")
        page = client.get("/metrics").text
    assert value(page, "shoal_prompt_tokens_total") == 4
    assert value(page, "shoal_generated_tokens_total") == 3
    assert value(page, "shoal_time_to_first_token_seconds_count") == 1
    assert value(page, "shoal_tokens_per_second_count") == 1
    assert value(page, "shoal_queue_length") == value(page, "shoal_requests_at_work") == 0
    assert value(page, 'shoal_generations_total{reason="length"}') == 1
    assert value(page, 'shoal_requests_total{path="/v1/completions",status="200"}') == 1
    assert value(page, 'shoal_requests_total{path="/v1/completions",status="400"}') == 1
    assert value(page, 'shoal_requests_total{path="other",status="404"}') == 1
    assert "layers" not in page and "drafted" not in page and "nowhere" not in page


def test_depth_and_acceptance_appear_when_they_are_counted(loaded: Loaded) -> None:
    script = Script(ids_of(loaded.tokenizer, "abc"), counts=GenerationCounts(layers=9, drafted=4, accepted=2))
    with serving(loaded, script) as (client, _):
        for _ in range(2):
            whole(client, TEXT, asked(TEXT, "x", max_tokens=3))
        page = client.get("/metrics").text
    assert value(page, "shoal_layers_executed_total") == 18
    assert value(page, "shoal_drafted_tokens_total") == 8
    assert value(page, "shoal_accepted_tokens_total") == 4
