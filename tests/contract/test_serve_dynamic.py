"""Served under a policy and with a draft: the text of `generate`, and figures that say how deep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.decoding import decoder
from shoal.decoding.fast import FastDecoder
from shoal.errors import ShoalError
from shoal.models.load import Loaded, load
from shoal.serve.dynamic import chosen_way, drafted, under_policy
from shoal.serve.engine import Engine

from .serving import serving, streamed, until
from .test_api import folder  # noqa: F401

TEXT = "/v1/completions"
BODY: dict[str, Any] = {"model": "tiny", "prompt": "Once upon", "max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:  # noqa: F811
    return load(folder, device="cpu")


def figures(page: str) -> dict[str, float]:
    lines = [line.split() for line in page.splitlines() if line.startswith("shoal_") and "{" not in line]
    return {name: float(value) for name, value in lines}


@pytest.mark.parametrize("policy", ["exit:after=3", "exit:confidence=0.02"])
def test_a_policy_writes_as_generate_does(loaded: Loaded, policy: str) -> None:
    expected = shoal.generate(loaded, "Once upon", policy=policy, max_new_tokens=24, chat=False)
    with serving(loaded, prepare=under_policy(loaded, policy)) as (client, _):
        for _ in range(2):
            assert client.post(TEXT, json=BODY).json()["choices"][0]["text"] == expected.text
        assert streamed(client, TEXT, BODY)[0] == expected.text
        found = figures(client.get("/metrics").text)
    assert expected.trace is not None
    depth = sum(expected.trace["depths"][0][len("Once upon") - 1 :]) / expected.tokens
    assert found["shoal_generated_tokens_total"] == 3 * expected.tokens
    assert found["shoal_layers_executed_total"] / found["shoal_generated_tokens_total"] == pytest.approx(depth)
    assert depth < 5 and "shoal_drafted_tokens_total" not in found


def test_each_request_has_a_compressing_cache_of_its_own(loaded: Loaded) -> None:
    asked: dict[str, Any] = {"plan": "0-2,4", "kv_cache": "minicache:start=0,keep=0"}
    expected = shoal.generate(loaded, "Once upon", max_new_tokens=24, chat=False, **asked)
    with serving(loaded, prepare=chosen_way(loaded, asked["plan"], None, kv_cache=asked["kv_cache"])) as (client, _):
        for _ in range(2):
            assert client.post(TEXT, json=BODY).json()["choices"][0]["text"] == expected.text
        assert streamed(client, TEXT, BODY)[0] == expected.text
    with pytest.raises(ShoalError, match="U659"), Engine(chosen_way(loaded, None, None, kv_cache="minicache:t=2"), str):
        pass


@pytest.mark.parametrize("draft", ["exit:3", "lookup"])
def test_a_draft_changes_no_token(loaded: Loaded, draft: str) -> None:
    expected = shoal.generate(loaded, "Once upon", max_new_tokens=24, chat=False)
    with serving(loaded, prepare=drafted(loaded, draft)) as (client, _):
        whole = client.post(TEXT, json=BODY).json()
        assert whole["choices"][0]["text"] == expected.text
        assert whole["usage"]["completion_tokens"] == expected.tokens
        assert streamed(client, TEXT, BODY)[0] == expected.text
        stop = expected.text[5:8]
        cut = client.post(TEXT, json=BODY | {"stop": stop}).json()["choices"][0]
        assert (cut["text"], cut["finish_reason"]) == (expected.text[: expected.text.index(stop)], "stop")
        found = figures(client.get("/metrics").text)
    assert 0 <= found["shoal_accepted_tokens_total"] <= found["shoal_drafted_tokens_total"]
    assert found["shoal_layers_executed_total"] >= 5 * found["shoal_generated_tokens_total"] / 5


@pytest.mark.parametrize("plan", [None, "0-2,4"])
def test_compiled_layers_change_no_token(loaded: Loaded, plan: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[FastDecoder] = []

    def kept(model: Any) -> FastDecoder:
        made.append(FastDecoder(model, mode="layers", backend="eager"))
        return made[-1]

    monkeypatch.setattr(decoder, "FastDecoder", kept)
    expected = shoal.generate(loaded, "Once upon", plan=plan, max_new_tokens=24, chat=False)
    with serving(loaded, prepare=chosen_way(loaded, plan, None, compiled=300)) as (client, _):
        lengths = [one.length for one in made[0].compiled.values()]
        assert lengths == [256, 512], "before the first request"
        assert client.post(TEXT, json=BODY).json()["choices"][0]["text"] == expected.text
        assert streamed(client, TEXT, BODY)[0] == expected.text
        drawn = [client.post(TEXT, json=BODY | {"temperature": 0.8, "seed": 4}).json() for _ in range(2)]
        assert drawn[0]["choices"][0]["text"] == drawn[1]["choices"][0]["text"]
        assert [one.length for one in made[0].compiled.values()] == lengths


def test_a_draft_stops_when_its_client_leaves(loaded: Loaded) -> None:
    with serving(loaded, prepare=drafted(loaded, "exit:3")) as (client, _):
        with client.stream("POST", TEXT, json=BODY | {"max_tokens": 240, "stream": True}) as response:
            next(response.iter_lines())
        assert until(lambda: figures(client.get("/metrics").text)["shoal_requests_at_work"] == 0)
        assert client.post(TEXT, json=BODY).status_code == 200


def test_what_cannot_decide_or_draft_is_refused_at_the_start(loaded: Loaded) -> None:
    with pytest.raises(ShoalError), Engine(under_policy(loaded, "exit:after=99"), str):
        pass
    with pytest.raises(ShoalError):
        drafted(loaded, "exit:99")
