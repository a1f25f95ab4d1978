"""What a server refuses: each with a status, one sentence and OpenAI's shape, before the model is asked."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from shoal.models.load import Loaded, load
from shoal.serve.limits import Limits, is_loopback

from .serving import TEMPLATE, Script, serving
from .test_api import folder  # noqa: F401

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
LIMITS = Limits(max_body=20_000, max_tokens=100)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:  # noqa: F811
    found = load(folder, device="cpu")
    found.tokenizer.chat_template = TEMPLATE
    return found


@pytest.fixture(scope="module")
def script() -> Script:
    return Script([100])


@pytest.fixture(scope="module")
def client(loaded: Loaded, script: Script) -> Iterator[httpx.Client]:
    with serving(loaded, script, limits=LIMITS) as (made, _):
        yield made


def refused(response: httpx.Response, status: int, code: str | None, param: str | None = None) -> str:
    """The sentence, after what is around it was looked at."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(response.json()) == {"error"} and set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    assert error["message"] and "\n" not in error["message"] and "Traceback" not in error["message"]
    return str(error["message"])


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b'{"model": "tiny",}', "invalid_json"),
        (b"\xff\xfe{}", "invalid_json"),
        (b'{"temperature": NaN}', "invalid_json"),
        (b"[" * 9_000 + b"]" * 9_000, "invalid_json"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', "invalid_json"),
        (b'{"model": "\\udc00"}', "invalid_json"),
        (b'{"seed": ' + b"1" * 5_000 + b"}", "invalid_json"),
        (b"[]", None),
        (b'"hello"', None),
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_what_is_no_json_object(client: httpx.Client, path: str, body: bytes, code: str | None) -> None:
    refused(client.post(path, content=body, headers={"Content-Type": "application/json"}), 400, code)


@pytest.mark.parametrize(
    ("own", "param", "code"),
    [
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"top_p": 1.5}, "top_p", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": True}, "max_tokens", "invalid_value"),
        ({"max_tokens": 101}, "max_tokens", "max_tokens_too_large"),
        ({"seed": 1 << 63}, "seed", "invalid_value"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, None, "invalid_value"),
        ({"n": 2}, "n", "unsupported_parameter"),
        ({"logprobs": 0}, "logprobs", "unsupported_parameter"),
        ({"logprobs": True}, "logprobs", "unsupported_parameter"),
        ({"presence_penalty": 0.5}, "presence_penalty", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"top_k": 5}, "top_k", "unknown_parameter"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hello"}, "messages", "invalid_value"),
        ({"messages": [{"role": "owner", "content": ""}]}, "messages.0.role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": "", "tool_calls": []}]},
            "messages.0.tool_calls",
            "unknown_parameter",
        ),
        ({"model": 5}, "model", "invalid_value"),
    ],
    ids=str,
)
def test_a_wrong_field_of_a_chat(client: httpx.Client, own: dict[str, Any], param: str | None, code: str) -> None:
    said = refused(client.post(CHAT, json={"model": "tiny", "messages": HELLO, **own}), 400, code, param)
    assert param is None or param.rpartition(".")[2] in said


def test_an_image_is_refused(client: httpx.Client) -> None:
    image = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}
    asked = {"model": "tiny", "messages": [{"role": "user", "content": [image]}]}
    said = refused(client.post(CHAT, json=asked), 400, "invalid_value", "messages.0.content")
    assert "parts of type text" in said


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ("", "empty_prompt"),
        ([], "empty_prompt"),
        ([259], "invalid_value"),
        ([-1], "invalid_value"),
        (["a", "b"], "unsupported_parameter"),
        ([[1], [2]], "unsupported_parameter"),
        ({"text": "a"}, "invalid_value"),
    ],
)
def test_a_wrong_prompt(client: httpx.Client, prompt: Any, code: str) -> None:
    refused(client.post(TEXT, json={"model": "tiny", "prompt": prompt}), 400, code, "prompt")


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_prompt_that_is_too_long(client: httpx.Client, path: str, script: Script) -> None:
    field = "messages" if path == CHAT else "prompt"
    before = script.runs

    def ask(tokens: int, **own: Any) -> httpx.Response:
        words = (
            "a" * tokens if path == TEXT else [{"role": "user", "content": "a" * (tokens - len("user: \nassistant:"))}]
        )
        return client.post(path, json={"model": "tiny", field: words, **own})

    assert "256" in refused(ask(256), 400, "context_length_exceeded", field)
    assert "257" in refused(ask(257, stream=True), 400, "context_length_exceeded", field)
    assert "57" in refused(ask(200, max_tokens=57), 400, "context_length_exceeded", field)
    assert script.runs == before  # the model was not asked
    assert ask(200, max_tokens=56).json()["usage"] == {
        "prompt_tokens": 200,
        "completion_tokens": 56,
        "total_tokens": 256,
    }
    if path == CHAT:  # without a number a chat may use what is left
        assert ask(250).json()["usage"]["completion_tokens"] == 6


def test_a_body_that_is_too_large(client: httpx.Client) -> None:
    large = json.dumps({"model": "tiny", "prompt": "a" * 20_000}).encode()
    kind = {"Content-Type": "application/json"}
    refused(client.post(TEXT, content=large, headers=kind), 413, "too_large")
    refused(
        client.post(TEXT, content=(large[at : at + 999] for at in range(0, len(large), 999)), headers=kind),
        413,
        "too_large",
    )


def test_a_body_that_never_arrives(loaded: Loaded) -> None:
    with serving(loaded, Script([100]), limits=Limits(timeout=0.2)) as (client, _):
        with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=5) as sock:
            head = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
            sock.sendall("\r\n".join([*head, "Content-Length: 9", "", "{"]).encode())
            assert b" 408 " in sock.recv(1000)
        assert client.get("/health").status_code == 200


def test_other_types_models_paths_and_methods(client: httpx.Client) -> None:
    asked = {"model": "tiny", "prompt": "a"}
    refused(client.post(TEXT, content=json.dumps(asked), headers={"Content-Type": "text/plain"}), 415, None)
    assert "'gpt-4'" in refused(client.post(TEXT, json=asked | {"model": "gpt-4"}), 404, "model_not_found", "model")
    refused(client.get("/v1/models/org/other"), 404, "model_not_found", "model")
    refused(client.post(TEXT, json={"prompt": "a"}), 400, "invalid_value", "model")
    assert "/v1/completions" in refused(client.get("/v2"), 404, "not_found")
    refused(client.get(TEXT), 405, None)


def test_a_name_of_the_web_is_refused_on_the_loopback_address(client: httpx.Client) -> None:
    refused(client.get("/v1/models", headers={"Host": "evil.example"}), 403, "host_not_allowed")
    for name in ("localhost:8000", "127.0.0.1", "[::1]:80"):
        assert client.get("/v1/models", headers={"Host": name}).status_code == 200


def test_the_api_key(loaded: Loaded) -> None:
    with serving(loaded, Script([100]), key="s3cret") as (client, _):
        for given in (
            {},
            {"Authorization": "Bearer s3cre"},
            {"Authorization": "Basic s3cret"},
            {"Authorization": "Bearer é"},
        ):
            headers = {name: text.encode() for name, text in given.items()}
            for path in ("/v1/models", "/metrics", "/v2"):
                response = client.get(path, headers=headers)
                refused(response, 401, "invalid_api_key")
                assert response.headers["www-authenticate"] == "Bearer"
            refused(client.post(TEXT, json={"model": "tiny", "prompt": "a"}, headers=headers), 401, "invalid_api_key")
        assert client.get("/health").status_code == 200
        right = {"Authorization": "Bearer s3cret", "Host": "model.example"}  # the key is proof enough
        assert client.get("/v1/models", headers=right).status_code == 200


def test_a_model_without_a_chat_template(folder: Path) -> None:  # noqa: F811
    with serving(load(folder, device="cpu"), Script([100])) as (client, _):
        said = refused(client.post(CHAT, json={"model": "tiny", "messages": HELLO}), 400, "no_chat_template")
        assert "/v1/completions" in said


def test_a_template_that_refuses(folder: Path) -> None:  # noqa: F811
    loaded = load(folder, device="cpu")
    loaded.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with serving(loaded, Script([100])) as (client, _):
        said = refused(client.post(CHAT, json={"model": "tiny", "messages": HELLO}), 400, "chat_template", "messages")
        assert "roles must alternate" in said


@pytest.mark.parametrize(
    ("host", "here"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("::", False),
     ("10.0.0.1", False), ("example.org", False), ("", False)],
)  # fmt: skip
def test_what_is_loopback(host: str, here: bool) -> None:
    assert is_loopback(host) == here
