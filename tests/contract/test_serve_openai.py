"""The client that this interface was made for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

import shoal
from shoal.models.load import Loaded, load

from .serving import TEMPLATE, serving
from .test_api import folder  # noqa: F401

HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:  # noqa: F811
    found = load(folder, device="cpu")
    found.tokenizer.chat_template = TEMPLATE
    return found


@pytest.fixture(scope="module")
def client(loaded: Loaded) -> Iterator[Any]:
    with (
        serving(loaded, key="s3cret") as (plain, _),
        openai.OpenAI(base_url=f"{plain.base_url}/v1", api_key="s3cret", max_retries=0) as made,
    ):
        yield made


def test_chat(client: Any, loaded: Loaded) -> None:
    own = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 20}
    whole = client.chat.completions.create(**own)
    assert whole.choices[0].message.content == shoal.generate(loaded, "hello", max_new_tokens=20).text
    pieces = list(client.chat.completions.create(**own, stream=True, stream_options={"include_usage": True}))
    said = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
    assert said == whole.choices[0].message.content
    assert pieces[-1].usage == whole.usage and pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    again = client.chat.completions.create(**own | {"messages": [*HELLO, whole.choices[0].message, *HELLO]})
    assert again.usage.prompt_tokens > whole.usage.prompt_tokens


def test_completions_and_models(client: Any) -> None:
    own = {"model": "tiny", "prompt": "hello", "temperature": 0, "max_tokens": 20}
    whole = client.completions.create(**own)
    pieces = client.completions.create(**own, stream=True)
    assert "".join(p.choices[0].text for p in pieces) == whole.choices[0].text
    assert [one.id for one in client.models.list()] == [client.models.retrieve("tiny").id] == ["tiny"]


def test_its_errors(client: Any) -> None:
    own = {"model": "tiny", "messages": HELLO}
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.chat.completions.create(**own | {"model": "gpt-4"})
    with pytest.raises(openai.BadRequestError) as found:
        client.chat.completions.create(**own | {"messages": [{"role": "user", "content": "a" * 300}]})
    assert found.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="logprobs"):
        client.chat.completions.create(**own, logprobs=True)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_a_stream_that_is_closed_frees_the_worker(client: Any) -> None:
    stream = client.completions.create(model="tiny", prompt="a", max_tokens=200, stream=True)
    next(iter(stream))
    stream.close()
    assert client.completions.create(model="tiny", prompt="a", max_tokens=1).usage.completion_tokens == 1
